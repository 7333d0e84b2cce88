// The operator on plain arrays: y = weight (x - mean) / sqrt(var + eps) + bias, with blended statistics.

#pragma once

#include "cpu_kernels.h"

namespace mbnorm {

// How the batch is blended with the past.
struct Rule {
  double batch_weight, eps;
  bool pooled;
};

// Weight and bias may be null.
template <class A>
struct Affine {
  const A *weight, *bias;
};

template <class A>
struct Past {
  const A *mean, *var;
};

template <class A>
struct Statistics {
  A *batch_mean, *batch_var, *mean, *var;
};

template <class A>
void forward(const Layout& at, Type type, const void* x, void* y, const Affine<A>& affine,
             const Past<A>& past, const Rule& rule, const Statistics<A>& out);

// Blend the statistics of a batch that `sums` holds: per channel n mean and n (var + mean^2), then n.
template <class A>
void pool(const double* sums, int64_t channels, const Past<A>& past, const Rule& rule, const Statistics<A>& out);

// dx may be null.
template <class A>
void backward(const Layout& at, Type type, const void* g, const void* x, void* dx, const A* weight,
              const Statistics<A>& saved, const Rule& rule, A* dw, A* db);

}  // namespace mbnorm
