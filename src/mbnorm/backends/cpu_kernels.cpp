// The passes over the values of a tensor, vectorized by hand.

#include "cpu_kernels.h"

#include <algorithm>
#include <type_traits>

#include "cpu_vectors.h"

namespace mbnorm {
namespace {

using std::integral_constant;

// Values of one channel that are summed in the precision of the statistics before double takes over.
constexpr int64_t TILE = 512;
constexpr int64_t TILE_CHANNELS = 256;  // channels last: a tile has up to twice as many

// Channels last: rows that are walked side by side, so that what belongs to a channel stays in registers; but
// one by one where the values come from beyond the level-2 cache and need no conversion: prefetchers follow
// the order of memory, if the rows are long enough.
template <class T>
inline int64_t block_rows(const Layout& at) {
  constexpr int64_t SHORT = 64, MANY = 256 << 10;
  const bool long_rows = SHORT <= at.channels && at.channels <= 2 * TILE_CHANNELS;
  return sizeof(T) > 2 && long_rows && at.rows() * at.channels > MANY ? 1 : 8;
}

// Clear the lanes of indices below `seen`.
template <int L, class V, class A>
inline V without_first(V v, A seen) {
  if constexpr (L == 16) {
    const Pair::Half index = {0, 2, 4, 6, 8, 10, 12, 14};
    return {index < seen ? Pair::Half{} : v.even, index + 1 < seen ? Pair::Half{} : v.odd};
  } else {
    V index;
    for (int i = 0; i < L; ++i) index[i] = i;
    return index < seen ? V{} : v;
  }
}

// Call f(offset, accumulator, mask) on the vectors of `length` values; a last one that is not full reaches
// back over values already seen, and mask() clears them.
template <class T, int L, class F>
inline void sweep(int64_t length, F f) {
  using V = Vector<T, L>;
  const auto all = [](V v) { return v; };
  int64_t i = 0;
  for (; i + 4 * L <= length; i += 4 * L) {
    f(i, 0, all);
    f(i + L, 1, all);
    f(i + 2 * L, 2, all);
    f(i + 3 * L, 3, all);
  }
  for (; i + L <= length; i += L) f(i, 0, all);
  if constexpr (L > 1) {
    if (i < length) {
      const Accumulator<T> seen = i + L - length;
      f(length - L, 1, [&](V v) { return without_first<L>(v, seen); });
    }
  }
}

// Channels first: call f(offset, planes, length) on the tiles of a channel: some whole planes of it, or a
// piece of one.
template <int L, class F>
inline void tiles(const Layout& at, int64_t channel, F f) {
  const int64_t planes = std::max<int64_t>(1, TILE / at.plane);
  const int64_t pieces = ceil_div(at.plane, TILE), piece = ceil_div(at.plane, pieces * 4 * L) * 4 * L;
  for (int64_t n = 0; n < at.batch; n += planes)
    for (int64_t i = 0; i < at.plane; i += piece)
      f((n * at.channels + channel) * at.plane + i, std::min(planes, at.batch - n),
        std::min(piece, at.plane - i));
}

// Channels last: call f(offset, rows, channel, vector, width) on blocks of a few rows and up to W vectors of
// channels, along the rows as they lie in memory. `vector` counts them; the last of a row may reach back over
// channels of the one before.
template <class T, int L, int W, class F>
inline void blocks(const Layout& at, const Range& in, F f) {
  const int64_t most = block_rows<T>(at);
  for (int64_t r = in.r0; r < in.r1; r += most) {
    const int64_t rows = std::min(most, in.r1 - r), offset = r * at.channels;
    int64_t c = in.c0, vector = 0;
    for (; c + W * L <= in.c1; c += W * L, vector += W)
      f(offset + c, rows, c, vector, integral_constant<int, W>());
    for (; c + L <= in.c1; c += L, ++vector) f(offset + c, rows, c, vector, integral_constant<int, 1>());
    if (c < in.c1) f(offset + in.c1 - L, rows, in.c1 - L, vector, integral_constant<int, 1>());
  }
}

// Channels last: call f(tile) on tiles of rows and channels whose sums stay in L1.
template <class F>
inline void tiles(const Range& in, F f) {
  for (int64_t c = in.c0; c < in.c1;) {
    // what is left joins the last one: a tile is no narrower than a vector
    const int64_t end = in.c1 - c <= 2 * TILE_CHANNELS ? in.c1 : c + TILE_CHANNELS;
    for (int64_t r = in.r0; r < in.r1; r += TILE_ROWS) f(Range{c, end, r, std::min(r + TILE_ROWS, in.r1)});
    c = end;
  }
}

template <class T, int L>
struct First {
  using A = Accumulator<T>;
  using V = Vector<T, L>;

