// Each tensor is read from main memory as few times as its size allows.
//
// Channels first: a chunk of channels at a time, so that the second pass over it finds it in cache.
// Channels last: fixed chunks of rows, whose partial sums are combined in order; of few rows, chunks of
// channels. How the work is cut depends on sizes alone, never on the number
// of threads, so neither do the results.

#include "cpu_operator.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu_parallel.h"

namespace mbnorm {
namespace {

constexpr int64_t FIRST_CHUNK_BYTES = 16 << 10;  // channels first: a chunk stays in L1 if it can
constexpr int64_t LAST_CHUNK = 128;              // channels last: channels of a chunk of all rows
constexpr int64_t FEW_ROWS = TILE_ROWS;          // channels last: up to so many rows are not cut
constexpr int64_t ROW_CHUNK_VALUES = 64 << 10;   // channels last: values of a chunk of whole rows
constexpr int64_t GRAIN = 16 << 10;              // fewest values worth a thread

// Call f(first, last) on chunks of `size` out of [0, n), in parallel; what is left of n joins the last one if
// it is shorter than `least`.
template <class F>
void parallel_chunks(int64_t n, int64_t size, int64_t least, int64_t values_per_item, const F& f) {
  int64_t chunks = ceil_div(n, size);
  if (chunks > 1 && n - (chunks - 1) * size < least) --chunks;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (size * values_per_item));
  parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * size, i + 1 == chunks ? n : (i + 1) * size);
  });
}

// Run sum(range, sums), then finish(c0, c1, sums), then map(range) over the whole tensor.
template <class Sums, class Sum, class Finish, class Map>
void two_passes(const Layout& at, int64_t value_bytes, const Sum& sum, const Finish& finish, const Map& map) {
  const int64_t rows = at.rows(), channels = at.channels;
  if (!at.channels_last || rows <= FEW_ROWS) {
    const int64_t first_chunk = std::max<int64_t>(1, FIRST_CHUNK_BYTES / (value_bytes * rows));
    std::unique_ptr<double[]> numbers(new double[Sums::NUMBERS * channels]);
    const Sums sums(numbers.get(), channels);
    parallel_chunks(channels, at.channels_last ? LAST_CHUNK : first_chunk,
                    at.channels_last ? LAST_CHUNK / 2 : 1, rows, [&](int64_t c0, int64_t c1) {
                      const Range range{c0, c1, 0, rows};
                      sum(range, sums);
                      finish(c0, c1, sums);
                      map(range);
                    });
    return;
  }
  const int64_t chunk = std::max<int64_t>(1, ROW_CHUNK_VALUES / (channels * TILE_ROWS)) * TILE_ROWS;
  const int64_t chunks = ceil_div(rows, chunk), numbers_each = Sums::NUMBERS * channels;
  std::unique_ptr<double[]> numbers(new double[chunks * numbers_each]);
  const auto sums_of = [&](int64_t r0) { return Sums(numbers.get() + r0 / chunk * numbers_each, channels); };
  parallel_chunks(rows, chunk, 1, channels,
                  [&](int64_t r0, int64_t r1) { sum({0, channels, r0, r1}, sums_of(r0)); });
  const Sums sums = sums_of(0);
  for (int64_t r0 = chunk; r0 < rows; r0 += chunk) {
    const Sums more = sums_of(r0);
    for (int64_t c = 0; c < channels; ++c) sums.add(c, std::min(chunk, rows - r0), more);
  }
  finish(0, channels, sums);
  parallel_chunks(rows, chunk, 1, channels, [&](int64_t r0, int64_t r1) { map({0, channels, r0, r1}); });
}

template <class A>
const Kernels<A>& kernels(Type type, const Layout& at) {
  if constexpr (sizeof(A) == 8)
    return double_kernels(at);
  else
    return float_kernels(type, at);
}

// The law of mixing. Its numbers are copies: a loop that reads them from elsewhere is not vectorized.
struct Blend {
  double a, between;

  explicit Blend(const Rule& rule)
      : a(rule.batch_weight), between(rule.pooled ? rule.batch_weight * (1 - rule.batch_weight) : 0) {}

