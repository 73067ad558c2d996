// Memory that a slice of work keeps its tiles in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mamba_native::cpu {

// Floats aligned to a cache line, so that no vector load straddles two.
class Scratch {
 public:
  explicit Scratch(std::int64_t count) : memory_(static_cast<std::size_t>(count + kLine)) {
    const std::uintptr_t misalignment =
        reinterpret_cast<std::uintptr_t>(memory_.data()) % (4 * kLine);
    first_ = memory_.data() + (misalignment == 0 ? 0 : kLine - misalignment / 4);
  }
  float* data() { return first_; }

 private:
  static constexpr std::size_t kLine = 16;
  std::vector<float> memory_;
  float* first_;
};

}  // namespace mamba_native::cpu
