// The operators that read a memory of past statistics, normalize, and store: the memories of mbnorm/memories
// and the averages of mbnorm/averages.py. What takes dozens of tensor operations there is one pass here.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_blend.h"
#include "cpu_operator.h"
#include "cpu_parallel.h"
#include "cpu_tensors.h"

namespace mbnorm {
namespace {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

constexpr int64_t BLOCK = 256;       // channels whose sums stay in L1
constexpr int64_t GRAIN = 32 << 10;  // fewest values worth a thread

template <class A>
void copy(A* to, const A* from, int64_t number) {
  std::memcpy(to, from, number * sizeof(A));
}

// What an average has measured, in the order of its tensor. There was no batch before where `samples` is
// negative; where there are statistics all the same, it is minus the number of batches that they stand for.
template <class A>
struct Measured {
  A ratio, error, last_values, samples;
};

// The blended statistics of the batch before. It is measured where `last` and `measured` are not null.
template <class A>
struct Average {
  A *mean, *var, *filled, *last = nullptr;
  Measured<A>* measured = nullptr;
  const A* given_weight = nullptr;  // of the history, where nothing is measured
  double matched_batch_size = 0, samples = 1;
  bool by_measures = false, uncentered;
  int64_t channels;

  // `memory` is mean, var, filled and the history weight, and `read` empty; or `memory` mean, var, filled,
  // last and measured, and `read` which batch size is matched, whether by what is measured, and how many
  // samples the batch has.
  Average(const Tensors& memory, const Numbers& read, int64_t channels, Rule rule)
      : uncentered(rule == Rule::Uncentered), channels(channels) {
    const bool measures = memory.size() == 5;
    STD_TORCH_CHECK((measures || memory.size() == 4) && read.size() == (measures ? 3 : 0),
                    "expected an average of 4 tensors and no numbers, or of 5 and 3, got ", memory.size(),
                    " and ", read.size());
    mean = state<A>(memory[0], channels);
    var = state<A>(memory[1], channels);
    filled = state<A>(memory[2], 1);
    if (!measures) {
      given_weight = state<A>(memory[3], 1);
      return;
    }
    last = state<A>(memory[3], channels);
    measured = reinterpret_cast<Measured<A>*>(state<A>(memory[4], sizeof(Measured<A>) / sizeof(A)));
    matched_batch_size = read[0];
    by_measures = read[1] != 0;
    samples = read[2];
  }

  // After how many batches the averages for inference are; `batches` is their counter.
  double batches_seen(int64_t batches) const {
    if (!measured) return batches;
    const double samples = measured->samples;
    return samples < 0 && *filled > 0 ? -samples : samples + 1;
  }

  double history_weight(int64_t n) const {
    if (!measured) return *given_weight;
    const double independent = matched_batch_size / samples;
    if (!by_measures) return std::max(0.0, (independent - 1) / (independent + 1));
    const bool known = measured->samples > 0;
    const double ratio = known ? std::max(1.0, double(measured->ratio)) : 1,
                 error = std::max(0.0, double(measured->error)),
                 noise = known ? std::min(1.0, ratio / std::max<int64_t>(n, 1)) : 1,
                 inverse = std::max(independent, noise * matched_batch_size),
                 matched = (inverse - 1) / (inverse + 1);
    return std::max(0.0, std::min(noise / (noise + error), matched));
  }

  // Write the past for a batch of n values per channel, and the weight of the batch.
  void read(int64_t n, Rule, const Record<A>& to) const {
    copy(to.past_mean, mean, channels);
    copy(to.past_var, var, channels);
    std::fill_n(to.weight, channels, A(*filled > 0 ? 1 - history_weight(n) : 1));
  }

  void store(const Record<A>& batch, int64_t n) const {
    if (measured) measure(batch, n);
    copy(mean, batch.mean, channels);
    copy(var, batch.var, channels);
    *filled = 1;
  }

  // The mean is measured, or, where there is none, the mean square.
  void measure(const Record<A>& batch, int64_t n) const {
    const A *next = uncentered ? batch.batch_var : batch.batch_mean, *held = uncentered ? var : mean;
    const Measured<A> then = *measured;
    Measured<A> now{0, 1, A(n), 0};
    if (then.samples < 0) {
      if (*filled > 0) now = {A(n), 0, A(n), -then.samples};
    } else {
      double step = 0, distance = 0;
      int64_t live = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const A unit = uncentered ? batch.var[c] * batch.var[c] : batch.var[c];
        if (!(unit > 0)) continue;
        const double away = double(next[c]) - last[c], off = double(next[c]) - held[c];
        step += away * away / unit;
        distance += off * off / unit;
        ++live;
      }
      const double channels_live = std::max<int64_t>(live, 1),
                   ratio = step / channels_live / (1.0 / n + 1 / std::max(1.0, double(then.last_values))),
                   weight = std::max(MEASURED_WEIGHT, EARLY / (then.samples + EARLY));
      now.samples = then.samples + 1;
      now.ratio = then.ratio + weight * (ratio - then.ratio);
      now.error = then.error + weight * (distance / channels_live - ratio / n - then.error);
    }
    // statistics may be finite whose distances are not
    if (std::isfinite(now.ratio) && std::isfinite(now.error)) *measured = now;
    copy(last, next, channels);
  }
};

// The statistics of the last batches: `size` slots, each with the mean and variance of the channels, a count
// of values per channel, and an age: 0 where it is empty, 1 for the newest.
template <class A>
struct Ring {
  A *mean, *var, *counts, *ages;
  int64_t size, channels;
  double limit, decay;