  template <class A>
  void operator()(int64_t c, double batch_mean, double batch_var, const Past<A>& past,
                  const Statistics<A>& out) const {
    const double distance = batch_mean - past.mean[c];
    out.batch_mean[c] = batch_mean;
    out.batch_var[c] = batch_var;
    out.mean[c] = a * batch_mean + (1 - a) * past.mean[c];
    out.var[c] = a * batch_var + (1 - a) * past.var[c] + between * distance * distance;
  }
};

int64_t bytes(Type type) {
  return type == Type::Double ? 8 : type == Type::Float ? 4 : 2;
}

}  // namespace

template <class A>
void forward(const Layout& at, Type type, const void* x, void* y, const Affine<A>& affine,
             const Past<A>& past, const Rule& rule, const Statistics<A>& out) {
  const Kernels<A>& run = kernels<A>(type, at);
  std::unique_ptr<A[]> coefficients(new A[2 * at.channels]);
  A *scale = coefficients.get(), *bias = scale + at.channels;
  const double n = at.rows();
  const Blend blend(rule);
  two_passes<Moments>(
      at, bytes(type), [&](const Range& range, const Moments& sums) { run.moments(at, range, x, sums); },
      [&](int64_t c0, int64_t c1, const Moments& sums) {
#pragma GCC ivdep
        for (int64_t c = c0; c < c1; ++c) {
          const double offset = sums.sum[c] / n, rest = sums.square[c] / n - offset * offset;
          blend(c, sums.shift[c] + offset, rest < 0 ? 0 : rest, past, out);
          scale[c] = (affine.weight ? affine.weight[c] : 1) / std::sqrt(out.var[c] + rule.eps);
          bias[c] = affine.bias ? affine.bias[c] : 0;
        }
      },
      [&](const Range& range) { run.normalize(at, range, x, y, out.mean, scale, bias); });
}

template <class A>
void backward(const Layout& at, Type type, const void* g, const void* x, void* dx, const A* weight,
              const Statistics<A>& saved, const Rule& rule, A* dw, A* db) {
  const Kernels<A>& run = kernels<A>(type, at);
  std::unique_ptr<A[]> coefficients(new A[3 * at.channels]);
  A *scale = coefficients.get(), *slope = scale + at.channels, *offset = slope + at.channels;
  const double share = rule.batch_weight / at.rows();
  two_passes<Products>(
      at, bytes(type),
      [&](const Range& range, const Products& sums) { run.products(at, range, g, x, saved.mean, sums); },
      [&](int64_t c0, int64_t c1, const Products& sums) {
#pragma GCC ivdep
        for (int64_t c = c0; c < c1; ++c) {
          const double rstd = 1 / std::sqrt(saved.var[c] + rule.eps);
          dw[c] = sums.product[c] * rstd;
          db[c] = sums.sum[c];
          scale[c] = (weight ? weight[c] : 1) * rstd;
          slope[c] = -share * rstd * rstd * sums.product[c];
          offset[c] = -share * sums.sum[c];
        }
      },
      [&](const Range& range) {
        const A* center = rule.pooled ? saved.mean : saved.batch_mean;
        if (dx) run.differentiate(at, range, g, x, dx, center, scale, slope, offset);
      });
}

template <class A>
void pool(const double* sums, int64_t channels, const Past<A>& past, const Rule& rule, const Statistics<A>& out) {
  const double n = sums[2 * channels];
  const Blend blend(rule);
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = sums[c] / n, var = sums[channels + c] / n - mean * mean;
    // a comparison that is false for NaN
    blend(c, mean, var < 0 ? 0 : var, past, out);
  }
}

template void pool(const double*, int64_t, const Past<float>&, const Rule&, const Statistics<float>&);
template void pool(const double*, int64_t, const Past<double>&, const Rule&, const Statistics<double>&);
template void forward(const Layout&, Type, const void*, void*, const Affine<float>&, const Past<float>&,
                      const Rule&, const Statistics<float>&);
template void forward(const Layout&, Type, const void*, void*, const Affine<double>&, const Past<double>&,
                      const Rule&, const Statistics<double>&);
template void backward(const Layout&, Type, const void*, const void*, void*, const float*,
                       const Statistics<float>&, const Rule&, float*, float*);
template void backward(const Layout&, Type, const void*, const void*, void*, const double*,
                       const Statistics<double>&, const Rule&, double*, double*);

}  // namespace mbnorm
