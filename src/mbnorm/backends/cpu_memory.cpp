#include "cpu_memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_parallel.h"

namespace mbnorm {
namespace {

constexpr int64_t BLOCK = 256;       // channels whose sums stay in L1
constexpr int64_t GRAIN = 32 << 10;  // fewest values worth a thread

constexpr double MEASURED_WEIGHT = 0.02, EARLY = 8, SEEDED = 400, MOST_IF_ALIKE = 4;  // those of mbnorm/measures.py

template <class A>
void copy(A* to, const A* from, int64_t number) {
  std::memcpy(to, from, number * sizeof(A));
}

}  // namespace

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

template <class A>
double Average<A>::read(double history_weight, int64_t n, A* past_mean, A* past_var) const {
  copy(past_mean, mean, channels);
  copy(past_var, var, channels);
  if (!*filled) return 1;
  return 1 - (measured ? measured_weight(history_weight, n) : history_weight);
}

template <class A>
double Average<A>::measured_weight(double matched_values, int64_t n) const {
  const bool known = measured->samples > 0;
  const double ratio = known ? std::max(1.0, double(measured->ratio)) : 1,
               error = std::max(0.0, double(measured->error)),
               noise = known ? std::min(1.0, ratio / std::max<int64_t>(n, 1)) : 1,
               inverse = noise * std::min(MOST_IF_ALIKE, ratio) * matched_values,
               matched = (inverse - 1) / (inverse + 1);
  return std::max(0.0, std::min(noise / (noise + error), matched));
}

template <class A>
void Average<A>::measure(const A* batch_mean, const A* blended_var, int64_t n) const {
  const Measured<A> then = *measured;
  Measured<A> now{0, 1, A(n), 0};
  if (then.samples < 0) {
    if (*filled) now = {A(n), 0, A(n), A(SEEDED)};
  } else {
    double step = 0, distance = 0;
    int64_t live = 0;
    for (int64_t c = 0; c < channels; ++c) {
      if (!(blended_var[c] > 0)) continue;
      const double away = double(batch_mean[c]) - last[c], off = double(batch_mean[c]) - mean[c];
      step += away * away / blended_var[c];
      distance += off * off / blended_var[c];
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
  copy(last, batch_mean, channels);
}

template <class A>
void Average<A>::copy_more(A* to) const {
  if (!measured) return;
  copy(to, last, channels);
  std::memcpy(to + channels, measured, sizeof *measured);
}

template <class A>
void Average<A>::store(const A* blended_mean, const A* blended_var) const {
  copy(mean, blended_mean, channels);
  copy(var, blended_var, channels);
  *filled = 1;
}

template <class A>
double Ring<A>::read(int64_t n, int64_t limit, double decay, bool pooled, A* past_mean, A* past_var) const {
  struct Entry {
    double share;
    const A *means, *vars;
  };
  std::vector<Entry> entries;
  entries.reserve(size);
  double total = 0;
  for (int64_t slot = 0; slot < size; ++slot) {
    const int64_t back = (*position - 1 - slot) % size, age = (back < 0 ? back + size : back) + 1;
    if (age > limit || counts[slot] == 0) continue;
    // a seeded entry counts as many values as the batch
    const double count = counts[slot] < 0 ? double(n) : double(counts[slot]);
    const double weight = decay == 1 ? count : count * std::pow(decay, double(age));
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
      const double between = pooled;
      for (const auto& [share, means, vars] : entries)
        for (int64_t c = 0; c < length; ++c) {
          const double distance = double(means[b + c]) - origin[b + c], weighted = share * distance;
          m[c] += weighted;
          v[c] += share * vars[b + c] + between * weighted * distance;
        }
      for (int64_t c = 0; c < length; ++c) {
        const double var = v[c] - between * m[c] * m[c];
        past_mean[b + c] = m[c] + (entries.empty() ? 0 : origin[b + c]);
        past_var[b + c] = var < 0 ? 0 : var;
      }
    }
  });
  return n / (n + total);
}

template <class A>
void Ring<A>::store(const A* batch_mean, const A* batch_var, int64_t n) const {
  const int64_t slot = (*position % size + size) % size;
  copy(mean + slot * channels, batch_mean, channels);
  copy(var + slot * channels, batch_var, channels);
  counts[slot] = n;
  ++*position;
}

template <class A>
bool Averages<A>::after(const A* new_mean, const A* new_var, int64_t n, const Update& update, A* next_mean,
                        A* next_var) const {
  const double early = update.early > 0 ? update.early / (*batches + update.early) : 0,
               a = std::max(update.weight, early), b = 1 - a,
               between = update.pooled ? a * b : 0,
               correction = update.unbiased && n > 1 ? double(n) / double(n - 1) : 1;
  if (a == 1) {
    // also where the averages held so far are not finite
    copy(next_mean, new_mean, channels);
    for (int64_t c = 0; c < channels; ++c) next_var[c] = new_var[c] * correction;
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      const double distance = double(new_mean[c]) - mean[c];
      next_mean[c] = a * new_mean[c] + b * mean[c];
      next_var[c] = a * correction * new_var[c] + b * var[c] + between * distance * distance;
    }
  }
  return all_finite(next_mean, channels) && all_finite(next_var, channels);
}

template struct Average<float>;
template struct Average<double>;
template struct Ring<float>;
template struct Ring<double>;
template struct Averages<float>;
template struct Averages<double>;
template bool all_finite(const float*, int64_t);
template bool all_finite(const double*, int64_t);

}  // namespace mbnorm
