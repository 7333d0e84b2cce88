// Vectors of L lanes, their loads and stores; a single lane is a plain number.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace mbnorm {

using c10::BFloat16;
using c10::Half;

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int LANES = 32 / sizeof(Accumulator<T>);

template <class A, int L>
struct VectorOf {
  typedef A type __attribute__((vector_size(L * sizeof(A))));
};
template <class A>
struct VectorOf<A, 1> {
  using type = A;
};

// Sixteen bfloat16 as two vectors, of those with even and odd indices: what they take apart and put together
// without a shuffle, for uses that do not care about the order of lanes.
struct Pair {
  using Half = VectorOf<float, 8>::type;
  Half even, odd;

  friend Pair operator+(Pair a, Pair b) { return {a.even + b.even, a.odd + b.odd}; }
  friend Pair operator+(Pair a, float b) { return {a.even + b, a.odd + b}; }
  friend Pair operator-(Pair a, float b) { return {a.even - b, a.odd - b}; }
  friend Pair operator-(Pair a, Pair b) { return {a.even - b.even, a.odd - b.odd}; }
  friend Pair operator*(Pair a, Pair b) { return {a.even * b.even, a.odd * b.odd}; }
  friend Pair operator*(Pair a, float b) { return {a.even * b, a.odd * b}; }
  friend Pair operator*(float a, Pair b) { return b * a; }
  Pair& operator+=(Pair b) { return *this = *this + b; }
};
template <>
struct VectorOf<float, 16> {
  using type = Pair;
};

template <class T, int L>
using Vector = typename VectorOf<Accumulator<T>, L>::type;

typedef uint16_t Bits16 __attribute__((vector_size(16)));
typedef uint32_t Bits32 __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));

template <class V>
inline V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T, int L>
inline Vector<T, L> load(const T* p) {
  if constexpr (L == 1) {
    return *p;
  } else if constexpr (L == 16) {
    const Bits32 bits = read<Bits32>(p);
    return {(Pair::Half)(bits << 16), (Pair::Half)(bits & 0xffff0000)};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
#ifdef __AVX2__
    return (Vector<T, L>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(p)), 16);
#else
    return (Vector<T, L>)(__builtin_convertvector(read<Bits16>(p), Bits32) << 16);
#endif
  } else if constexpr (std::is_same_v<T, Half>) {
#ifdef __F16C__
    return (Vector<T, L>)_mm256_cvtph_ps(read<__m128i>(p));
#else
    Vector<T, L> v;
    for (int i = 0; i < L; ++i) v[i] = p[i];
    return v;
#endif
  } else {
    return read<Vector<T, L>>(p);
  }
}

// Float bits whose upper halves are the nearest bfloat16, ties to even; a NaN must be quieted.
inline Bits32 rounded(Pair::Half v) {
  const Bits32 bits = (Bits32)v;
  return bits + 0x7fff + ((bits >> 16) & 1);
}

// A factor or summand for values of type T: one NaN for all, since `rounded` turns some others into numbers,
// and there are fewer factors than values.
template <class T, class V>
inline V quieted(V v) {
  if constexpr (!std::is_same_v<T, BFloat16>) {
    return v;
  } else if constexpr (std::is_same_v<V, Pair>) {
    return {quieted<T>(v.even), quieted<T>(v.odd)};
  } else {
    return v == v ? v : V{} + __builtin_nanf("");
  }
}

// Write a vector; past the caches, if it is FAR, which spares reading what is overwritten.
template <bool FAR, class V>
inline void write(void* p, V v) {
#ifdef __AVX__
  if constexpr (FAR && sizeof v == 32) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof v == 0) {
      _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
      return;
    }
  }
#endif
  std::memcpy(p, &v, sizeof v);
}

// After the last write: other threads are to see all of them.
template <bool FAR>
inline void finish_writing() {
#ifdef __AVX__
  if constexpr (FAR) _mm_sfence();
#endif
}

template <class T, int L, bool FAR>
inline void store(T* p, Vector<T, L> v) {
  if constexpr (L == 1) {
    *p = v;
  } else if constexpr (L == 16) {
    write<FAR>(p, Bits32((rounded(v.even) >> 16) | (rounded(v.odd) & 0xffff0000)));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Bits32 bits = rounded(v) >> 16;
#ifdef __AVX2__
    const __m256i wide = (__m256i)bits;
    const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#else
    const Bits16 half = __builtin_convertvector(bits, Bits16);
#endif
    std::memcpy(p, &half, sizeof half);
  } else if constexpr (std::is_same_v<T, Half>) {
#ifdef __F16C__
    const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &half, sizeof half);
#else
    for (int i = 0; i < L; ++i) p[i] = v[i];
#endif
  } else {
    write<FAR>(p, v);
  }
}

// L numbers of one per channel, and back.
template <int L, class A>
inline typename VectorOf<A, L>::type gathered(const A* p) {
  if constexpr (L == 16) {
    const auto low = read<Pair::Half>(p), high = read<Pair::Half>(p + 8);
    return {__builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14),
            __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15)};
  } else {
    return read<typename VectorOf<A, L>::type>(p);
  }
}
template <class V, class A>
inline void scatter(A* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}
inline void scatter(float* p, const Pair& v) {
  scatter(p, __builtin_shufflevector(v.even, v.odd, 0, 8, 1, 9, 2, 10, 3, 11));
  scatter(p + 8, __builtin_shufflevector(v.even, v.odd, 4, 12, 5, 13, 6, 14, 7, 15));
}

inline double total(double v) { return v; }
inline double total(Doubles v) {
  const Doubles pairs = v + __builtin_shufflevector(v, v, 2, 3, 0, 1);
  return pairs[0] + pairs[1];
}
inline double total(Pair::Half v) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter halves[2];
  std::memcpy(halves, &v, sizeof v);
  return total(__builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles));
}
inline double total(Pair v) { return total(v.even + v.odd); }

template <class V>
inline double total(const V (&v)[4]) {
  return total(V((v[0] + v[1]) + (v[2] + v[3])));
}

}  // namespace mbnorm
