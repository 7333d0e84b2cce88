// The operators: tensors in, tensors out. The work is done on plain arrays, in cpu_operator.cpp and
// cpu_memory.cpp.

#include "cpu_memory.h"
#include "cpu_operator.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using namespace mbnorm;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Optional = std::optional<Tensor>;

int64_t bytes_of(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

template <class A>
A* data(const Tensor& t) {
  return static_cast<A*>(t.data_ptr());
}

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
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(type.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The first touch of a fresh page costs more than all that is computed on it: ask for large ones.
void prefer_huge_pages([[maybe_unused]] const Tensor& t, [[maybe_unused]] int64_t value_bytes) {
#ifdef __linux__
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()), end = begin + t.numel() * value_bytes;
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, last = end / PAGE * PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Tensor like(const Tensor& x) {
  const Tensor t = empty(x.dim(), x.sizes().data(), x.strides().data(), x);
  prefer_huge_pages(t, bytes_of(x.scalar_type()));
  return t;
}

Tensor per_channel(int64_t channels, const Tensor& type) {
  const int64_t one = 1;
  return empty(1, &channels, &one, type);
}

Tensor matrix(int64_t rows, int64_t columns, const Tensor& type) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return empty(2, sizes, strides, type);
}

// `x` itself if there are kernels for it, or a copy: channels first, of other strides or too few channels for
// a vector; in float32, of half values in planes too small for one, which go value by value.
[[gnu::cold]] Tensor walkable(const Tensor& x) {
  STD_TORCH_CHECK(x.numel() > 0, "expected an input with values, got none");
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

// The values of a state that is written in place.
template <class A>
A* state(const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == size &&
                      t.scalar_type() == (sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float),
                  "expected contiguous state of ", size,
                  " values, in float64 for a float64 input, in float32 for others");
  return data<A>(t);
}

int64_t* counter(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == 1, "expected int64 counters");
  return data<int64_t>(t);
}

// Call f(a zero of the type of statistics, type of the values) for a walkable tensor.
template <class F>
void dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float(), Type::Float);
    case ScalarType::BFloat16:
      return f(float(), Type::BFloat16);
    case ScalarType::Half:
      return f(float(), Type::Half);
    case ScalarType::Double:
      return f(double(), Type::Double);
    default:
      STD_TORCH_CHECK(false, "expected a float32, float64, bfloat16 or float16 input");
  }
}

// The rows of the four statistics that a forward gives and a backward takes.
template <class A>
Statistics<A> rows(const Tensor& t, int64_t channels) {
  A* p = data<A>(t);
  return {p, p + channels, p + 2 * channels, p + 3 * channels};
}

[[gnu::cold]] std::tuple<Tensor, Tensor> forward_op(Tensor x, Optional weight, Optional bias,
                                                    Tensor past_mean, Tensor past_var, Tensor batch_weight,
                                                    bool pooled, double eps) {
  const Tensor source = walkable(x), y = like(source);
  const Layout at = layout_of(source);
  const int64_t C = at.channels;
  const Tensor statistics = matrix(4, C, past_mean);
  dispatch(source, [&]<class A>(A, Type type) {
    const Values<A> w(weight, C), b(bias, C), mean(past_mean, C), var(past_var, C), a(batch_weight, 1);
    forward<A>(at, type, source.data_ptr(), y.data_ptr(), {w.p, b.p}, {mean.p, var.p}, {*a.p, eps, pooled},
               rows<A>(statistics, C));
  });
  return {restored(y, source, x), statistics};
}

// What a forward with a memory leaves behind, rows of C values: the statistics, the past mean and variance, and
// the weight of the batch.
constexpr int64_t PAST_ROW = 4, WEIGHT_ROW = 6, RECORD_ROWS = 7;

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Of `rows` rows that begin with the statistics; without `batch_weight` they are a record. dx is empty if it is
// not needed.
Gradients gradients(const Tensor& dy, const Tensor& x, const Optional& weight, const Optional& batch_weight,
                    const Tensor& statistics, int64_t rows_given, bool pooled, double eps, bool need_dx) {
  STD_TORCH_CHECK(dy.dim() == x.dim() && dy.numel() == x.numel(), "expected a gradient of the shape of x");
  const Tensor source = walkable(x), g = arranged(dy, source),
               dx = need_dx ? like(source) : per_channel(0, x);
  const Layout at = layout_of(source);
  const int64_t C = at.channels;
  const Tensor dw = per_channel(C, statistics), db = per_channel(C, statistics);
  dispatch(source, [&]<class A>(A, Type type) {
    const Values<A> w(weight, C), saved(statistics, rows_given * C), given(batch_weight, 1);
    const double a = batch_weight ? *given.p : saved.p[WEIGHT_ROW * C];
    backward<A>(at, type, g.data_ptr(), source.data_ptr(), need_dx ? dx.data_ptr() : nullptr, w.p,
                rows<A>(*saved.held, C), {a, eps, pooled}, data<A>(dw), data<A>(db));
  });
  return {need_dx ? restored(dx, source, x) : dx, dw, db};
}

