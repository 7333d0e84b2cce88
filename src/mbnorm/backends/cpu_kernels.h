// The passes over the values of a tensor, for each type and layout.

#pragma once

#include <cstdint>

namespace mbnorm {

constexpr int64_t TILE_ROWS = 64;  // channels last: rows whose values are summed before double takes over

struct Layout {
  bool channels_last;
  int64_t batch, channels, plane;

  int64_t rows() const { return batch * plane; }  // values per channel
};

// Channels c0 to c1 and, channels last, rows r0 to r1.
struct Range {
  int64_t c0, c1, r0, r1;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of values v: sum(v - shift) and sum((v - shift)^2).
struct Moments {
  double *shift, *sum, *square;

  static constexpr int NUMBERS = 3;
  Moments(double* p, int64_t channels) : shift(p), sum(p + channels), square(p + 2 * channels) {}

  // Add those of n other values, about another shift.
  void add(int64_t c, double n, double other_shift, double other_sum, double other_square) const {
    const double step = other_shift - shift[c];
    square[c] += other_square + step * (2 * other_sum + n * step);
    sum[c] += other_sum + n * step;
  }
  void add(int64_t c, double n, const Moments& m) const { add(c, n, m.shift[c], m.sum[c], m.square[c]); }
};

// Of a gradient g: sum(g) and sum(g (x - mean)).
struct Products {
  double *sum, *product;

  static constexpr int NUMBERS = 2;
  Products(double* p, int64_t channels) : sum(p), product(p + channels) {}

  void add(int64_t c, double, const Products& p) const {
    sum[c] += p.sum[c];
    product[c] += p.product[c];
  }
};

// The passes for one type and layout. The moments of a tile of values are taken about the mean of the first
// few of them: little cancels, and equal values give zeros exactly.
template <class A>
struct Kernels {
  void (*moments)(const Layout&, const Range&, const void* x, const Moments&);
  void (*products)(const Layout&, const Range&, const void* g, const void* x, const A* mean, const Products&);
  // y = (x - mean) scale + bias
  void (*normalize)(const Layout&, const Range&, const void* x, void* y, const A* mean, const A* scale,
                    const A* bias);
  // dx = scale (g + slope (x - center) + offset)
  void (*differentiate)(const Layout&, const Range&, const void* g, const void* x, void* dx, const A* center,
                        const A* scale, const A* slope, const A* offset);
};

constexpr int64_t FEWEST_CHANNELS = 8;       // of the kernels for channels last
constexpr int64_t SMALLEST_HALF_PLANE = 16;  // of the kernels for halves, channels first

enum class Type { Float, Double, BFloat16, Half };

const Kernels<float>& float_kernels(Type type, const Layout& at);
const Kernels<double>& double_kernels(const Layout& at);

}  // namespace mbnorm
