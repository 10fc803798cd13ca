// What a transformer's time goes into, for CPUs: float32 products, attention, GELU and LayerNorm. native.py compiles
// this file and says when it is used; ops.py has the same formulas in JAX, and tests/model/test_native.py compares.
//
// Products follow Goto and van de Geijn (2008, "Anatomy of High-Performance Matrix Multiplication"): both factors are
// copied into panels that the innermost loop reads from end to end, and what comes after a product (a bias, the GELU)
// is done to its results while they are still in registers. Every element is the work of one thread, summed in an
// order that depends on the shapes alone, so that results are the same on any number of threads.
//
// All arrays are row-major. M, I, O: rows, inputs, outputs of a product; N, T, H, D: samples, tokens, heads, width.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Index = std::int64_t;

// ---------------------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr Index LANES = 16, ROWS = 12, VECTORS = 2;  // 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr Index LANES = 8, ROWS = 6, VECTORS = 2;  // 12 of 16
#else
constexpr Index LANES = 4, ROWS = 6, VECTORS = 4;  // 24 of 32
#endif
constexpr Index COLUMNS = VECTORS * LANES;

inline Index pieces(Index n, Index unit) { return (n + unit - 1) / unit; }

inline Index rounded_up(Index n, Index unit) { return pieces(n, unit) * unit; }

typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef std::int32_t IntVec __attribute__((vector_size(LANES * sizeof(float))));

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vec load(const float* from, Index count) {
  if (count >= LANES) return load(from);
  Vec v = {};
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline void store(float* to, Vec v, Index count) {
  if (count >= LANES) return store(to, v);
  std::memcpy(to, &v, count * sizeof(float));
}

inline Vec fill(float x) { return Vec{} + x; }

// The first `count` lanes, the others 0.
inline Vec only(Vec v, Index count) {
  for (Index i = std::max<Index>(count, 0); i < LANES; ++i) v[i] = 0;
  return v;
}

template <class Combine>
inline float reduce(Vec v, Combine combine) {
  float lanes[LANES];
  store(lanes, v);
#pragma GCC unroll 4
  for (Index n = LANES / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (Index i = 0; i < n; ++i) lanes[i] = combine(lanes[i], lanes[i + n]);
  return lanes[0];
}

inline float sum(Vec v) {
  return reduce(v, [](float a, float b) { return a + b; });
}

inline float largest(Vec v) {
  return reduce(v, [](float a, float b) { return a > b ? a : b; });
}

// e^x for x <= 0, to 1e-7 of it; 0 below -87. A NaN stays one.
inline Vec exp_of_negative(Vec x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the low bits
  Vec shifted = x * 1.44269504f + magic;
  Vec n = shifted - magic;
  Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2, |r| <= 0.35, in two steps
  Vec p = fill(1.0f / 5040);  // the Taylor series
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  IntVec bits = ((IntVec)shifted + 127) << 23;
  return x < -87.0f ? Vec{} : p * (Vec)bits;
}

// The normal distribution function of x, and its density times sqrt(2 pi). For x > 0, cdf(-x) / exp(-x^2/2) is a
// polynomial in t = 1 / (1 + 0.3 x), fitted to scipy.special.erfcx with a relative error of 4e-9.
struct Normal {
  Vec cdf, bell;
};

inline Normal normal(Vec x) {
  Vec size = x < 0.0f ? -x : x;
  Vec t = 1.0f / (1.0f + 0.3f * size);
  Vec p = fill(-0.0205946946f);
  p = p * t + 0.112273675f;
  p = p * t - 0.2278179f;
  p = p * t + 0.191234581f;
  p = p * t - 0.0789453706f;
  p = p * t + 0.0958877678f;
  p = p * t + 0.0784874442f;
  p = p * t + 0.110213337f;
  p = p * t + 0.119574621f;
  p = p * t + 0.119686537f;
  Vec bell = exp_of_negative(-0.5f * x * x);
  Vec tail = p * t * bell;
  return {x < 0.0f ? tail : 1.0f - tail, bell};
}

// ---------------------------------------------------------------------------------------------------- threads

using Tasks = std::vector<std::function<void()>>;

// Run the tasks on XLA's threads and this one. A thread that comes late finds nothing left to do.
void run(ffi::ThreadPool& pool, Tasks& tasks) {
  struct Progress {
    std::atomic<std::size_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, count = tasks.size(), &tasks] {
    for (std::size_t i; (i = progress->next++) < count; ++progress->done) tasks[i]();
  };
  std::size_t helpers = std::min<std::size_t>(std::max<Index>(pool.num_threads(), 1), tasks.size());
  for (std::size_t i = 1; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  while (progress->done < tasks.size()) std::this_thread::yield();
}

// Memory of this thread, in whole cache lines, kept from one use to the next; `slot` tells apart what is needed at once.
float* scratch(int slot, Index count) {
  struct Kept {
    float* data = nullptr;
    Index size = 0;
    ~Kept() { std::free(data); }
  };
  thread_local Kept kept[5];
  auto& memory = kept[slot];
  if (memory.size < count) {
    std::free(memory.data);
    memory.size = rounded_up(count, 1024);
    memory.data = static_cast<float*>(std::aligned_alloc(64, memory.size * sizeof(float)));
  }
  return memory.data;
}

// --------------------------------------------------------------------------------------------------- products

// A factor of a product, seen from it: `outer` is the stride over its rows (left factor) or columns (right factor),
// `inner` over what is summed. One of the two is 1, so that a transposed factor costs nothing more.
struct Factor {
  const float* data;
  Index outer, inner;

  Factor at(Index o, Index i) const { return {data + o * outer + i * inner, outer, inner}; }
};

template <Index STEP, std::size_t... L>
inline void exchange(Vec& a, Vec& b, std::index_sequence<L...>) {
  Vec low = __builtin_shufflevector(a, b, ((L & STEP) ? L - STEP + LANES : L)...);
  b = __builtin_shufflevector(a, b, ((L & STEP) ? L + LANES : L + STEP)...);
  a = low;
}

template <Index STEP>
inline void transpose(Vec* block) {
  if constexpr (STEP > 0) {
#pragma GCC unroll 16
    for (Index i = 0; i < LANES; ++i)
      if (!(i & STEP)) exchange<STEP>(block[i], block[i + STEP], std::make_index_sequence<LANES>());
    transpose<STEP / 2>(block);
  }
}

// Copy `count` x `depth` of a factor into panels of WIDTH: [count / WIDTH][depth][WIDTH], with zeros at the end.
template <Index WIDTH>
void pack(float* to, Factor from, Index count, Index depth) {
  if (from.outer == 1) {  // rows to cut into pieces, a few at a time: both sides then stay in the cache
    constexpr Index FEW = 8;
    for (Index begin = 0; begin < depth; begin += FEW)
      for (Index o = 0; o < count; o += WIDTH)
        for (Index k = begin; k < std::min(depth, begin + FEW); ++k) {
          float* piece = to + o * depth + k * WIDTH;
          const float* data = from.data + k * from.inner + o;
          if (o + WIDTH <= count) {
            std::memcpy(piece, data, WIDTH * sizeof(float));
          } else {
            std::memset(piece, 0, WIDTH * sizeof(float));
            std::memcpy(piece, data, (count - o) * sizeof(float));
          }
        }
    return;
  }
  for (Index o = 0; o < count; o += WIDTH, to += depth * WIDTH) {
    const Index some = std::min(WIDTH, count - o);
    const float* data = from.data + o * from.outer;
    Index k = 0;
    for (; k + LANES <= depth; k += LANES)
#pragma GCC unroll 4
      for (Index j = 0; j < WIDTH; j += LANES) {
        Vec block[LANES];
#pragma GCC unroll 16
        for (Index i = 0; i < LANES; ++i)
          block[i] = i < WIDTH - j && j + i < some ? load(data + (j + i) * from.outer + k) : Vec{};
        transpose<LANES / 2>(block);
#pragma GCC unroll 16
        for (Index i = 0; i < LANES; ++i) store(to + (k + i) * WIDTH + j, block[i], std::min(LANES, WIDTH - j));
      }
    for (; k < depth; ++k)
      for (Index j = 0; j < WIDTH; ++j) to[k * WIDTH + j] = j < some ? data[j * from.outer + k] : 0.0f;
  }
}

// What is done to a result before it is stored: f(value, row, column, how many of its lanes count) -> value.
struct Nothing {
  Vec operator()(Vec value, Index, Index, Index) const { return value; }
};

// sums[HEIGHT, WIDTH * LANES] = the product of the beginning of a panel b and of HEIGHT rows of a left factor: of a
// panel of it, or of the factor as it is, whose rows are `stride` apart. A function of its own, lest the compiler run
// out of registers: all its time goes here.
template <Index HEIGHT, Index WIDTH, bool PANEL>
__attribute__((noinline)) void multiply_panels(const float* a, Index stride, const float* b, Index depth, float* sums) {
  Vec sum[HEIGHT][WIDTH] = {};
#pragma GCC unroll 4
  for (; depth > 0; --depth, a += PANEL ? ROWS : 1, b += COLUMNS) {
    Vec right[WIDTH];
#pragma GCC unroll 4
    for (Index v = 0; v < WIDTH; ++v) right[v] = load(b + v * LANES);
#pragma GCC unroll 16
    for (Index i = 0; i < HEIGHT; ++i)
#pragma GCC unroll 4
      for (Index v = 0; v < WIDTH; ++v) sum[i][v] += a[i * (PANEL ? 1 : stride)] * right[v];
  }
#pragma GCC unroll 16
  for (Index i = 0; i < HEIGHT; ++i)
#pragma GCC unroll 4
    for (Index v = 0; v < WIDTH; ++v) store(sums + i * COLUMNS + v * LANES, sum[i][v]);
}

// The smallest of a few sizes that gives `rows` x `columns`.
inline void multiply_panels(Index rows, Index columns, const float* a, const float* b, Index depth, float* sums) {
  if (columns > COLUMNS / 2) {
    if (rows > ROWS / 3 * 2) return multiply_panels<ROWS, VECTORS, true>(a, 0, b, depth, sums);
    if (rows > ROWS / 3) return multiply_panels<ROWS / 3 * 2, VECTORS, true>(a, 0, b, depth, sums);
    return multiply_panels<ROWS / 3, VECTORS, true>(a, 0, b, depth, sums);
  }
  if (rows > ROWS / 3) return multiply_panels<ROWS, VECTORS / 2, true>(a, 0, b, depth, sums);
  return multiply_panels<ROWS / 3, VECTORS / 2, true>(a, 0, b, depth, sums);
}

constexpr Index DEPTH = 256;          // of two panels that fit into the L1 cache
constexpr Index STRIP = 4 * COLUMNS;  // of the right factor, packed at a time

// c[rows, columns] = a b, with `stride` from row to row of c; on this thread, in scratch slots 0 and 1. `totals`, if
// any, receive the sums of the columns of b.
template <class Finish>
void multiply(Factor a, Factor b, Index rows, Index columns, Index depth, float* c, Index stride, const Finish& finish,
              float* totals = nullptr) {
  if (depth == 0) {  // nothing to sum
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < columns; j += LANES)
        store(c + i * stride + j, finish(Vec{}, i, j, columns - j), columns - j);
    if (totals) std::fill(totals, totals + columns, 0.0f);
    return;
  }
  float* left = scratch(0, rounded_up(rows, ROWS) * std::min(depth, DEPTH));
  float* strip = scratch(1, STRIP * std::min(depth, DEPTH));
  for (Index k = 0; k < depth; k += DEPTH) {
    const Index some = std::min(DEPTH, depth - k);
    const bool first = k == 0, last = k + some == depth;
    const Index whole = a.inner == 1 && a.outer % 1024 ? rows / ROWS * ROWS : 0;
    pack<ROWS>(left + whole * some, a.at(whole, k), rows - whole, some);
    for (Index j = 0; j < columns; j += COLUMNS) {
      const Index wide = std::min(COLUMNS, columns - j);
      const float* right = strip + j % STRIP * some;
      if (j % STRIP == 0) pack<COLUMNS>(strip, b.at(j, k), std::min(STRIP, columns - j), some);
      for (Index v = 0; totals && v * LANES < wide; ++v) {
        Vec total = {};
        for (Index row = 0; row < some; ++row) total += load(right + row * COLUMNS + v * LANES);
        float* out = totals + j + v * LANES;
        store(out, first ? total : load(out, wide - v * LANES) + total, wide - v * LANES);
      }
      for (Index i = 0; i < rows; i += ROWS) {
        const Index high = std::min(ROWS, rows - i);
        for (Index row = 0; row < high; ++row)  // fetched while the product is computed
          for (Index v = 0; v < VECTORS; ++v) __builtin_prefetch(c + (i + row) * stride + j + v * LANES, 1);
        alignas(64) float sums[ROWS * COLUMNS];
        if (i < whole && wide > COLUMNS / 2)
          multiply_panels<ROWS, VECTORS, false>(a.at(i, k).data, a.outer, right, some, sums);
        else if (i < whole)
          multiply_panels<ROWS, VECTORS / 2, false>(a.at(i, k).data, a.outer, right, some, sums);
        else
          multiply_panels(high, wide, left + i * some, right, some, sums);
        auto give = [&](Index row, Index v, Index count) __attribute__((always_inline)) {
          float* out = c + (i + row) * stride + j + v * LANES;
          Vec value = load(sums + row * COLUMNS + v * LANES);
          if (!first) value += load(out, count);
          if (last) value = finish(value, i + row, j + v * LANES, count);
          store(out, value, count);
        };
        for (Index row = 0; row < high; ++row)
          if (wide == COLUMNS)
#pragma GCC unroll 4
            for (Index v = 0; v < VECTORS; ++v) give(row, v, LANES);
          else
            for (Index v = 0; v * LANES < wide; ++v) give(row, v, wide - v * LANES);
      }
    }
  }
}

// Tasks for c[rows, columns] = a b: tiles whose packed factors fit into the L2 cache, as many for each thread.
template <class Finish = Nothing>
void add_product(Tasks& tasks, Index threads, Factor a, Factor b, Index rows, Index columns, Index depth, float* c,
                 Finish finish = {}, float* totals = nullptr) {
  Index down = pieces(rows, 512), across = pieces(columns, 768);
  while (down * across < 2 * threads || down * across % threads) {
    if (rows / down < 4 * ROWS && columns / across < 4 * COLUMNS) break;
    (rows / down > columns / across ? down : across) += 1;
  }
  const Index high = rounded_up(pieces(rows, down), ROWS), wide = rounded_up(pieces(columns, across), COLUMNS);
  for (Index j = 0; j < columns; j += wide)
    for (Index i = 0; i < rows; i += high)
      tasks.push_back([=] {
        multiply(a.at(i, 0), b.at(j, 0), std::min(high, rows - i), std::min(wide, columns - j), depth,
                 c + i * columns + j, columns, [&](Vec value, Index row, Index column, Index count) {
                   return finish(value, i + row, j + column, count);
                 }, i == 0 && totals ? totals + j : nullptr);
      });
}

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Array>;

inline Index rows_of(const Array& x) { return x.dimensions()[0]; }
inline Index columns_of(const Array& x) { return x.dimensions()[1]; }

// y[M,O] = x[M,I] kernel[I,O]
template <class Finish>
ffi::Error product(ffi::ThreadPool& pool, Array x, Array kernel, Result y, Finish finish) {
  const Index inputs = columns_of(x), outputs = columns_of(kernel);
  Tasks tasks;
  add_product(tasks, pool.num_threads(), {x.typed_data(), inputs, 1}, {kernel.typed_data(), 1, outputs}, rows_of(x),
              outputs, inputs, y->typed_data(), finish);
  run(pool, tasks);
  return ffi::Error::Success();
}

// y[M,O] = x[M,I] kernel[I,O] + bias[O]
ffi::Error linear(ffi::ThreadPool pool, Array x, Array kernel, Array bias, Result y) {
  const float* add = bias.typed_data();
  return product(pool, x, kernel, y,
                 [=](Vec value, Index, Index column, Index count) { return value + load(add + column, count); });
}

// hidden[M,O] = x[M,I] kernel[I,O] + bias[O], active[M,O] = gelu(hidden)
ffi::Error linear_gelu(ffi::ThreadPool pool, Array x, Array kernel, Array bias, Result hidden, Result active) {
  const Index outputs = columns_of(kernel);
  const float* add = bias.typed_data();
  float* out = active->typed_data();
  return product(pool, x, kernel, hidden, [=](Vec value, Index row, Index column, Index count) {
    value += load(add + column, count);
    store(out + row * outputs + column, value * normal(value).cdf, count);
    return value;
  });
}

// dx[M,I] = g[M,O] kernel[I,O]^T
template <class Finish>
ffi::Error transposed_product(ffi::ThreadPool& pool, Array g, Array kernel, Result dx, Finish finish) {
  const Index inputs = rows_of(kernel), outputs = columns_of(g);
  Tasks tasks;
  add_product(tasks, pool.num_threads(), {g.typed_data(), outputs, 1}, {kernel.typed_data(), outputs, 1}, rows_of(g),
              inputs, outputs, dx->typed_data(), finish);
  run(pool, tasks);
  return ffi::Error::Success();
}

// dx[M,I] = g[M,O] kernel[I,O]^T
ffi::Error input_gradient(ffi::ThreadPool pool, Array g, Array kernel, Result dx) {
  return transposed_product(pool, g, kernel, dx, Nothing());
}

// dhidden[M,I] = g[M,O] kernel[I,O]^T * gelu'(hidden), active[M,I] = gelu(hidden)
ffi::Error gelu_gradient(ffi::ThreadPool pool, Array g, Array kernel, Array hidden, Result dhidden, Result active) {
  const Index inputs = rows_of(kernel);
  const float* before = hidden.typed_data();
  float* out = active->typed_data();
  return transposed_product(pool, g, kernel, dhidden, [=](Vec value, Index row, Index column, Index count) {
    const Vec x = load(before + row * inputs + column, count);
    const Normal at = normal(x);
    store(out + row * inputs + column, x * at.cdf, count);
    return value * (at.cdf + x * at.bell * 0.398942280f);
  });
}

// dkernel[I,O] = x[M,I]^T g[M,O], dbias[O] = sum of g over rows
ffi::Error kernel_gradient(ffi::ThreadPool pool, Array x, Array g, Result dkernel, Result dbias) {
  const Index m = rows_of(x), inputs = columns_of(x), outputs = columns_of(g);
  Tasks tasks;
  add_product(tasks, pool.num_threads(), {x.typed_data(), 1, inputs}, {g.typed_data(), 1, outputs}, inputs, outputs, m,
              dkernel->typed_data(), Nothing(), dbias->typed_data());
  run(pool, tasks);
  return ffi::Error::Success();
}

// -------------------------------------------------------------------------------------------------- attention

// One head of one sample: a matrix [T,D] whose rows are `stride` apart.
struct Head {
  float* data;
  Index tokens, stride;

  Factor rows() const { return {data, stride, 1}; }
  Factor columns() const { return {data, 1, stride}; }
};

// Number `task` of the heads of x[N,T,H,D], or of the keys (`part` 0) or values (1) in x[N,T,2,H,D].
Head head_of(const Array& x, Index task, Index part = 0) {
  const auto shape = x.dimensions();
  const Index tokens = shape[1], width = shape.back(), heads = shape[shape.size() - 2];
  const Index all = heads * width, stride = shape.size() == 5 ? 2 * all : all;
  return {x.typed_data() + task / heads * tokens * stride + part * all + task % heads * width, tokens, stride};
}

// Turn `count` scores into exp(scale * (score - the largest)), with zeros up to whole vectors.
struct Softmax {
  float inverse, logsum;  // 1 / sum, and log(sum(exp(scale * score)))
};

inline Softmax softmax(float* scores, Index count, float scale) {
  const Index whole = rounded_up(count, LANES);
  for (Index j = count; j < whole; ++j) scores[j] = -INFINITY;
  Vec most = load(scores), total = {};
  for (Index j = LANES; j < whole; j += LANES) {
    const Vec x = load(scores + j);
    most = x > most ? x : most;
  }
  const float top = largest(most);
  for (Index j = 0; j < whole; j += LANES) {
    const Vec e = exp_of_negative((load(scores + j) - top) * scale);
    store(scores + j, e);
    total += e;
  }
  const float all = sum(total);
  return {1.0f / all, top * scale + std::log(all)};
}

// out[N,Q,H,D] = softmax(q k^T / sqrt(D)) v for q[N,Q,H,D] and the keys and values kv[N,T,2,H,D], and the logarithms of
// the sums of the softmax, [N,H,Q]
ffi::Error attention(ffi::ThreadPool pool, Array q, Array kv, Result out, Result logsum) {
  const Index heads = q.dimensions()[2], width = q.dimensions()[3];
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  Tasks tasks;
  for (Index task = 0; task < rows_of(q) * heads; ++task)
    tasks.push_back([&, task] {
      const Head queries = head_of(q, task), keys = head_of(kv, task, 0), values = head_of(kv, task, 1);
      const Head result = head_of(*out, task);
      const Index m = keys.tokens, n = queries.tokens, stride = rounded_up(m, COLUMNS);
      float *weights = scratch(2, n * stride), *inverses = scratch(3, n);
      multiply(queries.rows(), keys.rows(), n, m, width, weights, stride, Nothing());
      for (Index i = 0; i < n; ++i) {
        const Softmax of = softmax(weights + i * stride, m, scale);
        inverses[i] = of.inverse;
        logsum->typed_data()[task * n + i] = of.logsum;
      }
      multiply({weights, stride, 1}, values.columns(), n, width, m, result.data, result.stride,
               [=](Vec value, Index row, Index, Index) { return value * inverses[row]; });
    });
  run(pool, tasks);
  return ffi::Error::Success();
}

// The gradients of `attention` by q and kv, from the gradient g[N,Q,H,D] of its result.
ffi::Error attention_gradient(ffi::ThreadPool pool, Array q, Array kv, Array out, Array logsum, Array g, Result dq,
                              Result dkv) {
  const Index heads = q.dimensions()[2], width = q.dimensions()[3];
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  Tasks tasks;
  for (Index task = 0; task < rows_of(q) * heads; ++task)
    tasks.push_back([&, task] {
      const Head queries = head_of(q, task), keys = head_of(kv, task, 0), values = head_of(kv, task, 1);
      const Head result = head_of(out, task), from = head_of(g, task);
      const Head to_q = head_of(*dq, task), to_k = head_of(*dkv, task, 0), to_v = head_of(*dkv, task, 1);
      const Index m = keys.tokens, n = queries.tokens, stride = rounded_up(m, COLUMNS);
      float *weights = scratch(2, n * stride), *dscores = scratch(3, n * stride), *inner = scratch(4, n);
      for (Index i = 0; i < n; ++i) {  // sum over keys of weights * dweights = result . g
        Vec total = {};
        for (Index j = 0; j < width; j += LANES)
          total += load(result.data + i * result.stride + j, width - j) * load(from.data + i * from.stride + j, width - j);
        inner[i] = sum(total);
      }
      const float* logsums = logsum.typed_data() + task * n;
      multiply(queries.rows(), keys.rows(), n, m, width, weights, stride, [=](Vec value, Index row, Index, Index) {
        const Vec x = value * scale - logsums[row];
        return exp_of_negative(x > 0.0f ? Vec{} : x);  // above 0 by rounding alone
      });
      multiply(from.rows(), values.rows(), n, m, width, dscores, stride,
               [=](Vec value, Index row, Index column, Index) {
                 return load(weights + row * stride + column) * (value - inner[row]) * scale;
               });
      multiply({dscores, stride, 1}, keys.columns(), n, width, m, to_q.data, to_q.stride, Nothing());
      multiply({dscores, 1, stride}, queries.columns(), m, width, n, to_k.data, to_k.stride, Nothing());
      multiply({weights, 1, stride}, from.columns(), m, width, n, to_v.data, to_v.stride, Nothing());
    });
  run(pool, tasks);
  return ffi::Error::Success();
}

// -------------------------------------------------------------------------------------------------- LayerNorm

constexpr Index BLOCK = 64;  // rows of one task

// y[M,D] = (x - mean) * inverse * scale[D] + bias[D], with mean[M] and inverse[M] = 1 / sqrt(variance + epsilon)
ffi::Error layer_norm(ffi::ThreadPool pool, Array x, Array scale, Array bias, float epsilon, Result y, Result mean,
                      Result inverse) {
  const Index m = rows_of(x), width = columns_of(x);
  Tasks tasks;
  for (Index begin = 0; begin < m; begin += BLOCK)
    tasks.push_back([&, begin] {
      for (Index i = begin; i < std::min(m, begin + BLOCK); ++i) {
        const float* row = x.typed_data() + i * width;
        float* out = y->typed_data() + i * width;
        Vec total = {}, squares = {};
        for (Index j = 0; j < width; j += LANES) total += load(row + j, width - j);
        const float middle = sum(total) / width;
        for (Index j = 0; j < width; j += LANES) {
          Vec centred = load(row + j, width - j) - middle;
          if (j + LANES > width) centred = only(centred, width - j);
          squares += centred * centred;
        }
        const float factor = 1.0f / std::sqrt(sum(squares) / width + epsilon);
        for (Index j = 0; j < width; j += LANES) {
          const Vec normal = (load(row + j, width - j) - middle) * factor;
          const Vec a = load(scale.typed_data() + j, width - j), b = load(bias.typed_data() + j, width - j);
          store(out + j, normal * a + b, width - j);
        }
        mean->typed_data()[i] = middle;
        inverse->typed_data()[i] = factor;
      }
    });
  run(pool, tasks);
  return ffi::Error::Success();
}

// The gradients of `layer_norm` by x, scale and bias, from the gradient g[M,D] of y.
ffi::Error layer_norm_gradient(ffi::ThreadPool pool, Array x, Array scale, Array mean, Array inverse, Array g,
                               Result dx, Result dscale, Result dbias) {
  const Index m = rows_of(x), width = columns_of(x), padded = rounded_up(width, LANES);
  std::vector<float> blocks(rounded_up(m, BLOCK) / BLOCK * 2 * padded);  // sums over the rows of each block
  Tasks tasks;
  for (Index begin = 0; begin < m; begin += BLOCK)
    tasks.push_back([&, begin] {
      float *scales = blocks.data() + begin / BLOCK * 2 * padded, *biases = scales + padded;
      for (Index i = begin; i < std::min(m, begin + BLOCK); ++i) {
        const float *row = x.typed_data() + i * width, *from = g.typed_data() + i * width;
        const float middle = mean.typed_data()[i], factor = inverse.typed_data()[i];
        Vec sums = {}, products = {};
        for (Index j = 0; j < width; j += LANES) {  // past the end, g and so its products are 0
          const Vec gradient = load(from + j, width - j), normal = (load(row + j, width - j) - middle) * factor;
          const Vec scaled = gradient * load(scale.typed_data() + j, width - j);
          sums += scaled;
          products += scaled * normal;
          store(scales + j, load(scales + j) + gradient * normal);
          store(biases + j, load(biases + j) + gradient);
        }
        const float a = sum(sums) / width, b = sum(products) / width;
        for (Index j = 0; j < width; j += LANES) {
          const Vec gradient = load(from + j, width - j), normal = (load(row + j, width - j) - middle) * factor;
          const Vec scaled = gradient * load(scale.typed_data() + j, width - j);
          store(dx->typed_data() + i * width + j, factor * (scaled - a - normal * b), width - j);
        }
      }
    });
  run(pool, tasks);
  for (Index j = 0; j < width; j += LANES) {
    Vec scales = {}, biases = {};
    for (std::size_t at = j; at < blocks.size(); at += 2 * padded) {
      scales += load(blocks.data() + at);
      biases += load(blocks.data() + at + padded);
    }
    store(dscale->typed_data() + j, scales, width - j);
    store(dbias->typed_data() + j, biases, width - j);
  }
  return ffi::Error::Success();
}

}  // namespace

// ---------------------------------------------------------------------------------------------- what JAX calls

#define FUNCTION(name, ...) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(mae_##name, name, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() __VA_ARGS__)
#define TAKES .Arg<Array>()
#define GIVES .Ret<Array>()

FUNCTION(linear, TAKES TAKES TAKES GIVES);
FUNCTION(linear_gelu, TAKES TAKES TAKES GIVES GIVES);
FUNCTION(input_gradient, TAKES TAKES GIVES);
FUNCTION(gelu_gradient, TAKES TAKES TAKES GIVES GIVES);
FUNCTION(kernel_gradient, TAKES TAKES GIVES GIVES);
FUNCTION(attention, TAKES TAKES GIVES GIVES);
FUNCTION(attention_gradient, TAKES TAKES TAKES TAKES TAKES GIVES GIVES);
FUNCTION(layer_norm, TAKES TAKES TAKES.Attr<float>("epsilon") GIVES GIVES GIVES);
FUNCTION(layer_norm_gradient, TAKES TAKES TAKES TAKES TAKES GIVES GIVES GIVES);
