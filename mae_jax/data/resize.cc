// Antialiased bicubic resizing of 8-bit images, pixel for pixel as Pillow does it up to version 12 (Image.resize with
// BICUBIC), which is what the original code's torchvision calls. A TensorFlow operation, so that it runs on all cores;
// augment.py compiles this file, and goes to Pillow where that fails.
//
// First along rows, then along columns. The weights of an output pixel are those of Keys' cubic (1981, a = -0.5),
// stretched over the pixels it shrinks, as whole numbers of 22 binary places; each pass rounds to 8 bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace {

constexpr int PLACES = 22, HALF = 11;

double cubic(double x) {
  x = std::abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

// Of which input pixels each output pixel is made: `used` of them, from `first` on. The weights are kept in two halves,
// upper and lower binary places, whose products with pixels and their sums are whole numbers that a float holds exactly.
struct Taps {
  int most;
  std::vector<int> first, used;
  std::vector<float> upper, lower;  // [to][most]

  Taps(int from, int to, bool mirrored) : first(to), used(to) {
    const double scale = static_cast<double>(from) / to, stretch = std::max(scale, 1.0), support = 2 * stretch;
    most = static_cast<int>(std::ceil(support)) * 2 + 1;
    upper.resize(static_cast<std::size_t>(to) * most);
    lower.resize(upper.size());
    std::vector<double> exact(most);
    for (int i = 0; i < to; ++i) {
      const int out = mirrored ? to - 1 - i : i;
      const double centre = (i + 0.5) * scale;
      first[out] = std::max(static_cast<int>(centre - support + 0.5), 0);
      used[out] = std::min(static_cast<int>(centre + support + 0.5), from) - first[out];
      double sum = 0;
      for (int k = 0; k < used[out]; ++k) sum += exact[k] = cubic((k + first[out] - centre + 0.5) / stretch);
      for (int k = 0; k < used[out]; ++k) {
        const int weight = static_cast<int>(std::lround(exact[k] / sum * (1 << PLACES)));
        const std::size_t at = static_cast<std::size_t>(out) * most + k;
        upper[at] = weight >> HALF;
        lower[at] = weight & ((1 << HALF) - 1);
      }
    }
  }
};

// `count` output pixels side by side, each from input pixels `distance` apart.
template <int COUNT>
inline void weigh(const std::uint8_t* in, int distance, const float* upper, const float* lower, int used,
                  std::uint8_t* out, int count = COUNT) {
  constexpr int EXACT = 32;  // products of 8 and 11 binary places, of which a float holds the sum of so many
  int sums[COUNT];
  for (int& sum : sums) sum = 1 << (PLACES - 1);
  for (int begin = 0; begin < used; begin += EXACT) {
    float high[COUNT] = {}, low[COUNT] = {};
    for (int k = begin; k < std::min(used, begin + EXACT); ++k, in += distance)
      for (int x = 0; x < count; ++x) {
        const float pixel = in[x];
        high[x] += pixel * upper[k];
        low[x] += pixel * lower[k];
      }
    for (int x = 0; x < count; ++x) sums[x] += static_cast<int>(high[x]) * (1 << HALF) + static_cast<int>(low[x]);
  }
  for (int x = 0; x < count; ++x) out[x] = std::clamp(sums[x] >> PLACES, 0, 255);
}

// Resize in[from * channels][row] to out[to * channels][row]: pixels lie along the columns, `channels` rows each.
void along_columns(const std::uint8_t* in, int row, int channels, const Taps& taps, std::uint8_t* out) {
  constexpr int BLOCK = 64;
  for (std::size_t i = 0; i < taps.first.size(); ++i)
    for (int c = 0; c < channels; ++c, out += row) {
      const std::uint8_t* data = in + (static_cast<std::size_t>(taps.first[i]) * channels + c) * row;
      const float *upper = taps.upper.data() + i * taps.most, *lower = taps.lower.data() + i * taps.most;
      if (row < BLOCK) weigh<BLOCK>(data, channels * row, upper, lower, taps.used[i], out, row);
      for (int x = 0; row >= BLOCK && x < row; x += BLOCK) {
        const int begin = std::min(x, row - BLOCK);  // the last block overlaps the one before
        weigh<BLOCK>(data + begin, channels * row, upper, lower, taps.used[i], out + begin);
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

// in[rows][columns] to out[columns][rows]
void transpose(const std::uint8_t* in, std::size_t rows, std::size_t columns, std::uint8_t* out) {
  for (std::size_t i = 0; i < rows; i += SIDE)
    for (std::size_t j = 0; j < columns; j += SIDE)
      if (i + SIDE <= rows && j + SIDE <= columns) {
        Bytes block[SIDE];
#pragma GCC unroll 16
        for (int k = 0; k < SIDE; ++k) std::memcpy(&block[k], in + (i + k) * columns + j, SIDE);
        transpose_block<SIDE / 2>(block);
#pragma GCC unroll 16
        for (int k = 0; k < SIDE; ++k) std::memcpy(out + (j + k) * rows + i, &block[k], SIDE);
      } else {
        for (std::size_t y = i; y < std::min(rows, i + SIDE); ++y)
          for (std::size_t x = j; x < std::min(columns, j + SIDE); ++x) out[x * rows + y] = in[y * columns + x];
      }
}

// in[height, width, channels] to out[high, wide, channels], mirrored left to right or not.
void resize(const std::uint8_t* in, int height, int width, int channels, int high, int wide, bool mirrored,
            std::uint8_t* out) {
  thread_local std::vector<std::uint8_t> tall, turned, between;
  tall.resize(static_cast<std::size_t>(height) * width * channels);
  turned.resize(static_cast<std::size_t>(height) * wide * channels);
  between.resize(turned.size());
  transpose(in, height, static_cast<std::size_t>(width) * channels, tall.data());
  along_columns(tall.data(), height, channels, Taps(width, wide, mirrored), turned.data());
  transpose(turned.data(), static_cast<std::size_t>(wide) * channels, height, between.data());
  along_columns(between.data(), wide * channels, 1, Taps(height, high, false), out);
}

REGISTER_OP("MaeResize").Input("image: uint8").Input("size: int32").Input("mirrored: bool").Output("resized: uint8");

class Resize : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tensorflow::OpKernelContext* context) override {
    const auto& image = context->input(0);
    OP_REQUIRES(context, image.dims() == 3 && image.NumElements() > 0,
                tensorflow::errors::InvalidArgument("no image: ", image.shape().DebugString()));
    const auto size = context->input(1).flat<int>();
    tensorflow::Tensor* out = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {size(0), size(1), image.dim_size(2)}, &out));
    resize(image.flat<std::uint8_t>().data(), image.dim_size(0), image.dim_size(1), image.dim_size(2), size(0), size(1),
           context->input(2).scalar<bool>()(), out->flat<std::uint8_t>().data());
  }
};

REGISTER_KERNEL_BUILDER(Name("MaeResize").Device(tensorflow::DEVICE_CPU), Resize);

}  // namespace