  // Mean of the first values, near enough to that of all; exact if they are equal.
  static A pilot_mean(const T* x, int64_t length) {
    const A origin = load<T, 1>(x);
    if (length < 4 * L) {
      const V v = load<T, L>(x) - origin;
      return origin + A(total(v)) / L;
    }
    V v[4];
    for (int j = 0; j < 4; ++j) v[j] = load<T, L>(x + j * L) - origin;
    return origin + A(total(v)) / (4 * L);
  }

  [[gnu::flatten]] static void moments(const Layout& at, const Range& in, const void* x, const Moments& out) {
    const int64_t stride = at.channels * at.plane;
    for (int64_t c = in.c0; c < in.c1; ++c) {
      out.shift[c] = load<T, 1>(static_cast<const T*>(x) + c * at.plane);
      out.sum[c] = out.square[c] = 0;
      tiles<L>(at, c, [&](int64_t offset, int64_t planes, int64_t length) {
        const T* tile = static_cast<const T*>(x) + offset;
        const A shift = pilot_mean(tile, length);
        V rests[4] = {}, squares[4] = {};
        for (int64_t n = 0; n < planes; ++n)
          sweep<T, L>(length, [&](int64_t i, int j, auto mask) {
            const V v = mask(load<T, L>(tile + n * stride + i) - shift);
            rests[j] += v;
            squares[j] += v * v;
          });
        out.add(c, planes * length, shift, total(rests), total(squares));
      });
    }
  }

  [[gnu::flatten]] static void products(const Layout& at, const Range& in, const void* g, const void* x,
                                        const A* mean, const Products& out) {
    const int64_t stride = at.channels * at.plane;
    for (int64_t c = in.c0; c < in.c1; ++c) {
      const A m = mean[c];
      out.sum[c] = out.product[c] = 0;
      tiles<L>(at, c, [&](int64_t offset, int64_t planes, int64_t length) {
        V sums[4] = {}, products[4] = {};
        for (int64_t n = 0; n < planes; ++n) {
          const T* gs = static_cast<const T*>(g) + offset + n * stride;
          const T* xs = static_cast<const T*>(x) + offset + n * stride;
          sweep<T, L>(length, [&](int64_t i, int j, auto mask) {
            const V v = mask(load<T, L>(gs + i));
            sums[j] += v;
            products[j] += v * (load<T, L>(xs + i) - m);
          });
        }
        out.sum[c] += total(sums);
        out.product[c] += total(products);
      });
    }
  }

  // Call f(offset, channel) on the planes.
  template <class F>
  static void planes(const Layout& at, const Range& in, F f) {
    for (int64_t n = 0; n < at.batch; ++n)
      for (int64_t c = in.c0; c < in.c1; ++c) f((n * at.channels + c) * at.plane, c);
  }

  template <bool FAR>
  [[gnu::flatten]] static void normalize(const Layout& at, const Range& in, const void* x, void* y,
                                         const A* mean, const A* scale, const A* bias) {
    planes(at, in, [&](int64_t offset, int64_t c) {
      const T* xs = static_cast<const T*>(x) + offset;
      T* ys = static_cast<T*>(y) + offset;
      const A m = quieted<T>(mean[c]), s = quieted<T>(scale[c]), b = quieted<T>(bias[c]);
      sweep<T, L>(at.plane,
                  [&](int64_t i, int, auto) { store<T, L, FAR>(ys + i, (load<T, L>(xs + i) - m) * s + b); });
    });
    finish_writing<FAR>();
  }

  template <bool FAR>
  [[gnu::flatten]] static void differentiate(const Layout& at, const Range& in, const void* g, const void* x,
                                             void* dx, const A* center, const A* scale, const A* slope,
                                             const A* offset) {
    planes(at, in, [&](int64_t start, int64_t c) {
      const T* gs = static_cast<const T*>(g) + start;
      const T* xs = static_cast<const T*>(x) + start;
      T* ds = static_cast<T*>(dx) + start;
      const A m = quieted<T>(center[c]), s = quieted<T>(scale[c]), k = quieted<T>(slope[c]),
              o = quieted<T>(offset[c]);
      sweep<T, L>(at.plane, [&](int64_t i, int, auto) {
        store<T, L, FAR>(ds + i, s * (load<T, L>(gs + i) + (k * (load<T, L>(xs + i) - m) + o)));
      });
    });
    finish_writing<FAR>();
  }
};

template <class T, int L>
struct Last {
  using A = Accumulator<T>;
  using V = Vector<T, L>;
  static constexpr int VECTORS = 2 * TILE_CHANNELS / L;
  static constexpr int WIDE = L == 16 ? 2 : 4;  // vectors of channels whose sums fit in registers

