// TensorFlow operations for what happens to every image: random numbers, crops of JPEGs, and antialiased bicubic
// resizing, pixel for pixel as Pillow does it up to version 12 (Image.resize with BICUBIC), which is what the original
// code's torchvision calls. augment.py compiles this file, and does without where that fails.
//
// Resizing goes along rows first, then along columns. The weights of an output pixel are those of Keys' cubic (1981,
// a = -0.5), stretched over the pixels it shrinks, as whole numbers of 22 binary places; each pass rounds to 8 bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

// On processors with AVX512-FP16, of which Eigen would make use in code that does not compile. Nothing here is 16-bit.
#undef __AVX512FP16__

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/kernels/stateless_random_ops.h"
#include "tensorflow/core/lib/jpeg/jpeg_mem.h"
#include "tensorflow/core/lib/random/random_distributions.h"

namespace {

constexpr int PLACES = 22, HALF = 11;

double cubic(double x) {
  x = std::abs(x);
  const double inner = (1.5 * x - 2.5) * x * x + 1, outer = ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return x < 1 ? inner : x < 2 ? outer : 0;
}

// Of which input pixels each output pixel is made: `used` of them, from `first` on. The weights are kept in two halves,
// upper and lower binary places, which are multiplied in 16 bits, two by two.
struct Taps {
  int most;  // even
  std::vector<int> first, used;
  std::vector<std::int16_t> upper, lower;  // [to][most]

  Taps(int from, int to, bool mirrored) : first(to), used(to) {
    const double scale = static_cast<double>(from) / to, stretch = std::max(scale, 1.0), support = 2 * stretch;
    most = (static_cast<int>(std::ceil(support)) + 1) * 2;
    upper.resize(static_cast<std::size_t>(to) * most);
    lower.resize(upper.size());
    std::vector<double> exact(most);
    for (int i = 0; i < to; ++i) {
      const int out = mirrored ? to - 1 - i : i;
      const double centre = (i + 0.5) * scale;
      first[out] = std::max(static_cast<int>(centre - support + 0.5), 0);
      used[out] = std::min(static_cast<int>(centre + support + 0.5), from) - first[out];
      for (int k = 0; k < used[out]; ++k) exact[k] = cubic((k + first[out] - centre + 0.5) / stretch);
      double sum = 0;
      for (int k = 0; k < used[out]; ++k) sum += exact[k];
      for (int k = 0; k < used[out]; ++k) {
        const double scaled = exact[k] / sum * (1 << PLACES);
        const int weight = static_cast<int>(scaled + (scaled < 0 ? -0.5 : 0.5));
        const std::size_t at = static_cast<std::size_t>(out) * most + k;
        upper[at] = weight >> HALF;
        lower[at] = weight & ((1 << HALF) - 1);
      }
    }
  }
};

constexpr int LANES = 32;

// `count` output pixels side by side, at most LANES, each from `used` input pixels that are `distance` apart.
inline void weigh(const std::uint8_t* in, std::size_t distance, const std::int16_t* upper, const std::int16_t* lower,
                  int used, std::uint8_t* out, int count) {
  int sums[LANES];
  std::fill_n(sums, LANES, 1 << (PLACES - 1));
  for (int k = 0; k < used; ++k, in += distance) {
    const int weight = upper[k] * (1 << HALF) + lower[k];
    for (int x = 0; x < count; ++x) sums[x] += in[x] * weight;
  }
  for (int x = 0; x < count; ++x) out[x] = std::clamp(sums[x] >> PLACES, 0, 255);
}

// The same for all LANES.
inline void weigh_all(const std::uint8_t* in, std::size_t distance, const std::int16_t* upper,
                      const std::int16_t* lower, int used, std::uint8_t* out) {
#ifdef __AVX2__
  // Two pixels are multiplied by two weights and added, in one instruction. Sums may overflow, but not in the end.
  __m256i high[4] = {}, low[4] = {};
  const auto add_two = [&](const std::uint8_t* in, const std::uint8_t* next, int k) {
    const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
    const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next));
    const __m256i some = _mm256_unpacklo_epi8(one, two), rest = _mm256_unpackhi_epi8(one, two), zero = {};
    const __m256i pixels[4] = {_mm256_unpacklo_epi8(some, zero), _mm256_unpackhi_epi8(some, zero),
                               _mm256_unpacklo_epi8(rest, zero), _mm256_unpackhi_epi8(rest, zero)};
    int both[2];
    std::memcpy(&both[0], upper + k, sizeof(int));
    std::memcpy(&both[1], lower + k, sizeof(int));
    for (int i = 0; i < 4; ++i) {
      high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(pixels[i], _mm256_set1_epi32(both[0])));
      low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(pixels[i], _mm256_set1_epi32(both[1])));
    }
  };
  int k = 0;
  for (; k + 1 < used; k += 2, in += 2 * distance) add_two(in, in + distance, k);
  if (k < used) add_two(in, in, k);  // the second weight is zero
  for (int i = 0; i < 4; ++i) {
    const __m256i half = _mm256_set1_epi32(1 << (PLACES - 1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32(high[i], HALF), low[i]), half);
    high[i] = _mm256_srai_epi32(sum, PLACES);
  }
  const __m256i some = _mm256_packs_epi32(high[0], high[1]), rest = _mm256_packs_epi32(high[2], high[3]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_packus_epi16(some, rest));  // to 8 bits, clipped
