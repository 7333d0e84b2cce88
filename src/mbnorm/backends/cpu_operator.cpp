// Each tensor is read from main memory as few times as its size allows.
//
// Channels first: a chunk of channels at a time, so that the second pass over it finds it in cache.
// Channels last: fixed chunks of rows, whose partial sums are combined in order; of few rows, chunks of
// channels. How the work is cut depends on sizes alone, so the results do not depend on the number of
// threads.

#include "cpu_operator.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>

#include "cpu_blend.h"
#include "cpu_parallel.h"
#include "cpu_tensors.h"

namespace mbnorm {
namespace {

constexpr int64_t FIRST_CHUNK_BYTES = 16 << 10;  // channels first: a chunk stays in L1 if it can
constexpr int64_t LAST_CHUNK = 128;              // channels last: channels of a chunk of all rows
constexpr int64_t FEW_ROWS = TILE_ROWS;          // channels last: up to so many rows are not cut
constexpr int64_t ROW_CHUNK_VALUES = 64 << 10;   // channels last: values of a chunk of whole rows
constexpr int64_t GRAIN = 16 << 10;              // fewest values worth a thread

// Before a loop of which no iteration reads what another has written.
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

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
  parallel_chunks(rows, chunk, 1, channels, [&](int64_t r0, int64_t r1) {
    sum({0, channels, r0, r1}, sums_of(r0));
  });
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

template <class A>
inline void write_blended(int64_t c, double batch_mean, double batch_var, bool uncentered, const Blend& blend,
                          const Record<A>& out) {
  if (uncentered) {
    batch_var += batch_mean * batch_mean;
    batch_mean = 0;
  }
  out.batch_mean[c] = batch_mean;
  out.batch_var[c] = batch_var;
  out.mean[c] = blend.mean(batch_mean, out.past_mean[c]);
  out.var[c] = blend.var(batch_mean, batch_var, out.past_mean[c], out.past_var[c]);
}

int64_t bytes(Type type) { return type == Type::Double ? 8 : type == Type::Float ? 4 : 2; }

}  // namespace

// Not inlined into the operators: g++ does not vectorize its loops there.
template <class A>
[[gnu::noinline]] void forward(const Layout& at, Type type, const void* x, void* y, const A* weight,
                               const A* bias, Rule rule, double eps, const Record<A>& record) {
  const Kernels<A>& run = kernels<A>(type, at);
  std::unique_ptr<A[]> coefficients(new A[2 * at.channels]);
  A *scale = coefficients.get(), *shift = scale + at.channels;
  const double n = at.rows();
  const Blend blend(*record.weight, rule);
  const bool uncentered = rule == Rule::Uncentered;
  two_passes<Moments>(
      at, bytes(type), [&](const Range& range, const Moments& sums) { run.moments(at, range, x, sums); },
      [&](int64_t c0, int64_t c1, const Moments& sums) {
        INDEPENDENT
        for (int64_t c = c0; c < c1; ++c) {
          const double offset = sums.sum[c] / n, rest = sums.square[c] / n - offset * offset;
          write_blended(c, sums.shift[c] + offset, rest < 0 ? 0 : rest, uncentered, blend, record);
          scale[c] = (weight ? weight[c] : 1) / std::sqrt(record.var[c] + eps);
          shift[c] = bias ? bias[c] : 0;
        }
      },
      [&](const Range& range) { run.normalize(at, range, x, y, record.mean, scale, shift); });
}

template <class A>
[[gnu::noinline]] void backward(const Layout& at, Type type, const void* dy, const void* x, void* dx,
                                const A* weight, const Record<A>& record, const A* past, Rule rule,
                                double eps, A* dw, A* db) {
  const Kernels<A>& run = kernels<A>(type, at);
  std::unique_ptr<A[]> coefficients(new A[3 * at.channels]);
  A *scale = coefficients.get(), *slope = scale + at.channels, *offset = slope + at.channels;
  const double weight_of_batch = past ? past[2 * at.channels] : *record.weight;
  const double share = weight_of_batch / double(at.rows()), history = past ? 1 - weight_of_batch : 0;
  const bool uncentered = rule == Rule::Uncentered;
  const std::unique_ptr<A[]> nothing(past ? nullptr : new A[2 * at.channels]());
  const A *past_mean = past ? past : nothing.get(), *past_scale = past_mean + at.channels;
  two_passes<Products>(
      at, bytes(type),
      [&](const Range& range, const Products& sums) { run.products(at, range, dy, x, record.mean, sums); },
      [&](int64_t c0, int64_t c1, const Products& sums) {
        INDEPENDENT
        for (int64_t c = c0; c < c1; ++c) {
          const double rstd = 1 / std::sqrt(record.var[c] + eps);
          dw[c] = sums.product[c] * rstd;
          db[c] = sums.sum[c];
          scale[c] = (weight ? weight[c] : 1) * rstd;
          slope[c] = -rstd * (share * rstd * sums.product[c] + history * past_scale[c]);
          offset[c] = uncentered ? 0 : -share * sums.sum[c] - history * past_mean[c];
        }
      },
      [&](const Range& range) {
        const A* center = rule == Rule::Pooled ? record.mean : record.batch_mean;
        if (dx) run.differentiate(at, range, dy, x, dx, center, scale, slope, offset);
      });
}

template <class A>
void blend_sums(const double* sums, Rule rule, const Record<A>& record) {
  const int64_t channels = record.channels;
  const double n = sums[2 * channels];
  const Blend blend(*record.weight, rule);
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = sums[c] / n, var = sums[channels + c] / n - mean * mean;
    // a comparison that is false for NaN
    write_blended(c, mean, var < 0 ? 0 : var, rule == Rule::Uncentered, blend, record);
  }
}