  // Call f(channel, seen, vector) for the vectors of a tile, in the order of blocks; lanes below `seen` are
  // of channels of the one before.
  template <class F>
  static void each_vector(const Range& tile, F f) {
    for (int64_t c = tile.c0, vector = 0; c < tile.c1; c += L, ++vector) {
      const int64_t from = std::min(c, tile.c1 - L);
      f(from, c - from, vector);
    }
  }

  [[gnu::flatten]] static void moments(const Layout& at, const Range& in, const void* x, const Moments& out) {
    for (int64_t c = in.c0; c < in.c1; ++c) {
      out.shift[c] = load<T, 1>(static_cast<const T*>(x) + in.r0 * at.channels + c);
      out.sum[c] = out.square[c] = 0;
    }
    tiles(in, [&](const Range& tile) {
      V shifts[VECTORS], sums[VECTORS], squares[VECTORS];
      const int64_t second_block = (tile.r0 + block_rows<T>(at)) * at.channels;
      const int64_t pilots = std::min<int64_t>(tile.r1 - tile.r0, 4);
      blocks<T, L, WIDE>(at, tile, [&](int64_t offset, int64_t rows, int64_t, int64_t vector, auto width) {
        constexpr int W = width;
        const T* xs = static_cast<const T*>(x) + offset;
        if (offset < second_block) {
#pragma GCC unroll 4
          for (int j = 0; j < W; ++j) {
            const V origin = load<T, L>(xs + j * L);
            V pilot{};
            for (int64_t i = 1; i < pilots; ++i) pilot += load<T, L>(xs + i * at.channels + j * L) - origin;
            shifts[vector + j] = origin + pilot * (1 / A(pilots));
            sums[vector + j] = squares[vector + j] = V{};
          }
        }
        V shift[W], sum[W] = {}, square[W] = {};
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) shift[j] = shifts[vector + j];
        for (int64_t i = 0; i < rows; ++i, xs += at.channels)
#pragma GCC unroll 4
          for (int j = 0; j < W; ++j) {
            const V v = load<T, L>(xs + j * L) - shift[j];
            sum[j] += v;
            square[j] += v * v;
          }
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) {
          sums[vector + j] += sum[j];
          squares[vector + j] += square[j];
        }
      });
      const double rows = tile.r1 - tile.r0;
      each_vector(tile, [&](int64_t c, int64_t seen, int64_t i) {
        A lanes[3][L];
        scatter(lanes[0], shifts[i]);
        scatter(lanes[1], sums[i]);
        scatter(lanes[2], squares[i]);
        for (int64_t j = seen; j < L; ++j) out.add(c + j, rows, lanes[0][j], lanes[1][j], lanes[2][j]);
      });
    });
  }

