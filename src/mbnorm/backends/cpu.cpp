// The operator on the CPU, each tensor read from main memory as few times as its size allows.
//
// Channels first: a chunk of channels at a time, so that the second pass over it finds it in cache.
// Channels last: likewise where all rows of a few channels fit in cache; otherwise fixed chunks of rows,
// whose partial sums are combined in order. How the work is cut depends on sizes alone, never on the number
// of threads, so neither do the results.

#include "cpu_kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>

namespace {

using namespace mbnorm;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t FIRST_CHUNK_BYTES = 16 << 10;  // channels first: a chunk stays in L1 if it can
constexpr int64_t LAST_CHUNK = 128;              // channels last: channels of a chunk
constexpr int64_t CACHED_ROWS = 512;             // channels last: up to so many rows of a chunk stay in L2
constexpr int64_t ROW_CHUNK_VALUES = 64 << 10;   // channels last: values of a chunk of whole rows
constexpr int64_t GRAIN = 16 << 10;              // fewest values worth a thread

// ---- the two directions ----

// Call f(first, last) on chunks of `size` out of [0, n), in parallel; what is left of n joins the last one if
// it is shorter than `least`.
template <class F>
void parallel_chunks(int64_t n, int64_t size, int64_t least, int64_t values_per_item, const F& f) {
  int64_t chunks = ceil_div(n, size);
  if (chunks > 1 && n - (chunks - 1) * size < least) --chunks;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (size * values_per_item));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * size, i + 1 == chunks ? n : (i + 1) * size);
  });
}

