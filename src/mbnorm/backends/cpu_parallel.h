// torch's threads, through its stable C interface: its C++ headers take seconds to compile.

#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

namespace mbnorm {

// Call f(first, last) on parts of [begin, end), in parallel where they have `grain` items.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end - begin <= grain) {
    if (begin < end) f(begin, end);
    return;
  }
  const auto call = [](int64_t first, int64_t last, void* held) {
    (*static_cast<const F*>(held))(first, last);
  };
  if (torch_parallel_for(begin, end, grain, call, const_cast<void*>(static_cast<const void*>(&f))))
    f(begin, end);
}

}  // namespace mbnorm
