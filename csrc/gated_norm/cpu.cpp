#include "gated_norm/cpu.h"

#include <algorithm>
#include <vector>

#include "core/math.h"
#include "core/parallel_for.h"
#include "gated_norm/reference.h"

namespace mamba_native::gated_norm::cpu {
namespace {

const Kernels& kernels_of(Isa isa) {
  return mamba_native::cpu::kernels_for(isa, kSse2Kernels, kAvx2Kernels, kAvx512Kernels);
}

}  // namespace

std::int64_t blocks(std::int64_t rows) {
  constexpr std::int64_t kRows = 16;
  constexpr std::int64_t kMost = 64;
  return std::min(kMost, ceil_div(rows, kRows));
}

void forward(const ForwardParams& params, Isa isa) {
  if (isa == Isa::plain) {
    reference::forward<float, double>(params);
    return;
  }
  const Kernels& kernels = kernels_of(isa);
  parallel_for(params.x.size[0], grain_of(params.x.size[1]),
               [&](std::int64_t begin, std::int64_t end) {
                 std::vector<float> scratch(static_cast<std::size_t>(scratch_of(params)));
                 kernels.forward(params, begin, end, scratch.data());
               });
}

void backward(const BackwardParams& params, Isa isa) {
  if (isa == Isa::plain) {
    reference::backward<float, double>(params);
    return;
  }
  const Kernels& kernels = kernels_of(isa);
  const std::int64_t rows = params.x.size[0];
  const std::int64_t features = params.x.size[1];
  const std::int64_t count = params.workspace.size[0];
  const std::int64_t rows_of_block = ceil_div(rows, std::max<std::int64_t>(1, count));
  float* const workspace = params.workspace.as<float>();
  parallel_for(count, grain_of(rows_of_block * features),
               [&](std::int64_t begin, std::int64_t end) {
                 std::vector<float> scratch(static_cast<std::size_t>(scratch_of(params)));
                 for (std::int64_t block = begin; block < end; ++block) {
                   std::fill(scratch.begin(), scratch.end(), 0.0f);
                   kernels.backward(params, std::min(rows, block * rows_of_block),
                                    std::min(rows, (block + 1) * rows_of_block), scratch.data(),
                                    workspace + 2 * block * features);
                 }
               });
  const TensorView* const outputs[] = {&params.dweight, &params.dbias};
  for (std::int64_t sum = 0; sum < 2; ++sum) {
    if (!outputs[sum]->present()) {
      continue;
    }
    float* const to = outputs[sum]->as<float>();
    std::fill_n(to, features, 0.0f);
    for (std::int64_t block = 0; block < count; ++block) {
      const float* const from = workspace + (2 * block + sum) * features;
      for (std::int64_t n = 0; n < features; ++n) {
        to[n] += from[n];
      }
    }
  }
}

}  // namespace mamba_native::gated_norm::cpu