[[gnu::cold]] Gradients backward_op(Tensor dy, Tensor x, Optional weight, Tensor batch_weight, Tensor statistics,
                                    bool pooled, double eps, bool need_dx) {
  return gradients(dy, x, weight, batch_weight, statistics, PAST_ROW, pooled, eps, need_dx);
}

[[gnu::cold]] Gradients backward_recorded_op(Tensor dy, Tensor x, Optional weight, Tensor record, bool pooled,
                                             double eps, bool need_dx) {
  return gradients(dy, x, weight, std::nullopt, record, RECORD_ROWS, pooled, eps, need_dx);
}

// What a forward with a memory returns: y and the record.
using Remembered = std::tuple<Tensor, Tensor>;

// Where the state before a forward goes: past mean and variance, averages for inference, what else the memory
// has, and the counters batches, skipped and the memory's. Kept by the caller and written round and round: small tensors that live
// from step to step break up the heap in which large ones come and go, so that these get fresh pages each time.
struct Log {
  Optional numbers, counters;
  int64_t slot;

  template <class A, class Memory>
  void write(const A* past, const Averages<A>& averages, const Memory& memory, int64_t memory_counter) const {
    if (!numbers || !counters) return;
    const int64_t C = averages.channels, size = 4 * C + memory.more();
    STD_TORCH_CHECK(slot >= 0 && counters->numel() >= 3 * (slot + 1), "expected a log with a slot ", slot);
    A* to = state<A>(*numbers, counters->numel() / 3 * size) + slot * size;
    std::copy_n(past, 2 * C, to);
    std::copy_n(averages.mean, C, to + 2 * C);
    std::copy_n(averages.var, C, to + 3 * C);
    memory.copy_more(to + 4 * C);
    int64_t* then = data<int64_t>(*counters) + 3 * slot;
    then[0] = *averages.batches, then[1] = *averages.skipped, then[2] = memory_counter;
  }
};

// The buffers of the averages for inference.
struct Running {
  const Tensor &mean, &var, &batches, &skipped;

  template <class A>
  Averages<A> open(int64_t C) const {
    return {state<A>(mean, C), state<A>(var, C), counter(batches), counter(skipped), C};
  }
};

// The buffers of a moving average, measured or not, and how they are read and written.
struct AverageBuffers {
  const Tensor &mean, &var, &filled;
  const Optional &last, &measured;
  double history_weight;

  template <class A>
  Average<A> open(int64_t C) const {
    Average<A> average{state<A>(mean, C), state<A>(var, C), nullptr, nullptr, counter(filled), C};
    if (last && measured) {
      average.last = state<A>(*last, C);
      average.measured = reinterpret_cast<Measured<A>*>(state<A>(*measured, sizeof(Measured<A>) / sizeof(A)));
    }
    return average;
  }
  template <class A>
  double read(const Average<A>& memory, int64_t n, A* past_mean, A* past_var) const {
    return memory.read(history_weight, n, past_mean, past_var);
  }
  template <class A>
  void store(const Average<A>& memory, const Statistics<A>& of, int64_t n) const {
    if (memory.measured) memory.measure(of.batch_mean, of.var, n);
    memory.store(of.mean, of.var);
  }
  int64_t count() const { return *counter(filled); }
};

// The same of a ring.
struct RingBuffers {
  const Tensor &mean, &var, &counts, &position;
  int64_t limit;
  double decay;
  bool pooled;

  template <class A>
  Ring<A> open(int64_t C) const {
    const int64_t size = counts.numel();
    STD_TORCH_CHECK(size > 0, "expected a ring of at least one entry");
    return {state<A>(mean, size * C), state<A>(var, size * C), state<A>(counts, size), counter(position), size, C};
  }
  template <class A>
  double read(const Ring<A>& memory, int64_t n, A* past_mean, A* past_var) const {
    return memory.read(n, limit, decay, pooled, past_mean, past_var);
  }
  template <class A>
  void store(const Ring<A>& memory, const Statistics<A>& of, int64_t n) const {
    memory.store(of.batch_mean, of.batch_var, n);
  }
  int64_t count() const { return *counter(position); }
};

