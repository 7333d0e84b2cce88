// The memories of mbnorm/memory.py on the CPU: what takes dozens of tensor operations there is one here.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t BLOCK = 256;       // channels whose sums stay in L1
constexpr int64_t GRAIN = 32 << 10;  // fewest values worth a thread

template <class A>
A* data(const Tensor& t) {
  return static_cast<A*>(t.data_ptr());
}

[[gnu::cold]] ScalarType checked_type(std::initializer_list<const Tensor*> state) {
  const ScalarType type = (*state.begin())->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "expected float32 or float64 state");
  for (const Tensor* t : state)
    STD_TORCH_CHECK(t->is_contiguous() && t->scalar_type() == type, "expected contiguous state of one dtype");
  return type;
}

[[gnu::cold]] void check_counters(std::initializer_list<const Tensor*> counters) {
  for (const Tensor* t : counters)
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->numel() == 1, "expected int64 counters");
}

// New statistics in the type of the state.
[[gnu::cold]] Tensor values(const Tensor& t, ScalarType type, int64_t channels) {
  STD_TORCH_CHECK(t.numel() == channels, "expected statistics of ", channels, " channels");
  const Tensor typed = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

template <class F>
void dispatch(ScalarType type, const F& f) {
  type == ScalarType::Double ? f(double()) : f(float());
}

// Weight of each slot for a batch of n values, in step with RecentBatches.read.
template <class A>
std::vector<double> slot_weights(const A* counts, int64_t size, int64_t position, int64_t n, int64_t limit,
                                 double decay) {
  std::vector<double> weights(size);
  for (int64_t slot = 0; slot < size; ++slot) {
    const int64_t back = (position - 1 - slot) % size, age = (back < 0 ? back + size : back) + 1;
    if (age > limit) continue;
    // a seeded entry counts as many values as the batch
    const double count = counts[slot] < 0 ? double(n) : double(counts[slot]);
    weights[slot] = decay == 1 ? count : count * std::pow(decay, double(age));
  }
  return weights;
}

template <class A>
void weighted_statistics(const A* means, const A* vars, const std::vector<double>& shares, bool pooled,
                         A* mean, A* var, int64_t channels, int64_t c0, int64_t c1) {
  for (int64_t b = c0; b < c1; b += BLOCK) {
    const int64_t length = std::min(BLOCK, c1 - b);
    double m[BLOCK] = {}, v[BLOCK] = {};
    for (size_t slot = 0; slot < shares.size(); ++slot) {
      const double share = shares[slot];
      if (share == 0) continue;
      const A *ms = means + slot * channels + b, *vs = vars + slot * channels + b;
      for (int64_t c = 0; c < length; ++c) {
        m[c] += share * ms[c];
        v[c] += share * vs[c];
      }
    }
    for (size_t slot = 0; pooled && slot < shares.size(); ++slot) {
      const double share = shares[slot];
      if (share == 0) continue;
      const A* ms = means + slot * channels + b;
      for (int64_t c = 0; c < length; ++c) v[c] += share * (ms[c] - m[c]) * (ms[c] - m[c]);
    }
    for (int64_t c = 0; c < length; ++c) {
      mean[b + c] = m[c];
      var[b + c] = v[c];
    }
  }
}

[[gnu::cold]] std::tuple<Tensor, Tensor, Tensor> ring_read(Tensor mean, Tensor var, Tensor counts,
                                                           Tensor position, int64_t n, int64_t limit,
                                                           double decay, bool pooled) {
  const ScalarType type = checked_type({&mean, &var, &counts});
  check_counters({&position});
  const int64_t size = mean.size(0), channels = mean.size(1);
  STD_TORCH_CHECK(var.numel() == mean.numel() && counts.numel() == size, "expected a ring of one size");
  const Tensor past_mean = torch::stable::new_empty(mean, {channels});
  const Tensor past_var = torch::stable::new_empty(mean, {channels});
  const Tensor batch_weight = torch::stable::new_empty(mean, {});
  dispatch(type, [&](auto zero) {
    using A = decltype(zero);
    auto weights = slot_weights(data<A>(counts), size, *data<int64_t>(position), n, limit, decay);
    double total = 0;
    for (double weight : weights) total += weight;
    *data<A>(batch_weight) = n / (n + total);
    if (total > 0)
      for (double& weight : weights) weight /= total;
    torch::stable::parallel_for(
        0, channels, std::max<int64_t>(BLOCK, GRAIN / size), [&](int64_t c0, int64_t c1) {
          weighted_statistics(data<A>(mean), data<A>(var), weights, pooled, data<A>(past_mean),
                              data<A>(past_var), channels, c0, c1);
        });
  });
  return {past_mean, past_var, batch_weight};
}

template <class A>
bool all_finite(const A* p, int64_t n) {
  // a value that is not finite has a zeroth multiple of NaN, and so has their sum
  constexpr int LANES = 16;
  A sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; ++j) sums[j] += p[i + j] * 0;
  for (; i < n; ++i) sums[0] += p[i] * 0;
  return std::all_of(sums, sums + LANES, [](A sum) { return sum == 0; });
}

// The averages for inference, and what goes into them.
struct Averages {
  Tensor mean, var, batches, skipped, new_mean, new_var;
  std::optional<double> weight;
  bool pooled;

