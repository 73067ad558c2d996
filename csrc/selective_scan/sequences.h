// How seq_idx cuts the steps of one batch entry into sequences, on the CPU. Steps count in the
// order of the scan. Not public.
#pragma once

#include <cstdint>

#include "core/compiler.h"
#include "selective_scan/selective_scan.h"

namespace mamba_native::selective_scan {

// Always inlined, because the kernels of several instruction sets include it.
class Sequences {
 public:
  MAMBA_ALWAYS_INLINE Sequences(const Inputs& in, std::int64_t batch)
      : batch_(batch), length_(in.u.size[2]), count_(in.sequences) {
    if (in.seq_idx.dim >= 0 && length_ > 0) {
      step_ = in.seq_idx.stride[1];
      index_ = static_cast<const std::int32_t*>(in.seq_idx.data) + batch * in.seq_idx.stride[0];
      if (in.reverse) {
        index_ += (length_ - 1) * step_;
        step_ = -step_;
      }
    }
  }

  // Whether step t belongs to another sequence than the step visited before it, or has none.
  MAMBA_ALWAYS_INLINE bool begins(std::int64_t t) const {
    return t == 0 || (index_ != nullptr && index_[t * step_] != index_[(t - 1) * step_]);
  }
  MAMBA_ALWAYS_INLINE bool ends(std::int64_t t) const { return t + 1 == length_ || begins(t + 1); }
  // The end of the sequence that has step t, `limit` at most.
  MAMBA_ALWAYS_INLINE std::int64_t end_of(std::int64_t t, std::int64_t limit) const {
    if (index_ == nullptr) {
      return limit;
    }
    do {
      ++t;
    } while (t < limit && !begins(t));
    return t;
  }
  // The beginning of the sequence that has step t, `limit` at least.
  MAMBA_ALWAYS_INLINE std::int64_t begin_of(std::int64_t t, std::int64_t limit) const {
    if (index_ == nullptr) {
      return limit;
    }
    while (t > limit && !begins(t)) {
      --t;
    }
    return t;
  }

  // The row of initial_state that enters at a step that begins a sequence, and the row of
  // last_state that gets what a step that ends one leaves; negative where there is none.
  MAMBA_ALWAYS_INLINE std::int64_t entering(std::int64_t t) const {
    return count_ > 0 ? row(t) : t == 0 ? batch_ : -1;
  }
  MAMBA_ALWAYS_INLINE std::int64_t leaving(std::int64_t t) const {
    return count_ > 0 ? row(t) : t + 1 == length_ ? batch_ : -1;
  }

 private:
  MAMBA_ALWAYS_INLINE std::int64_t row(std::int64_t t) const {
    const std::int64_t index = index_[t * step_];
    return index < count_ ? index : -1;  // a negative index is no row already
  }

  std::int64_t batch_;
  std::int64_t length_;
  std::int64_t count_;
  std::int64_t step_ = 0;
  const std::int32_t* index_ = nullptr;
};

}  // namespace mamba_native::selective_scan