// Store statistics in a memory and in the averages, if all that is stored is finite.
template <class A, class Memory, class Buffers>
void commit(const Memory& memory, const Buffers& buffers, const Averages<A>& averages, const Statistics<A>& of,
            int64_t n, const Update& update) {
  const int64_t C = averages.channels;
  std::unique_ptr<A[]> next(new A[2 * C]);
  const A* new_mean = update.blended ? of.mean : of.batch_mean;
  const A* new_var = update.blended ? of.var : of.batch_var;
  if (!averages.after(new_mean, new_var, n, update, next.get(), next.get() + C) || !all_finite(of.mean, C) ||
      !all_finite(of.var, C)) {
    ++*averages.skipped;
    return;
  }
  buffers.store(memory, of, n);
  std::copy_n(next.get(), C, averages.mean);
  std::copy_n(next.get() + C, C, averages.var);
  ++*averages.batches;
}

// Read a memory, normalize, and commit.
template <class Buffers>
Remembered remember(const Tensor& x, const Optional& weight, const Optional& bias, bool pooled, double eps,
                    const Buffers& buffers, const Running& running, const Log& log, bool store,
                    const Update& update) {
  const Tensor source = walkable(x), y = like(source);
  const Layout at = layout_of(source);
  const int64_t C = at.channels, n = at.rows();
  const Tensor record = matrix(RECORD_ROWS, C, running.mean);
  dispatch(source, [&]<class A>(A, Type type) {
    const Values<A> w(weight, C), b(bias, C);
    const Averages<A> averages = running.open<A>(C);
    const auto memory = buffers.template open<A>(C);
    A* past = data<A>(record) + PAST_ROW * C;
    const double a = buffers.read(memory, n, past, past + C);
    std::fill_n(data<A>(record) + WEIGHT_ROW * C, C, A(a));
    log.write<A>(past, averages, memory, buffers.count());
    const Statistics<A> out = rows<A>(record, C);
    forward<A>(at, type, source.data_ptr(), y.data_ptr(), {w.p, b.p}, {past, past + C}, {a, eps, pooled}, out);
    if (store) commit(memory, buffers, averages, out, n, update);
  });
  return {restored(y, source, x), record};
}

// Commit a batch's statistics, given by sums as pool() takes them, and their blend with what is read.
template <class Buffers>
void commit_sums(const Tensor& sums, bool pooled, const Buffers& buffers, const Running& running,
                 const Update& update) {
  dispatch(running.mean, [&]<class A>(A, Type) {
    const int64_t C = running.mean.numel();
    const double* p = state<double>(sums, 2 * C + 2);
    const int64_t n = std::llround(p[2 * C]);
    const auto memory = buffers.template open<A>(C);
    std::unique_ptr<A[]> values(new A[6 * C]);
    A *past = values.get(), *rows = past + 2 * C;
    const Statistics<A> of{rows, rows + C, rows + 2 * C, rows + 3 * C};
    const double a = buffers.read(memory, n, past, past + C);
    pool<A>(p, C, {past, past + C}, {a, 0, pooled}, of);
    commit(memory, buffers, running.open<A>(C), of, n, update);
  });
}

[[gnu::cold]] Remembered average_op(Tensor x, Optional weight, Optional bias, bool pooled, double eps,
                                    Tensor memory_mean, Tensor memory_var, Tensor filled, Optional last,
                                    Optional measured, double history_weight, Tensor running_mean,
                                    Tensor running_var, Tensor batches, Tensor skipped, Optional log, Optional log_counters,
                                    int64_t slot, bool store, bool blended, bool unbiased,
                                    double new_weight, bool new_pooled, double early) {
  return remember(x, weight, bias, pooled, eps,
                  AverageBuffers{memory_mean, memory_var, filled, last, measured, history_weight},
                  {running_mean, running_var, batches, skipped}, {log, log_counters, slot}, store,
                  {blended, unbiased, new_pooled, new_weight, early});
}

[[gnu::cold]] Remembered ring_op(Tensor x, Optional weight, Optional bias, bool pooled, double eps,
                                 Tensor memory_mean, Tensor memory_var, Tensor counts, Tensor position,
                                 int64_t limit, double decay, Tensor running_mean, Tensor running_var,
                                 Tensor batches, Tensor skipped, Optional log, Optional log_counters, int64_t slot,
                                 bool store, bool blended, bool unbiased, double new_weight,
                                 bool new_pooled, double early) {
  return remember(x, weight, bias, pooled, eps,
                  RingBuffers{memory_mean, memory_var, counts, position, limit, decay, pooled},
                  {running_mean, running_var, batches, skipped}, {log, log_counters, slot}, store,
                  {blended, unbiased, new_pooled, new_weight, early});
}