#else
  weigh(in, distance, upper, lower, used, out, LANES);
#endif
}

// Resize in[from * channels][row] to out[to * channels][row]: pixels lie along the columns, `channels` rows each.
void along_columns(const std::uint8_t* in, int row, int channels, const Taps& taps, std::uint8_t* out) {
  const std::size_t distance = static_cast<std::size_t>(channels) * row;
  for (std::size_t i = 0; i < taps.first.size(); ++i)
    for (int c = 0; c < channels; ++c, out += row) {
      const std::uint8_t* data = in + taps.first[i] * distance + c * row;
      const std::int16_t *upper = taps.upper.data() + i * taps.most, *lower = taps.lower.data() + i * taps.most;
      if (row < LANES) weigh(data, distance, upper, lower, taps.used[i], out, row);
      for (int x = 0; row >= LANES && x < row; x += LANES) {
        const int begin = std::min(x, row - LANES);  // the last block overlaps the one before
        weigh_all(data + begin, distance, upper, lower, taps.used[i], out + begin);
      }
    }
}

constexpr int SIDE = 16;
typedef std::uint8_t Bytes __attribute__((vector_size(SIDE)));

template <int STEP, std::size_t... L>
inline void exchange(Bytes& a, Bytes& b, std::index_sequence<L...>) {
  Bytes low = __builtin_shufflevector(a, b, ((L & STEP) ? L - STEP + SIDE : L)...);
  b = __builtin_shufflevector(a, b, ((L & STEP) ? L + SIDE : L + STEP)...);
  a = low;
}

template <int STEP>
inline void transpose_block(Bytes* block) {
  if constexpr (STEP > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; ++i)
      if (!(i & STEP)) exchange<STEP>(block[i], block[i + STEP], std::make_index_sequence<SIDE>());
    transpose_block<STEP / 2>(block);
  }
}

// in[rows][columns], rows `stride` apart, to out[columns][rows]
void transpose(const std::uint8_t* in, std::size_t stride, std::size_t rows, std::size_t columns, std::uint8_t* out) {
  for (std::size_t i = 0; i < rows; i += SIDE)
    for (std::size_t j = 0; j < columns; j += SIDE)
      if (i + SIDE <= rows && j + SIDE <= columns) {
        Bytes block[SIDE];
#pragma GCC unroll 16
        for (int k = 0; k < SIDE; ++k) std::memcpy(&block[k], in + (i + k) * stride + j, SIDE);
        transpose_block<SIDE / 2>(block);
#pragma GCC unroll 16
        for (int k = 0; k < SIDE; ++k) std::memcpy(out + (j + k) * rows + i, &block[k], SIDE);
      } else {
        for (std::size_t y = i; y < std::min(rows, i + SIDE); ++y)
          for (std::size_t x = j; x < std::min(columns, j + SIDE); ++x) out[x * rows + y] = in[y * stride + x];
      }
}