  // `memory` is mean, var, counts and ages; `read` the greatest age that is read, and the decay.
  Ring(const Tensors& memory, const Numbers& read, int64_t channels, Rule) : channels(channels) {
    STD_TORCH_CHECK(memory.size() == 4 && read.size() == 2,
                    "expected a ring of 4 tensors and 2 numbers, got ", memory.size(), " and ", read.size());
    size = memory[2].numel();
    STD_TORCH_CHECK(size > 0, "expected a ring of at least one slot");
    mean = state<A>(memory[0], size * channels);
    var = state<A>(memory[1], size * channels);
    counts = state<A>(memory[2], size);
    ages = state<A>(memory[3], size);
    limit = read[0];
    decay = read[1];
  }

  double batches_seen(int64_t batches) const { return batches; }

  // Write the past for a batch of n values per channel, and the weight of the batch.
  void read(int64_t n, Rule rule, const Record<A>& to) const {
    struct Entry {
      double share;
      const A *means, *vars;
    };
    std::vector<Entry> entries;
    entries.reserve(size);
    double total = 0;
    for (int64_t slot = 0; slot < size; ++slot) {
      if (!(ages[slot] > 0 && ages[slot] <= limit)) continue;
      // an entry that was seeded counts as many values as the batch
      const double count = counts[slot] < 0 ? double(n) : double(counts[slot]);
      const double weight = decay == 1 ? count : count * std::pow(decay, double(ages[slot]));
      if (weight == 0) continue;
      entries.push_back({weight, mean + slot * channels, var + slot * channels});
      total += weight;
    }
    for (Entry& entry : entries) entry.share /= total;
    const int64_t grain = std::max<int64_t>(BLOCK, GRAIN / std::max<size_t>(1, entries.size()));
    parallel_for(0, channels, grain, [&](int64_t c0, int64_t c1) {
      for (int64_t b = c0; b < c1; b += BLOCK) {
        const int64_t length = std::min(BLOCK, c1 - b);
        double m[BLOCK] = {}, v[BLOCK] = {};
        // about the first entry's mean, so that one pass gives the variance between them without cancellation
        const A* origin = entries.empty() ? mean : entries[0].means;
        const double between = rule == Rule::Pooled;
        for (const auto& [share, means, vars] : entries)
          for (int64_t c = 0; c < length; ++c) {
            const double distance = double(means[b + c]) - origin[b + c], weighted = share * distance;
            m[c] += weighted;
            v[c] += share * vars[b + c] + between * weighted * distance;
          }
        for (int64_t c = 0; c < length; ++c) {
          const double variance = v[c] - between * m[c] * m[c];
          to.past_mean[b + c] = m[c] + (entries.empty() ? 0 : origin[b + c]);
          to.past_var[b + c] = variance < 0 ? 0 : variance;
        }
      }
    });
    std::fill_n(to.weight, channels, A(n / (n + total)));
  }

  // Take the slot after the newest entry's, which is empty or the oldest's.
  void store(const Record<A>& batch, int64_t n) const {
    int64_t newest = -1;
    for (int64_t slot = 0; slot < size; ++slot) {
      if (ages[slot] == 1) newest = slot;
      if (ages[slot] > 0) ++ages[slot];
    }
    const int64_t slot = (newest + 1) % size;
    copy(mean + slot * channels, batch.batch_mean, channels);
    copy(var + slot * channels, batch.batch_var, channels);
    counts[slot] = n;
    ages[slot] = 1;
  }
};

// InferenceUpdate: what goes into the averages for inference, with which weight and rule.
struct Update {
  double weight, early;
  bool cumulative, blended, unbiased, pooled;

  explicit Update(const Numbers& numbers) {
    STD_TORCH_CHECK(numbers.size() == 6, "expected an update of 6 numbers, got ", numbers.size());
    weight = numbers[0], early = numbers[1], cumulative = numbers[2] != 0;
    blended = numbers[3] != 0, unbiased = numbers[4] != 0, pooled = numbers[5] != 0;
  }
};

// InferenceAverages: the statistics of eval mode, and counters of the batches in them and of those left out.
template <class A>
struct Averages {
  A *mean, *var;
  int64_t *batches, *skipped, channels;

  Averages(const Tensors& averages, int64_t channels) : channels(channels) {
    STD_TORCH_CHECK(averages.size() == 4, "expected averages of 4 tensors, got ", averages.size());
    mean = state<A>(averages[0], channels);
    var = state<A>(averages[1], channels);
    batches = counter(averages[2]);
    skipped = counter(averages[3]);
  }

