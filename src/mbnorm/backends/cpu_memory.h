// The memories of mbnorm/memory.py and the averages of mbnorm/averages.py, on plain arrays: what takes dozens of
// tensor operations there is one pass here.

#pragma once

#include <cstdint>

namespace mbnorm {

// What a MeasuredAverage has measured, in the order of its tensor.
template <class A>
struct Measured {
  A ratio, error, last_values, samples;
};

// MovingAverage, or MeasuredAverage where `last` and `measured` are not null.
template <class A>
struct Average {
  A *mean, *var, *last;
  Measured<A>* measured;
  int64_t *filled, channels;

  // Copy out the past; return the weight of the batch. `history_weight` is the number N of values to be
  // matched where something is measured.
  double read(double history_weight, int64_t n, A* past_mean, A* past_var) const;
  double measured_weight(double matched_values, int64_t n) const;
  // Take the batch's mean and the variance that normalized it into what is measured.
  void measure(const A* batch_mean, const A* blended_var, int64_t n) const;
  void store(const A* blended_mean, const A* blended_var) const;
  // Numbers beside mean and variance, and their copy.
  int64_t more() const { return measured ? channels + int64_t(sizeof(Measured<A>) / sizeof(A)) : 0; }
  void copy_more(A* to) const;
};

// RecentBatches: `size` entries, each the mean and variance of the channels and a count of values.
template <class A>
struct Ring {
  A *mean, *var, *counts;
  int64_t *position, size, channels;

  // Write the past for a batch of n values per channel; return the weight of the batch.
  double read(int64_t n, int64_t limit, double decay, bool pooled, A* past_mean, A* past_var) const;
  void store(const A* batch_mean, const A* batch_var, int64_t n) const;
  int64_t more() const { return 0; }
  void copy_more(A*) const {}
};

// What goes into the averages for inference: InferenceUpdate.
struct Update {
  bool blended, unbiased, pooled;
  double weight, early;
};

// InferenceAverages.
template <class A>
struct Averages {
  A *mean, *var;
  int64_t *batches, *skipped, channels;

  // Write the averages as they are once statistics are blended in; return whether they are finite.
  bool after(const A* new_mean, const A* new_var, int64_t n, const Update& update, A* mean, A* var) const;
};

template <class A>
bool all_finite(const A* values, int64_t number);

}  // namespace mbnorm