// in[height, width, channels], rows `stride` apart, to out[high, wide, channels], mirrored left to right or not.
void resize(const std::uint8_t* in, std::size_t stride, int height, int width, int channels, int high, int wide,
            bool mirrored, std::uint8_t* out) {
  thread_local std::vector<std::uint8_t> tall, turned, between;
  const std::size_t narrow = static_cast<std::size_t>(wide) * channels;
  tall.resize(static_cast<std::size_t>(height) * width * channels);
  turned.resize(height * narrow);
  between.resize(height * narrow);
  transpose(in, stride, height, static_cast<std::size_t>(width) * channels, tall.data());
  along_columns(tall.data(), height, channels, Taps(width, wide, mirrored), turned.data());
  transpose(turned.data(), height, narrow, height, between.data());
  along_columns(between.data(), narrow, 1, Taps(height, high, false), out);
}

using tensorflow::Tensor;
using tensorflow::tstring;
using Context = tensorflow::OpKernelContext;

// The function `compute` as the body of an operation.
template <void compute(Context*)>
struct Kernel : tensorflow::OpKernel {
  using OpKernel::OpKernel;
  void Compute(Context* context) override { compute(context); }
};

REGISTER_OP("MaeResize").Input("image: uint8").Input("size: int32").Input("mirrored: bool").Output("resized: uint8");

void resize_one(Context* context) {
  const Tensor& image = context->input(0);
  OP_REQUIRES(context, image.dims() == 3 && image.NumElements() > 0,
              tensorflow::errors::InvalidArgument("no image: ", image.shape().DebugString()));
  const int height = image.dim_size(0), width = image.dim_size(1), channels = image.dim_size(2);
  const auto size = context->input(1).flat<int>();
  Tensor* out = nullptr;
  OP_REQUIRES_OK(context, context->allocate_output(0, {size(0), size(1), channels}, &out));
  resize(image.flat<std::uint8_t>().data(), static_cast<std::size_t>(width) * channels, height, width, channels,
         size(0), size(1), context->input(2).scalar<bool>()(), out->flat<std::uint8_t>().data());
}

REGISTER_KERNEL_BUILDER(Name("MaeResize").Device(tensorflow::DEVICE_CPU), Kernel<resize_one>);

// What tf.random.stateless_uniform gives for each of many seeds.
REGISTER_OP("MaeUniform").Input("seeds: int64").Attr("count: int").Output("numbers: float");

class Uniform : public tensorflow::OpKernel {
 public:
  explicit Uniform(tensorflow::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("count", &count));
  }

  void Compute(Context* context) override {
    namespace random = tensorflow::random;
    const Tensor& seeds = context->input(0);
    Tensor* out = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {seeds.dim_size(0), count}, &out));
    Tensor seed(tensorflow::DT_INT64, {2});
    for (int i = 0; i < seeds.dim_size(0); ++i) {
      for (int j = 0; j < 2; ++j) seed.vec<std::int64_t>()(j) = seeds.matrix<std::int64_t>()(i, j);
      random::PhiloxRandom::Key key;
      random::PhiloxRandom::ResultType counter;
      OP_REQUIRES_OK(context, tensorflow::GenerateKey(seed, &key, &counter));
      random::PhiloxRandom generator(counter, key);
      random::UniformDistribution<random::PhiloxRandom, float> uniform;
      float* numbers = out->matrix<float>().data() + i * count;
      for (int j = 0; j < count; j += uniform.kResultElementCount) {
        const auto some = uniform(&generator);
        for (int k = 0; k < std::min(count - j, uniform.kResultElementCount); ++k) numbers[j + k] = some[k];
      }
    }
  }

 private:
  int count;
};

REGISTER_KERNEL_BUILDER(Name("MaeUniform").Device(tensorflow::DEVICE_CPU), Uniform);

// A JPEG without its end is cut short, which a crop from its beginning would not notice.
bool is_whole_jpeg(const tstring& file) {
  const std::size_t size = file.size();
  return size > 4 && !std::memcmp(file.data(), "\xff\xd8\xff", 3) && !std::memcmp(file.data() + size - 2, "\xff\xd9", 2);
}