  // Means, then variances, as InferenceAverages.after gives them.
  template <class A>
  std::vector<A> after() const {
    const int64_t channels = mean.numel();
    const A *old_means = data<A>(mean), *old_vars = data<A>(var);
    const A *new_means = data<A>(new_mean), *new_vars = data<A>(new_var);
    const double a = weight ? *weight : 1.0 / (*data<int64_t>(batches) + 1), b = 1 - a,
                 between = pooled ? a * b : 0;
    std::vector<A> result(2 * channels);
    if (a == 1) {
      std::copy(new_means, new_means + channels, result.begin());
      std::copy(new_vars, new_vars + channels, result.begin() + channels);
      return result;
    }
    A *means = result.data(), *vars = means + channels;
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      const double distance = double(new_means[c]) - old_means[c];
      means[c] = a * new_means[c] + b * old_means[c];
      vars[c] = a * new_vars[c] + b * old_vars[c] + between * distance * distance;
    }
    return result;
  }
};

// Store in the memory and in the averages if the blended statistics and what the averages become are finite.
template <class F>
void commit(ScalarType type, const Tensor& blended_mean, const Tensor& blended_var, const Averages& averages,
            const F& store) {
  dispatch(type, [&](auto zero) {
    using A = decltype(zero);
    const int64_t channels = averages.mean.numel();
    const std::vector<A> after = averages.after<A>();
    if (!all_finite(data<A>(blended_mean), channels) || !all_finite(data<A>(blended_var), channels) ||
        !all_finite(after.data(), 2 * channels)) {
      ++*data<int64_t>(averages.skipped);
      return;
    }
    store(zero);
    std::copy(after.begin(), after.begin() + channels, data<A>(averages.mean));
    std::copy(after.begin() + channels, after.end(), data<A>(averages.var));
    ++*data<int64_t>(averages.batches);
  });
}

[[gnu::cold]] void ring_commit(Tensor batch_mean, Tensor batch_var, int64_t n, Tensor blended_mean,
                               Tensor blended_var, Tensor ring_mean, Tensor ring_var, Tensor counts,
                               Tensor position, Tensor new_mean, Tensor new_var, std::optional<double> weight,
                               bool pooled, Tensor running_mean, Tensor running_var, Tensor batches,
                               Tensor skipped) {
  const ScalarType type = checked_type({&ring_mean, &ring_var, &counts, &running_mean, &running_var});
  check_counters({&position, &batches, &skipped});
  const int64_t size = ring_mean.size(0), channels = ring_mean.size(1);
  STD_TORCH_CHECK(ring_var.numel() == ring_mean.numel() && counts.numel() == size && size > 0 &&
                      running_mean.numel() == channels && running_var.numel() == channels,
                  "expected state of one size");
  const Tensor mean = values(batch_mean, type, channels), var = values(batch_var, type, channels);
  const Averages averages{running_mean,
                          running_var,
                          batches,
                          skipped,
                          values(new_mean, type, channels),
                          values(new_var, type, channels),
                          weight,
                          pooled};
  commit(type, values(blended_mean, type, channels), values(blended_var, type, channels), averages,
         [&](auto zero) {
           using A = decltype(zero);
           int64_t& stored = *data<int64_t>(position);
           const int64_t slot = (stored % size + size) % size;
           std::memcpy(data<A>(ring_mean) + slot * channels, data<A>(mean), channels * sizeof(A));
           std::memcpy(data<A>(ring_var) + slot * channels, data<A>(var), channels * sizeof(A));
           data<A>(counts)[slot] = n;
           ++stored;
         });
}

[[gnu::cold]] void average_commit(Tensor blended_mean, Tensor blended_var, Tensor memory_mean,
                                  Tensor memory_var, Tensor filled, Tensor new_mean, Tensor new_var,
                                  std::optional<double> weight, bool pooled, Tensor running_mean,
                                  Tensor running_var, Tensor batches, Tensor skipped) {
  const ScalarType type = checked_type({&memory_mean, &memory_var, &running_mean, &running_var});
  check_counters({&filled, &batches, &skipped});
  const int64_t channels = memory_mean.numel();
  STD_TORCH_CHECK(
      memory_var.numel() == channels && running_mean.numel() == channels && running_var.numel() == channels,
      "expected state of one size");
  const Tensor mean = values(blended_mean, type, channels), var = values(blended_var, type, channels);
  const Averages averages{running_mean,
                          running_var,
                          batches,
                          skipped,
                          values(new_mean, type, channels),
                          values(new_var, type, channels),
                          weight,
                          pooled};
  commit(type, mean, var, averages, [&](auto zero) {
    using A = decltype(zero);
    std::memcpy(data<A>(memory_mean), data<A>(mean), memory_mean.numel() * sizeof(A));
    std::memcpy(data<A>(memory_var), data<A>(var), memory_var.numel() * sizeof(A));
    *data<int64_t>(filled) = 1;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mbnorm_cpu, m) {
  m.def(
      "ring_read(Tensor mean, Tensor var, Tensor counts, Tensor position, int n, int limit, float decay, "
      "bool pooled) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ring_commit(Tensor batch_mean, Tensor batch_var, int n, Tensor blended_mean, Tensor blended_var, "
      "Tensor(a!) ring_mean, Tensor(b!) ring_var, Tensor(c!) counts, Tensor(d!) position, Tensor new_mean, "
      "Tensor new_var, float? weight, bool pooled, Tensor(e!) running_mean, Tensor(f!) running_var, "
      "Tensor(g!) batches, Tensor(h!) skipped) -> ()");
  m.def(
      "average_commit(Tensor blended_mean, Tensor blended_var, Tensor(a!) memory_mean, Tensor(b!) "
      "memory_var, "
      "Tensor(c!) filled, Tensor new_mean, Tensor new_var, float? weight, bool pooled, "
      "Tensor(d!) running_mean, Tensor(e!) running_var, Tensor(f!) batches, Tensor(g!) skipped) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mbnorm_cpu, CPU, m) {
  m.impl("ring_read", TORCH_BOX(&ring_read));
  m.impl("ring_commit", TORCH_BOX(&ring_commit));
  m.impl("average_commit", TORCH_BOX(&average_commit));
}