template void forward(const Layout&, Type, const void*, void*, const float*, const float*, Rule, double,
                      const Record<float>&);
template void forward(const Layout&, Type, const void*, void*, const double*, const double*, Rule, double,
                      const Record<double>&);
template void blend_sums(const double*, Rule, const Record<float>&);
template void blend_sums(const double*, Rule, const Record<double>&);

namespace {

// Copy a past given by tensors into a record, blend the batch with it, and normalize.
std::tuple<Tensor, Tensor> forward_op(const Tensor& x, const Optional& weight, const Optional& bias,
                                      const Tensor& past_mean, const Tensor& past_var,
                                      const Tensor& batch_weight, int64_t rule, double eps) {
  const Tensor source = walkable(x), y = like(source);
  const Layout at = layout_of(source);
  const int64_t C = at.channels;
  const Tensor record = matrix(Record<float>::ROWS, C, past_mean);
  dispatch(source, [&]<class A>(A, Type type) {
    const Values<A> w(weight, C), b(bias, C), mean(past_mean, C), var(past_var, C), a(batch_weight, 1);
    const Record<A> rows(data<A>(record), C);
    std::copy_n(mean.p, C, rows.past_mean);
    std::copy_n(var.p, C, rows.past_var);
    std::fill_n(rows.weight, C, *a.p);
    forward<A>(at, type, source.data_ptr(), y.data_ptr(), w.p, b.p, Rule(rule), eps, rows);
  });
  return {restored(y, source, x), record};
}

// dx is empty if it is not needed.
std::tuple<Tensor, Tensor, Tensor> backward_op(const Tensor& dy, const Tensor& x, const Optional& weight,
                                               const Tensor& record, const Optional& past, int64_t rule,
                                               double eps, bool need_dx) {
  STD_TORCH_CHECK(dy.dim() == x.dim() && dy.numel() == x.numel(), "expected a gradient of the shape of x");
  const Tensor source = walkable(x), g = arranged(dy, source), dx = need_dx ? like(source) : vector(0, x);
  const Layout at = layout_of(source);
  const int64_t C = at.channels;
  const Tensor dw = vector(C, record), db = vector(C, record);
  dispatch(source, [&]<class A>(A, Type type) {
    const Values<A> w(weight, C), saved(record, Record<A>::ROWS * C), remembered(past, 3 * C);
    const Record<A> rows(data<A>(*saved.held), C);
    backward<A>(at, type, g.data_ptr(), source.data_ptr(), need_dx ? dx.data_ptr() : nullptr, w.p, rows,
                remembered.p, Rule(rule), eps, data<A>(dw), data<A>(db));
  });
  return {need_dx ? restored(dx, source, x) : dx, dw, db};
}

// Do so with the past that `mean` and `scale` are, write it into the fourth result, and, if `store`, replace
// the two by their blend with the batch's, if all of that is finite, and so are the batch's statistics.
std::tuple<Tensor, Tensor, Tensor, Tensor> remembering_backward_op(const Tensor& dy, const Tensor& x,
                                                                   const Optional& weight,
                                                                   const Tensor& record, const Tensor& mean,
                                                                   const Tensor& scale, int64_t rule,
                                                                   double eps, bool need_dx, bool store) {
  const int64_t C = x.size(1), n = x.numel() / C;
  const Tensor past = matrix(3, C, record);
  const auto each_type = [&](const auto& f) {
    mean.scalar_type() == ScalarType::Double ? f(double()) : f(float());
  };
  each_type([&]<class A>(A) {
    A* read = data<A>(past);
    std::copy_n(state<A>(mean, C), C, read);
    std::copy_n(state<A>(scale, C), C, read + C);
    const A* weights = state<A>(record, Record<A>::ROWS * C) + 6 * C;
    std::fill_n(read + 2 * C, C, A(weight_in_gradient(*weights)));
  });
  const auto found = backward_op(dy, x, weight, record, past, rule, eps, need_dx);
  // not by structured bindings, which clang++ keeps out of lambdas
  const Tensor &dw = std::get<1>(found), &db = std::get<2>(found);
  if (store)
    each_type([&]<class A>(A) {
      const A *read = data<A>(past), *sums[] = {data<A>(db), data<A>(dw)};
      std::unique_ptr<A[]> blended(new A[2 * C]);
      const double share = read[2 * C] / double(n), history = 1 - double(read[2 * C]);
      for (int which = 0; which < 2; ++which)
        for (int64_t c = 0; c < C; ++c)
          blended[which * C + c] = share * sums[which][c] + history * read[which * C + c];
      if (!all_finite(blended.get(), 2 * C) || !all_finite(state<A>(record, Record<A>::ROWS * C), 4 * C))
        return;
      std::copy_n(blended.get(), C, data<A>(mean));
      std::copy_n(blended.get() + C, C, data<A>(scale));
    });
  return {std::get<0>(found), dw, db, past};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mbnorm_cpu, m) {
  m.def(
      "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor past_mean, Tensor past_var, "
      "Tensor batch_weight, int rule, float eps) -> (Tensor y, Tensor record)");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? weight, Tensor record, Tensor? past, int rule, float eps, "
      "bool need_dx) -> (Tensor dx, Tensor dw, Tensor db)");
  m.def(
      "remembering_backward(Tensor dy, Tensor x, Tensor? weight, Tensor record, Tensor(a!) mean, "
      "Tensor(b!) scale, int rule, float eps, bool need_dx, bool store) -> "
      "(Tensor dx, Tensor dw, Tensor db, Tensor past)");
}

STABLE_TORCH_LIBRARY_IMPL(mbnorm_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward_op));
  m.impl("backward", TORCH_BOX(&backward_op));
  m.impl("remembering_backward", TORCH_BOX(&remembering_backward_op));
}

}  // namespace mbnorm