  // Write the averages as they are once a batch of n values per channel is in; return whether they are
  // finite.
  bool after(const Record<A>& batch, int64_t n, const Update& update, double batches_seen, A* next_mean,
             A* next_var) const {
    const A *new_mean = update.blended ? batch.mean : batch.batch_mean,
            *new_var = update.blended ? batch.var : batch.batch_var;
    const double correction = update.unbiased && n > 1 ? double(n) / double(n - 1) : 1;
    if (update.weight == 1) {
      // also where the averages held so far are not finite
      copy(next_mean, new_mean, channels);
      for (int64_t c = 0; c < channels; ++c) next_var[c] = new_var[c] * correction;
    } else {
      const Blend blend(weight(update, batches_seen), update.pooled);
      for (int64_t c = 0; c < channels; ++c) {
        next_mean[c] = blend.mean(new_mean[c], mean[c]);
        next_var[c] = blend.var(new_mean[c], new_var[c] * correction, mean[c], var[c]);
      }
    }
    return all_finite(next_mean, channels) && all_finite(next_var, channels);
  }

  double weight(const Update& update, double batches_seen) const {
    if (update.cumulative) return 1.0 / (*batches + 1);
    return update.early > 0 ? std::max(update.weight, update.early / (batches_seen + update.early))
                            : update.weight;
  }
};

// Store a batch of n values per channel in a memory and in the averages, if all that is stored is finite.
template <class A, class Memory>
void commit(const Memory& memory, const Averages<A>& averages, const Record<A>& batch, int64_t n,
            const Update& update) {
  const int64_t C = averages.channels;
  std::unique_ptr<A[]> next(new A[2 * C]);
  A *next_mean = next.get(), *next_var = next_mean + C;
  const double seen = memory.batches_seen(*averages.batches);
  if (!averages.after(batch, n, update, seen, next_mean, next_var) || !all_finite(batch.mean, C) ||
      !all_finite(batch.var, C)) {
    ++*averages.skipped;
    return;
  }
  memory.store(batch, n);
  copy(averages.mean, next_mean, C);
  copy(averages.var, next_var, C);
  ++*averages.batches;
}

// Read a memory, normalize, and store or not.
template <template <class> class Memory>
std::tuple<Tensor, Tensor> forward_with(const Tensor& x, const Optional& weight, const Optional& bias,
                                        const Tensors& memory, const Tensors& averages, const Numbers& read,
                                        const Numbers& update, int64_t rule, double eps, bool store) {
  const Tensor source = walkable(x), y = like(source);
  const Layout at = layout_of(source);
  const int64_t C = at.channels, n = at.rows();
  STD_TORCH_CHECK(!averages.empty(), "expected averages, got none");
  const Tensor record = matrix(Record<float>::ROWS, C, averages[0]);
  dispatch(source, [&]<class A>(A, Type type) {
    const Values<A> w(weight, C), b(bias, C);
    const Memory<A> past(memory, read, C, Rule(rule));
    const Averages<A> running(averages, C);
    const Record<A> rows(data<A>(record), C);
    past.read(n, Rule(rule), rows);
    forward<A>(at, type, source.data_ptr(), y.data_ptr(), w.p, b.p, Rule(rule), eps, rows);
    if (store) commit(past, running, rows, n, Update(update));
  });
  return {restored(y, source, x), record};
}

// Store a batch that is given by the sums that blend_sums() takes.
template <template <class> class Memory>
void commit_to(const Tensor& sums, const Tensors& memory, const Tensors& averages, const Numbers& read,
               const Numbers& update, int64_t rule) {
  STD_TORCH_CHECK(!averages.empty(), "expected averages, got none");
  dispatch(averages[0], [&]<class A>(A, Type) {
    const int64_t C = averages[0].numel();
    const double* given = state<double>(sums, 2 * C + 2);
    const int64_t n = std::llround(given[2 * C]);
    const Memory<A> past(memory, read, C, Rule(rule));
    const Averages<A> running(averages, C);
    std::unique_ptr<A[]> values(new A[Record<A>::ROWS * C]);
    const Record<A> rows(values.get(), C);
    past.read(n, Rule(rule), rows);
    blend_sums(given, Rule(rule), rows);
    commit(past, running, rows, n, Update(update));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mbnorm_cpu, m) {
  for (const std::string kind : {"average", "ring"}) {
    const std::string arguments =
        "Tensor(a!)[] memory, Tensor(b!)[] averages, float[] read, float[] update, int rule";
    m.def(("forward_with_" + kind + "(Tensor x, Tensor? weight, Tensor? bias, " + arguments +
           ", float eps, bool store) -> (Tensor y, Tensor record)")
              .c_str());
    m.def(("commit_to_" + kind + "(Tensor sums, " + arguments + ") -> ()").c_str());
  }
}

STABLE_TORCH_LIBRARY_IMPL(mbnorm_cpu, CPU, m) {
  m.impl("forward_with_average", TORCH_BOX(&forward_with<Average>));
  m.impl("forward_with_ring", TORCH_BOX(&forward_with<Ring>));
  m.impl("commit_to_average", TORCH_BOX(&commit_to<Average>));
  m.impl("commit_to_ring", TORCH_BOX(&commit_to<Ring>));
}

}  // namespace mbnorm