  [[gnu::flatten]] static void products(const Layout& at, const Range& in, const void* g, const void* x,
                                        const A* mean, const Products& out) {
    for (int64_t c = in.c0; c < in.c1; ++c) out.sum[c] = out.product[c] = 0;
    tiles(in, [&](const Range& tile) {
      V sums[VECTORS] = {}, products[VECTORS] = {};
      blocks<T, L, WIDE>(at, tile, [&](int64_t offset, int64_t rows, int64_t c, int64_t vector, auto width) {
        constexpr int W = width;
        const T* gs = static_cast<const T*>(g) + offset;
        const T* xs = static_cast<const T*>(x) + offset;
        V m[W], sum[W] = {}, product[W] = {};
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) m[j] = gathered<L>(mean + c + j * L);
        for (int64_t i = 0; i < rows; ++i, gs += at.channels, xs += at.channels)
#pragma GCC unroll 4
          for (int j = 0; j < W; ++j) {
            const V v = load<T, L>(gs + j * L);
            sum[j] += v;
            product[j] += v * (load<T, L>(xs + j * L) - m[j]);
          }
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) {
          sums[vector + j] += sum[j];
          products[vector + j] += product[j];
        }
      });
      each_vector(tile, [&](int64_t c, int64_t seen, int64_t i) {
        A lanes[2][L];
        scatter(lanes[0], sums[i]);
        scatter(lanes[1], products[i]);
        for (int64_t j = seen; j < L; ++j) {
          out.sum[c + j] += lanes[0][j];
          out.product[c + j] += lanes[1][j];
        }
      });
    });
  }

  template <bool FAR>
  [[gnu::flatten]] static void normalize(const Layout& at, const Range& in, const void* x, void* y,
                                         const A* mean, const A* scale, const A* bias) {
    blocks<T, L, WIDE>(at, in, [&](int64_t offset, int64_t rows, int64_t c, int64_t, auto width) {
      constexpr int W = width;
      const T* xs = static_cast<const T*>(x) + offset;
      T* ys = static_cast<T*>(y) + offset;
      V m[W], s[W], b[W];
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) {
        m[j] = quieted<T>(gathered<L>(mean + c + j * L));
        s[j] = quieted<T>(gathered<L>(scale + c + j * L));
        b[j] = quieted<T>(gathered<L>(bias + c + j * L));
      }
      for (int64_t k = 0; k < rows; ++k, xs += at.channels, ys += at.channels)
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j)
          store<T, L, FAR>(ys + j * L, (load<T, L>(xs + j * L) - m[j]) * s[j] + b[j]);
    });
    finish_writing<FAR>();
  }

  template <bool FAR>
  [[gnu::flatten]] static void differentiate(const Layout& at, const Range& in, const void* g, const void* x,
                                             void* dx, const A* center, const A* scale, const A* slope,
                                             const A* shift) {
    blocks<T, L, L == 16 ? 1 : 4>(at, in, [&](int64_t offset, int64_t rows, int64_t c, int64_t, auto width) {
      constexpr int W = width;
      const T* gs = static_cast<const T*>(g) + offset;
      const T* xs = static_cast<const T*>(x) + offset;
      T* ds = static_cast<T*>(dx) + offset;
      V m[W], s[W], k[W], o[W];
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) {
        m[j] = quieted<T>(gathered<L>(center + c + j * L));
        s[j] = quieted<T>(gathered<L>(scale + c + j * L));
        k[j] = quieted<T>(gathered<L>(slope + c + j * L));
        o[j] = quieted<T>(gathered<L>(shift + c + j * L));
      }
      for (int64_t r = 0; r < rows; ++r, gs += at.channels, xs += at.channels, ds += at.channels)
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) {
          const V rest = k[j] * (load<T, L>(xs + j * L) - m[j]) + o[j];
          store<T, L, FAR>(ds + j * L, s[j] * (load<T, L>(gs + j * L) + rest));
        }
    });
    finish_writing<FAR>();
  }
};

template <class Passes, bool FAR>
constexpr Kernels<typename Passes::A> table = {
    Passes::moments, Passes::products, Passes::template normalize<FAR>, Passes::template differentiate<FAR>};

// An output of so many bytes is out of the caches before it is complete, whoever reads it next.
constexpr int64_t FAR_BYTES = 16 << 20;

template <class Passes, class T>
const Kernels<typename Passes::A>& near_or_far(const Layout& at) {
  const bool far = at.rows() * at.channels * int64_t(sizeof(T)) >= FAR_BYTES;
  return far ? table<Passes, true> : table<Passes, false>;
}

template <class T>
const Kernels<Accumulator<T>>& kernels(const Layout& at) {
  constexpr int L = LANES<T>;
  if constexpr (std::is_same_v<T, BFloat16>)
    if (at.channels_last && at.channels >= 16) return near_or_far<Last<T, 16>, T>(at);
  if (at.channels_last) return near_or_far<Last<T, L>, T>(at);
  if constexpr (std::is_same_v<T, BFloat16>) {
    return near_or_far<First<T, 16>, T>(at);
  } else {
    if constexpr (std::is_same_v<T, Accumulator<T>>)
      if (at.plane < L) return table<First<T, 1>, false>;
    return near_or_far<First<T, L>, T>(at);
  }
}

}  // namespace

const Kernels<float>& float_kernels(Type type, const Layout& at) {
  switch (type) {
    case Type::BFloat16:
      return kernels<BFloat16>(at);
    case Type::Half:
      return kernels<Half>(at);
    default:
      return kernels<float>(at);
  }
}

const Kernels<double>& double_kernels(const Layout& at) { return kernels<double>(at); }

}  // namespace mbnorm