[[gnu::cold]] void commit_to_average_op(Tensor sums, bool pooled, Tensor memory_mean, Tensor memory_var,
                                        Tensor filled, Optional last, Optional measured,
                                        double history_weight, Tensor running_mean, Tensor running_var, Tensor batches, Tensor skipped, bool blended,
                                        bool unbiased, double new_weight, bool new_pooled, double early) {
  commit_sums(sums, pooled, AverageBuffers{memory_mean, memory_var, filled, last, measured, history_weight},
              {running_mean, running_var, batches, skipped}, {blended, unbiased, new_pooled, new_weight, early});
}

[[gnu::cold]] void commit_to_ring_op(Tensor sums, bool pooled, Tensor memory_mean, Tensor memory_var,
                                     Tensor counts, Tensor position, int64_t limit, double decay,
                                     Tensor running_mean, Tensor running_var, Tensor batches, Tensor skipped,
                                     bool blended, bool unbiased, double new_weight,
                                     bool new_pooled, double early) {
  commit_sums(sums, pooled, RingBuffers{memory_mean, memory_var, counts, position, limit, decay, pooled},
              {running_mean, running_var, batches, skipped}, {blended, unbiased, new_pooled, new_weight, early});
}

}  // namespace

STABLE_TORCH_LIBRARY(mbnorm_cpu, m) {
  m.def(
      "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor past_mean, Tensor past_var, "
      "Tensor batch_weight, bool pooled, float eps) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? weight, Tensor batch_weight, Tensor statistics, bool pooled, "
      "float eps, bool need_dx) -> (Tensor, Tensor, Tensor)");
  m.def(
      "backward_recorded(Tensor dy, Tensor x, Tensor? weight, Tensor record, bool pooled, float eps, "
      "bool need_dx) -> (Tensor, Tensor, Tensor)");
  m.def(
      "forward_with_average(Tensor x, Tensor? weight, Tensor? bias, bool pooled, float eps, "
      "Tensor(a!) memory_mean, Tensor(b!) memory_var, Tensor(c!) filled, Tensor(d!)? last, "
      "Tensor(e!)? measured, float history_weight, Tensor(f!) running_mean, Tensor(g!) running_var, "
      "Tensor(h!) batches, Tensor(i!) skipped, Tensor(j!)? log, Tensor(k!)? log_counters, int slot, "
      "bool store, bool blended, bool unbiased, float new_weight, bool new_pooled, float early) -> (Tensor, Tensor)");
  m.def(
      "forward_with_ring(Tensor x, Tensor? weight, Tensor? bias, bool pooled, float eps, "
      "Tensor(a!) memory_mean, Tensor(b!) memory_var, Tensor(c!) counts, Tensor(d!) position, int limit, "
      "float decay, Tensor(e!) running_mean, Tensor(f!) running_var, Tensor(g!) batches, "
      "Tensor(h!) skipped, Tensor(i!)? log, Tensor(j!)? log_counters, int slot, bool store, bool blended, "
      "bool unbiased, float new_weight, bool new_pooled, float early) -> (Tensor, Tensor)");
  m.def(
      "commit_to_average(Tensor sums, bool pooled, Tensor(a!) memory_mean, Tensor(b!) memory_var, "
      "Tensor(c!) filled, Tensor(d!)? last, Tensor(e!)? measured, float history_weight, "
      "Tensor(f!) running_mean, Tensor(g!) running_var, Tensor(h!) batches, Tensor(i!) skipped, "
      "bool blended, bool unbiased, float new_weight, bool new_pooled, float early) -> ()");
  m.def(
      "commit_to_ring(Tensor sums, bool pooled, Tensor(a!) memory_mean, Tensor(b!) memory_var, "
      "Tensor(c!) counts, Tensor(d!) position, int limit, float decay, Tensor(e!) running_mean, "
      "Tensor(f!) running_var, Tensor(g!) batches, Tensor(h!) skipped, bool blended, bool unbiased, "
      "float new_weight, bool new_pooled, float early) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mbnorm_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward_op));
  m.impl("backward", TORCH_BOX(&backward_op));
  m.impl("backward_recorded", TORCH_BOX(&backward_recorded_op));
  m.impl("forward_with_average", TORCH_BOX(&average_op));
  m.impl("forward_with_ring", TORCH_BOX(&ring_op));
  m.impl("commit_to_average", TORCH_BOX(&commit_to_average_op));
  m.impl("commit_to_ring", TORCH_BOX(&commit_to_ring_op));
}
