// From torch's tensors to plain arrays, through torch's stable ABI.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>

#include "cpu_kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mbnorm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Optional = std::optional<Tensor>;

template <class A>
A* data(const Tensor& t) {
  return static_cast<A*>(t.data_ptr());
}

inline int64_t bytes_of(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

[[gnu::cold]] inline bool is_channels_last(const Tensor& x) {
  const int64_t dims = x.dim();
  int64_t expected = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t d = i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Of a walkable tensor.
inline Layout layout_of(const Tensor& x) {
  const int64_t batch = x.size(0), channels = x.size(1), plane = x.numel() / (batch * channels);
  if (channels == 1) return {false, 1, 1, batch * plane};
  return {!x.is_contiguous() || (plane == 1 && channels >= FEWEST_CHANNELS), batch, channels, plane};
}

[[gnu::cold]] inline Tensor empty(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                  const Tensor& type) {
  int32_t dtype;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(type.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The first touch of a fresh page costs more than all that is computed on it: ask for large ones.
inline void prefer_huge_pages([[maybe_unused]] const Tensor& t, [[maybe_unused]] int64_t value_bytes) {
#ifdef __linux__
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()), end = begin + t.numel() * value_bytes;
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, last = end / PAGE * PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline Tensor like(const Tensor& x) {
  const Tensor t = empty(x.dim(), x.sizes().data(), x.strides().data(), x);
  prefer_huge_pages(t, bytes_of(x.scalar_type()));
  return t;
}

inline Tensor vector(int64_t size, const Tensor& type) {
  const int64_t one = 1;
  return empty(1, &size, &one, type);
}

inline Tensor matrix(int64_t rows, int64_t columns, const Tensor& type) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return empty(2, sizes, strides, type);
}

// `x` itself if there are kernels for it, or a copy: channels first, of other strides or too few channels for
// a vector; in float32, of half values in planes too small for one, which go value by value.
[[gnu::cold]] inline Tensor walkable(const Tensor& x) {
  STD_TORCH_CHECK(x.numel() > 0, "expected an input with values, got none");
  const bool first = x.is_contiguous(), last = is_channels_last(x) && x.size(1) >= FEWEST_CHANNELS;
  const Tensor dense = first || last ? x : torch::stable::contiguous(x);
  const bool half = x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16;
  const Layout at = layout_of(dense);
  if (!half || at.channels_last || at.plane >= SMALLEST_HALF_PLANE) return dense;
  return torch::stable::to(dense, ScalarType::Float);
}

// `t` in the type and with the strides of the walkable `model`.
[[gnu::cold]] inline Tensor arranged(const Tensor& t, const Tensor& model) {
  if (t.scalar_type() == model.scalar_type() && same_strides(t, model)) return t;
  Tensor copy = like(model);
  torch::stable::copy_(copy, t);
  return copy;
}

// `t`, computed from the walkable `source` of `x`, in the type and memory format of `x`.
[[gnu::cold]] inline Tensor restored(const Tensor& t, const Tensor& source, const Tensor& x) {
  if (source.get() == x.get()) return t;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, t);
  return copy;
}

template <class A>
bool has_type(const Tensor& t) {
  return t.scalar_type() == (sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
}

// The values of a statistic or parameter, which may be absent.
template <class A>
struct Values {
  Optional held;
  const A* p = nullptr;

  Values(const Optional& t, int64_t size) {
    if (!t) return;
    STD_TORCH_CHECK(t->numel() == size, "expected statistics and parameters of ", size, " values");
    STD_TORCH_CHECK(has_type<A>(*t),
                    "statistics and parameters must be float64 for a float64 input, float32 for others");
    held = t->is_contiguous() ? *t : torch::stable::contiguous(*t);
    p = data<A>(*held);
  }
};

// The values of a state that is written in place.
template <class A>
A* state(const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == size && has_type<A>(t), "expected contiguous state of ",
                  size, " values, in float64 for a float64 input, in float32 for others");
  return data<A>(t);
}

inline int64_t* counter(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == 1, "expected int64 counters");
  return data<int64_t>(t);
}

// Call f(a zero of the type of statistics, type of the values) for a walkable tensor.
template <class F>
void dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float(), Type::Float);
    case ScalarType::BFloat16:
      return f(float(), Type::BFloat16);
    case ScalarType::Half:
      return f(float(), Type::Half);
    case ScalarType::Double:
      return f(double(), Type::Double);
    default:
      STD_TORCH_CHECK(false, "expected a float32, float64, bfloat16 or float16 input");
  }
}

}  // namespace mbnorm
