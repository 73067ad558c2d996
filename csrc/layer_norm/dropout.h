// Dropout that stores nothing: whether an element stays follows from the seed, the branch and the
// element's place, so that backward asks again, and every device gives the same answer.
//
// The random words are Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
// 2, 3"), a bijection of the counter, different for every key. Key: the seed. Counter: four
// neighbouring columns, the branch and the row.
#pragma once

#include <cstdint>

#include "core/compiler.h"

namespace mamba_native::layer_norm {

struct Philox {
  std::uint32_t words[4];
};

MAMBA_HOST_DEVICE MAMBA_ALWAYS_INLINE Philox philox(Philox counter, std::uint64_t key) {
  std::uint32_t key0 = static_cast<std::uint32_t>(key);
  std::uint32_t key1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xd2511f53u} * counter.words[0];
    const std::uint64_t b = std::uint64_t{0xcd9e8d57u} * counter.words[2];
    counter = {{static_cast<std::uint32_t>(b >> 32) ^ counter.words[1] ^ key0,
                static_cast<std::uint32_t>(b),
                static_cast<std::uint32_t>(a >> 32) ^ counter.words[3] ^ key1,
                static_cast<std::uint32_t>(a)}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter;
}

// What every element of a call shares.
struct Dropout {
  std::uint32_t threshold = 0;  // of 2^24: random numbers below it drop their element; 0: none
  float scale = 1.0f;           // of what stays: 1 / (1 - p)
};

MAMBA_ALWAYS_INLINE Dropout dropout_of(double p) {
  Dropout dropout;
  if (p > 0.0) {
    dropout.threshold = static_cast<std::uint32_t>(p * 16777215.0 + 1.0);
  }
  dropout.scale = p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f;
  return dropout;
}

// Columns that share a counter.
inline constexpr int kDropoutGroup = 4;

// Bit i: column kDropoutGroup * group + i of the row stays. Branch 0 is x, branch 1 is x1.
MAMBA_HOST_DEVICE MAMBA_ALWAYS_INLINE unsigned kept(const Dropout& dropout, std::uint64_t seed,
                                                    unsigned branch, std::int64_t row,
                                                    std::int64_t group) {
  const Philox random =
      philox({{static_cast<std::uint32_t>(group), branch, static_cast<std::uint32_t>(row),
               static_cast<std::uint32_t>(row >> 32)}},
             seed);
  unsigned bits = 0;
  for (int i = 0; i < kDropoutGroup; ++i) {
    bits |= (random.words[i] >> 8 >= dropout.threshold ? 1u : 0u) << i;
  }
  return bits;
}

}  // namespace mamba_native::layer_norm
