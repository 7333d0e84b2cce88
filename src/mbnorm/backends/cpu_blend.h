// The law of mixing two sets of statistics (mbnorm/blend.py), the constants of what an average measures
// (mbnorm/measures.py), and what a batch weighs in the memory of the backward (mbnorm/gradient.py).

#pragma once

#include <cstdint>

namespace mbnorm {

constexpr double MEASURED_WEIGHT = 0.02, EARLY = 8;

// The past weighs the fourth power of what it weighs in the forward.
inline double weight_in_gradient(double batch_weight) {
  const double squared = (1 - batch_weight) * (1 - batch_weight);
  return 1 - squared * squared;
}

// Of the variance, by the numbers that Python knows them by.
enum class Rule : int64_t { Averaged, Pooled, Uncentered };

// New statistics weigh `a`.
struct Blend {
  double a, between;

  Blend(double new_weight, bool pooled)
      : a(new_weight), between(pooled ? new_weight * (1 - new_weight) : 0) {}
  Blend(double new_weight, Rule rule) : Blend(new_weight, rule == Rule::Pooled) {}

  double mean(double new_mean, double old_mean) const { return a * new_mean + (1 - a) * old_mean; }
  double var(double new_mean, double new_var, double old_mean, double old_var) const {
    const double distance = new_mean - old_mean;
    return a * new_var + (1 - a) * old_var + between * distance * distance;
  }
};

}  // namespace mbnorm
