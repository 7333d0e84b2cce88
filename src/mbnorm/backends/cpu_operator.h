// The operator on plain arrays: y = weight (x - mean) / sqrt(var + eps) + bias, with blended statistics.

#pragma once

#include <algorithm>

#include "cpu_blend.h"
#include "cpu_kernels.h"

namespace mbnorm {

template <class A>
bool all_finite(const A* values, int64_t number) {
  // a value that is not finite has a zeroth multiple of NaN, and so has their sum
  constexpr int LANES = 16;
  A sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= number; i += LANES)
    for (int j = 0; j < LANES; ++j) sums[j] += values[i + j] * 0;
  for (; i < number; ++i) sums[0] += values[i] * 0;
  return std::all_of(sums, sums + LANES, [](A sum) { return sum == 0; });
}

// What a forward leaves behind: seven rows of a number per channel. `weight` is that of the batch, in every
// column.
template <class A>
struct Record {
  static constexpr int64_t ROWS = 7;

  A *batch_mean, *batch_var, *mean, *var, *past_mean, *past_var, *weight;
  int64_t channels;

  Record(A* p, int64_t channels)
      : batch_mean(p),
        batch_var(p + channels),
        mean(p + 2 * channels),
        var(p + 3 * channels),
        past_mean(p + 4 * channels),
        past_var(p + 5 * channels),
        weight(p + 6 * channels),
        channels(channels) {}
};

// Normalize with the past that the record has, and write the statistics into it. Weight and bias may be null.
template <class A>
void forward(const Layout& at, Type type, const void* x, void* y, const A* weight, const A* bias, Rule rule,
             double eps, const Record<A>& record);

// dx may be null, and so may `past`: for each channel the remembered mean of dy, after those that of dy times
// the normalized input, and the weight of the batch's own beside them.
template <class A>
void backward(const Layout& at, Type type, const void* dy, const void* x, void* dx, const A* weight,
              const Record<A>& record, const A* past, Rule rule, double eps, A* dw, A* db);

// Write the statistics of a batch that is given by sums, and their blend with the past, into the record: per
// channel n mean and n (var + mean^2), then n.
template <class A>
void blend_sums(const double* sums, Rule rule, const Record<A>& record);

}  // namespace mbnorm