// Run sum(range, sums), then finish(c0, c1, sums), then map(range) over the whole tensor.
template <class Sums, class Sum, class Finish, class Map>
void two_passes(const Layout& at, int64_t value_bytes, const Sum& sum, const Finish& finish, const Map& map) {
  const int64_t rows = at.rows(), channels = at.channels;
  if (!at.channels_last || rows <= CACHED_ROWS) {
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

// What the statistics are blended with and how; weight and bias may be null.
template <class A>
struct Blend {
  const A *weight, *bias, *mean, *var;
  double batch_weight, eps;
  bool pooled;
};

template <class A>
struct Statistics {
  A *batch_mean, *batch_var, *mean, *var;
};

template <class A>
void forward(const Layout& at, int64_t value_bytes, const Kernels<A>& run, const void* x, void* y,
             const Blend<A>& past, const Statistics<A>& out) {
  std::unique_ptr<A[]> coefficients(new A[2 * at.channels]);
  A *scale = coefficients.get(), *bias = scale + at.channels;
  const double n = at.rows(), a = past.batch_weight, between = past.pooled ? a * (1 - a) : 0;
  two_passes<Moments>(
      at, value_bytes, [&](const Range& range, const Moments& sums) { run.moments(at, range, x, sums); },
      [&](int64_t c0, int64_t c1, const Moments& sums) {
#pragma GCC ivdep
        for (int64_t c = c0; c < c1; ++c) {
          const double offset = sums.sum[c] / n, rest = sums.square[c] / n - offset * offset;
          const double batch_mean = sums.shift[c] + offset, batch_var = rest < 0 ? 0 : rest;
          const double distance = batch_mean - past.mean[c];
          out.batch_mean[c] = batch_mean;
          out.batch_var[c] = batch_var;
          out.mean[c] = a * batch_mean + (1 - a) * past.mean[c];
          out.var[c] = a * batch_var + (1 - a) * past.var[c] + between * distance * distance;
          scale[c] = (past.weight ? past.weight[c] : 1) / std::sqrt(out.var[c] + past.eps);
          bias[c] = past.bias ? past.bias[c] : 0;
        }
      },
      [&](const Range& range) { run.normalize(at, range, x, y, out.mean, scale, bias); });
}

// What the forward used; weight may be null.
template <class A>
struct Saved {
  const A *weight, *batch_mean, *mean, *var;
  double batch_weight, eps;
  bool pooled;
};

template <class A>
void backward(const Layout& at, int64_t value_bytes, const Kernels<A>& run, const void* g, const void* x,
              void* dx, const Saved<A>& saved, A* dw, A* db) {
  std::unique_ptr<A[]> coefficients(new A[3 * at.channels]);
  A *scale = coefficients.get(), *slope = scale + at.channels, *offset = slope + at.channels;
  const double share = saved.batch_weight / at.rows();
  two_passes<Products>(
      at, value_bytes,
      [&](const Range& range, const Products& sums) { run.products(at, range, g, x, saved.mean, sums); },
      [&](int64_t c0, int64_t c1, const Products& sums) {
#pragma GCC ivdep
        for (int64_t c = c0; c < c1; ++c) {
          const double rstd = 1 / std::sqrt(saved.var[c] + saved.eps);
          dw[c] = sums.product[c] * rstd;
          db[c] = sums.sum[c];
          scale[c] = (saved.weight ? saved.weight[c] : 1) * rstd;
          slope[c] = -share * rstd * rstd * sums.product[c];
          offset[c] = -share * sums.sum[c];
        }
      },
      [&](const Range& range) {
        const A* center = saved.pooled ? saved.mean : saved.batch_mean;
        if (dx) run.differentiate(at, range, g, x, dx, center, scale, slope, offset);
      });
}

// ---- tensors ----

using Optional = std::optional<Tensor>;

[[gnu::cold]] bool is_channels_last(const Tensor& x) {
  const int64_t dims = x.dim();
  int64_t expected = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t d = i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Of a walkable tensor.
Layout layout_of(const Tensor& x) {
  const int64_t batch = x.size(0), channels = x.size(1), plane = x.numel() / (batch * channels);
  if (channels == 1) return {false, 1, 1, batch * plane};
  return {!x.is_contiguous() || (plane == 1 && channels >= FEWEST_CHANNELS), batch, channels, plane};
}

[[gnu::cold]] Tensor empty(int64_t dims, const int64_t* sizes, const int64_t* strides, const Tensor& type) {
  int32_t dtype;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(type.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor like(const Tensor& x) { return empty(x.dim(), x.sizes().data(), x.strides().data(), x); }

Tensor per_channel(int64_t channels, const Tensor& type) {
  const int64_t one = 1;
  return empty(1, &channels, &one, type);
}

// `x` itself if there are kernels for it, or a copy: channels first, of other strides or too few channels for
// a vector; in float32, of half values in planes too small for one, which go value by value.
[[gnu::cold]] Tensor walkable(const Tensor& x) {
  const bool first = x.is_contiguous(), last = is_channels_last(x) && x.size(1) >= FEWEST_CHANNELS;
  const Tensor dense = first || last ? x : torch::stable::contiguous(x);
  const bool half = x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16;
  const Layout at = layout_of(dense);
  if (!half || at.channels_last || at.plane >= SMALLEST_HALF_PLANE) return dense;
  return torch::stable::to(dense, ScalarType::Float);
}

// `t` in the type and with the strides of the walkable `model`.
[[gnu::cold]] Tensor arranged(const Tensor& t, const Tensor& model) {
  if (t.scalar_type() == model.scalar_type() && same_strides(t, model)) return t;
  Tensor copy = like(model);
  torch::stable::copy_(copy, t);
  return copy;
}

// `t`, computed from the walkable `source` of `x`, in the type and memory format of `x`.
[[gnu::cold]] Tensor restored(const Tensor& t, const Tensor& source, const Tensor& x) {
  if (source.get() == x.get()) return t;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, t);
  return copy;
}

template <class A>
A* data(const Tensor& t) {
  return static_cast<A*>(t.data_ptr());
}

// The values of a statistic or parameter, which may be absent.
template <class A>
struct Values {
  Optional held;
  const A* p = nullptr;

  Values(const Optional& t, int64_t size) {
    if (!t) return;
    STD_TORCH_CHECK(t->numel() == size, "expected statistics and parameters of ", size, " values");
    STD_TORCH_CHECK(t->scalar_type() == (sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float),
                    "statistics and parameters must be float64 for a float64 input, float32 for others");
    held = t->is_contiguous() ? *t : torch::stable::contiguous(*t);
    p = data<A>(*held);
  }
};

// Call f(bytes of a value, kernels) for a walkable tensor.
template <class F>
void dispatch(const Tensor& x, const Layout& at, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(4, float_kernels(Type::Float, at));
    case ScalarType::BFloat16:
      return f(2, float_kernels(Type::BFloat16, at));
    case ScalarType::Half:
      return f(2, float_kernels(Type::Half, at));
    case ScalarType::Double:
      return f(8, double_kernels(at));
    default:
      STD_TORCH_CHECK(false, "expected a float32, float64, bfloat16 or float16 input");
  }
}

[[gnu::cold]] std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_op(Tensor x, Optional weight,
                                                                            Optional bias, Tensor past_mean,
                                                                            Tensor past_var,
                                                                            Tensor batch_weight, bool pooled,
                                                                            double eps) {
  const Tensor source = walkable(x), y = like(source);
  const Layout at = layout_of(source);
  Tensor out[4];
  for (Tensor& t : out) t = per_channel(at.channels, past_mean);
  dispatch(source, at, [&]<class A>(int64_t value_bytes, const Kernels<A>& run) {
    const int64_t C = at.channels;
    const Values<A> w(weight, C), b(bias, C), mean(past_mean, C), var(past_var, C), a(batch_weight, 1);
    forward<A>(at, value_bytes, run, source.data_ptr(), y.data_ptr(),
               {w.p, b.p, mean.p, var.p, *a.p, eps, pooled},
               {data<A>(out[0]), data<A>(out[1]), data<A>(out[2]), data<A>(out[3])});
  });
  return {restored(y, source, x), out[0], out[1], out[2], out[3]};
}

// dx is empty if it is not needed.
[[gnu::cold]] std::tuple<Tensor, Tensor, Tensor> backward_op(Tensor dy, Tensor x, Optional weight,
                                                             Tensor batch_weight, Tensor batch_mean,
                                                             Tensor mean, Tensor var, bool pooled, double eps,
                                                             bool need_dx) {
  STD_TORCH_CHECK(dy.dim() == x.dim() && dy.numel() == x.numel(), "expected a gradient of the shape of x");
  const Tensor source = walkable(x), g = arranged(dy, source),
               dx = need_dx ? like(source) : per_channel(0, x);
  const Layout at = layout_of(source);
  const Tensor dw = per_channel(at.channels, mean), db = per_channel(at.channels, mean);
  dispatch(source, at, [&]<class A>(int64_t value_bytes, const Kernels<A>& run) {
    const int64_t C = at.channels;
    const Values<A> w(weight, C), mB(batch_mean, C), m(mean, C), v(var, C), a(batch_weight, 1);
    backward<A>(at, value_bytes, run, g.data_ptr(), source.data_ptr(), need_dx ? dx.data_ptr() : nullptr,
                {w.p, mB.p, m.p, v.p, *a.p, eps, pooled}, data<A>(dw), data<A>(db));
  });
  return {need_dx ? restored(dx, source, x) : dx, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY(mbnorm_cpu, m) {
  m.def(
      "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor past_mean, Tensor past_var, "
      "Tensor batch_weight, bool pooled, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? weight, Tensor batch_weight, Tensor batch_mean, Tensor mean, "
      "Tensor var, bool pooled, float eps, bool need_dx) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mbnorm_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward_op));
  m.impl("backward", TORCH_BOX(&backward_op));
}