// (height, width) of each file; (0, 0) of what is no whole JPEG, or of more than MAX_PIXELS.
REGISTER_OP("MaeJpegShapes").Input("files: string").Output("shapes: int32");

void jpeg_shapes(Context* context) {
  const auto files = context->input(0).vec<tstring>();
  Tensor* out = nullptr;
  OP_REQUIRES_OK(context, context->allocate_output(0, {files.size(), 2}, &out));
  auto shapes = out->matrix<int>();
  for (int i = 0; i < files.size(); ++i) {
    int height, width, channels;
    const bool found = is_whole_jpeg(files(i)) &&
                       tensorflow::jpeg::GetImageInfo(files(i).data(), files(i).size(), &width, &height, &channels) &&
                       static_cast<std::int64_t>(height) * width <= MAX_PIXELS;
    shapes(i, 0) = found ? height : 0;
    shapes(i, 1) = found ? width : 0;
  }
}

REGISTER_KERNEL_BUILDER(Name("MaeJpegShapes").Device(tensorflow::DEVICE_CPU), Kernel<jpeg_shapes>);

// Crops [n,repeats] of JPEGs of these `shapes`, resized to `size`: boxes are (top, left, height, width). Where there is
// but one crop of a file, nothing else of it is decoded. What cannot be decoded is black, and not `done`.
REGISTER_OP("MaeJpegCrops")
    .Input("files: string")
    .Input("shapes: int32")
    .Input("boxes: int32")
    .Input("mirrored: bool")
    .Input("size: int32")
    .Output("crops: uint8")
    .Output("done: bool");

void jpeg_crops(Context* context) {
  const auto files = context->input(0).vec<tstring>();
  const auto shapes = context->input(1).matrix<int>();
  const auto boxes = context->input(2).tensor<int, 3>();
  const auto mirrored = context->input(3).matrix<bool>();
  const auto size = context->input(4).vec<int>();
  const int repeats = boxes.dimension(1);
  Tensor *crops = nullptr, *done = nullptr;
  OP_REQUIRES_OK(context, context->allocate_output(0, {files.size(), repeats, size(0), size(1), 3}, &crops));
  OP_REQUIRES_OK(context, context->allocate_output(1, {files.size()}, &done));
  std::uint8_t* out = crops->flat<std::uint8_t>().data();
  const std::size_t bytes = static_cast<std::size_t>(size(0)) * size(1) * 3;
  thread_local std::vector<std::uint8_t> pixels;
  for (int i = 0; i < files.size(); ++i) {
    tensorflow::jpeg::UncompressFlags flags;
    flags.components = 3;
    flags.dct_method = JDCT_IFAST;  // as TensorFlow's own operations
    flags.crop = repeats == 1;
    if (flags.crop) {
      flags.crop_y = boxes(i, 0, 0), flags.crop_x = boxes(i, 0, 1);
      flags.crop_height = boxes(i, 0, 2), flags.crop_width = boxes(i, 0, 3);
    }
    std::size_t stride = 0;
    const auto allocate = [&](int width, int height, int channels) {
      stride = static_cast<std::size_t>(width) * channels;
      pixels.resize(stride * height);
      return pixels.data();
    };
    const bool decoded = shapes(i, 0) > 0 && tensorflow::jpeg::Uncompress(files(i).data(), files(i).size(), flags,
                                                                          nullptr, allocate);
    done->vec<bool>()(i) = decoded;
    for (int j = 0; j < repeats; ++j, out += bytes)
      if (decoded) {
        const std::uint8_t* in = flags.crop ? pixels.data() : &pixels[boxes(i, j, 0) * stride + boxes(i, j, 1) * 3];
        resize(in, stride, boxes(i, j, 2), boxes(i, j, 3), 3, size(0), size(1), mirrored(i, j), out);
      } else {
        std::memset(out, 0, bytes);
      }
  }
}

REGISTER_KERNEL_BUILDER(Name("MaeJpegCrops").Device(tensorflow::DEVICE_CPU), Kernel<jpeg_crops>);

}  // namespace
