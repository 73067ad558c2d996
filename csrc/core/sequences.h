// How seq_idx cuts the steps of one batch entry into sequences, on the CPU. Steps count in the
// order of the view, whose stride may be negative.
#pragma once

#include <cstdint>

#include "core/compiler.h"
#include "core/tensor.h"

namespace mamba_native {

// Always inlined, because the kernels of several instruction sets include it.
class Sequences {
 public:
  // seq_idx: (B, L) int32 or absent. `count` > 0 numbers the sequences: see entering.
  MAMBA_ALWAYS_INLINE Sequences(const TensorView& seq_idx, std::int64_t batch, std::int64_t length,
                                std::int64_t count)
      : batch_(batch), length_(length), count_(count) {
    if (seq_idx.dim >= 0) {
      step_ = seq_idx.stride[1];
      index_ = static_cast<const std::int32_t*>(seq_idx.data) + batch * seq_idx.stride[0];
    }
  }

  // Whether step t belongs to another sequence than the step before it, or has none.
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

  // The row of the initial states that enters at a step that begins a sequence, and the row of the
  // last states that gets what a step that ends one leaves; negative where there is none. A
  // numbered sequence has a row of its own, otherwise a batch entry has one.
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

}  // namespace mamba_native
