#include "ssd/cpu.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "core/cpu/scratch.h"
#include "core/math.h"
#include "core/parallel_for.h"
#include "ssd/reference.h"
#include "ssd/scan_order.h"

namespace mamba_native::ssd::cpu {
namespace {

using mamba_native::cpu::Scratch;

// About how many slices a call is cut into: enough to keep many cores busy and evenly loaded, few
// enough to share C B^T, and in backward the partial sums of dB and dC, among the heads of a slice.
// The cut is a function of the shape alone, so results do not depend on the number of threads.
constexpr std::int64_t kForwardSlices = 16;
constexpr std::int64_t kBackwardSlices = 16;

// Partial dB and dC of all slices take about this many floats (16 MB) at once.
constexpr std::int64_t kPartialFloats = std::int64_t{1} << 22;

const Kernels& kernels_of(Isa isa) {
  return mamba_native::cpu::kernels_for(isa, kSse2Kernels, kAvx2Kernels, kAvx512Kernels);
}

class Slices {
 public:
  Slices(const Inputs& in, std::int64_t wanted)
      : groups_(in.B.size[2]), group_heads_(in.x.size[2] / groups_) {
    const std::int64_t per_group =
        ceil_div(wanted, std::max<std::int64_t>(1, in.x.size[0] * groups_));
    largest_ = ceil_div(group_heads_, std::max<std::int64_t>(1, std::min(per_group, group_heads_)));
    per_group_ = group_heads_ == 0 ? 0 : ceil_div(group_heads_, largest_);
    count_ = in.x.size[0] * groups_ * per_group_;
  }

  std::int64_t count() const { return count_; }
  std::int64_t per_group() const { return per_group_; }
  std::int64_t largest() const { return largest_; }

  // A group's slices are adjacent, a batch entry's groups too.
  Slice operator[](std::int64_t i) const {
    const std::int64_t group = i / per_group_ % groups_;
    const std::int64_t begin = i % per_group_ * largest_;
    return {i / (groups_ * per_group_), group, group * group_heads_ + begin,
            std::min(largest_, group_heads_ - begin)};
  }

 private:
  std::int64_t groups_;
  std::int64_t group_heads_;
  std::int64_t largest_;
  std::int64_t per_group_;
  std::int64_t count_;
};

// What sequences without steps leave; kernels overwrite the rows of the others.
void copy_states(const TensorView& to, const TensorView& from) {
  if (!to.present()) {
    return;
  }
  for (std::int64_t i = 0; i < to.size[0] * to.size[1]; ++i) {
    const std::int64_t row = i / to.size[1], h = i % to.size[1];
    const auto at = [&](const TensorView& tensor, std::int64_t p, std::int64_t n) {
      return tensor.as<float>() + row * tensor.stride[0] + h * tensor.stride[1] +
             p * tensor.stride[2] + n * tensor.stride[3];
    };
    for (std::int64_t p = 0; p < to.size[2]; ++p) {
      for (std::int64_t n = 0; n < to.size[3]; ++n) {
        *at(to, p, n) = from.present() ? *at(from, p, n) : 0.0f;
      }
    }
  }
}

// Whether a state's row may have no step.
bool has_empty_rows(const Inputs& in) { return in.sequences > 0 || in.x.size[1] == 0; }

std::int64_t work_of_slice(const Inputs& in, const Slices& slices) {
  return slices.largest() * in.x.size[1] * in.x.size[3] * in.B.size[3];
}

// What the slices of a backward call keep between stretches of time.
class AllSums {
 public:
  AllSums(const Inputs& in, const Slices& slices)
      : slices_(slices),
        P_(in.x.size[3]),
        state_(P_ * padded(in.B.size[3])),
        carry_(count() * state_),
        scalars_(static_cast<std::size_t>(count() * (2 + P_))) {}

  Sums of_slice(std::int64_t i) {
    const std::int64_t head = i * slices_.largest();
    double* const scalars = scalars_.data();
    return {carry_.data() + head * state_, scalars + head, scalars + count() + head,
            scalars + 2 * count() + head * P_};
  }

 private:
  std::int64_t count() const { return slices_.count() * slices_.largest(); }

  const Slices& slices_;
  std::int64_t P_;
  std::int64_t state_;
  Scratch carry_;
  std::vector<double> scalars_;
};

// Adds the slices' parts of dB or dC for one stretch, in the slices' order.
void add_parts(const TensorView& to, const Slices& slices, const float* parts,
               const Stretch& stretch) {
  const std::int64_t groups = to.size[2], N = to.size[3], width = padded(N);
  const std::int64_t steps = stretch.end - stretch.begin;
  parallel_for(to.size[0] * steps, grain_of(groups * N * slices.per_group()),
               [&](std::int64_t first, std::int64_t last) {
                 for (std::int64_t i = first; i < last; ++i) {
                   const std::int64_t b = i / steps, t = i % steps;
                   for (std::int64_t g = 0; g < groups; ++g) {
                     float* const sum = to.as<float>() + b * to.stride[0] +
                                        (stretch.begin + t) * to.stride[1] + g * to.stride[2];
                     const std::int64_t slice = (b * groups + g) * slices.per_group();
                     std::fill_n(sum, N, 0.0f);
                     for (std::int64_t s = slice; s < slice + slices.per_group(); ++s) {
                       const float* const part = parts + (s * steps + t) * width;
                       for (std::int64_t n = 0; n < N; ++n) {
                         sum[n] += part[n];
                       }
                     }
                   }
                 }
               });
}

// The sums over the batch of what every head has, in the batch's order.
void store_sums(const BackwardParams& params, const Slices& slices, AllSums& all) {
  const std::int64_t heads = params.in.x.size[2], P = params.in.x.size[3];
  const auto at = [](const TensorView& tensor, std::int64_t h) {
    return tensor.as<float>() + h * tensor.stride[0];
  };
  std::vector<double> dA(static_cast<std::size_t>(heads)), ddt_bias = dA;
  std::vector<double> dD(static_cast<std::size_t>(heads * P));
  for (std::int64_t i = 0; i < slices.count(); ++i) {
    const Slice slice = slices[i];
    const Sums sums = all.of_slice(i);
    for (std::int64_t k = 0; k < slice.count; ++k) {
      dA[static_cast<std::size_t>(slice.first + k)] += sums.dA[k];
      ddt_bias[static_cast<std::size_t>(slice.first + k)] += sums.ddt_bias[k];
    }
    for (std::int64_t k = 0; k < slice.count * P; ++k) {
      dD[static_cast<std::size_t>(slice.first * P + k)] += sums.dD[k];
    }
  }
  for (std::int64_t h = 0; h < heads; ++h) {
    *at(params.dA, h) = static_cast<float>(dA[static_cast<std::size_t>(h)]);
    if (params.ddt_bias.present()) {
      *at(params.ddt_bias, h) = static_cast<float>(ddt_bias[static_cast<std::size_t>(h)]);
    }
    double sum = 0;
    for (std::int64_t p = 0; p < P; ++p) {
      const double of_channel = dD[static_cast<std::size_t>(h * P + p)];
      sum += of_channel;
      if (params.dD.dim == 2) {
        at(params.dD, h)[p * params.dD.stride[1]] = static_cast<float>(of_channel);
      }
    }
    if (params.dD.dim == 1) {
      *at(params.dD, h) = static_cast<float>(sum);
    }
  }
}

}  // namespace

void forward(const ForwardParams& given, Isa isa) {
  if (isa == Isa::plain) {
    reference::forward<float>(given);
    return;
  }
  const ForwardParams params = in_scan_order(given);
  const Inputs& in = params.in;
  if (has_empty_rows(in)) {
    copy_states(params.last_states, in.initial_states);
  }
  const Kernels& kernels = kernels_of(isa);
  const Slices slices(in, kForwardSlices);
  const std::int64_t scratch_size = kernels.forward_scratch(in, slices.largest());
  parallel_for(slices.count(), grain_of(work_of_slice(in, slices)),
               [&](std::int64_t begin, std::int64_t end) {
                 Scratch scratch(scratch_size);
                 for (std::int64_t i = begin; i < end; ++i) {
                   kernels.forward(params, slices[i], scratch.data());
                 }
               });
}

void backward(const BackwardParams& given, Isa isa) {
  if (isa == Isa::plain) {
    reference::backward<float>(given);
    return;
  }
  const BackwardParams params = in_scan_order(given);
  const Inputs& in = params.in;
  if (has_empty_rows(in)) {
    copy_states(params.dinitial_states, params.dlast_states);
  }
  const Kernels& kernels = kernels_of(isa);
  const std::int64_t length = in.x.size[1];
  const Slices slices(in, kBackwardSlices);
  AllSums all(in, slices);

  // Backwards through time, a stretch at a time: the partial sums of one stretch bound the memory.
  const std::int64_t step_floats = slices.count() * padded(in.B.size[3]);
  const std::int64_t block_floats =
      std::max<std::int64_t>(1, 2 * step_floats * kCheckpointInterval);
  const std::int64_t blocks = std::max<std::int64_t>(1, kPartialFloats / block_floats);
  std::vector<float> dB_parts(
      static_cast<std::size_t>(step_floats * std::min(length, blocks * kCheckpointInterval)));
  std::vector<float> dC_parts(dB_parts.size());
  const std::int64_t scratch_size = kernels.backward_scratch(in);
  for (Stretch stretch{0, length, nullptr, nullptr}; stretch.end > 0; stretch.end = stretch.begin) {
    const std::int64_t last = (stretch.end - 1) / kCheckpointInterval;
    stretch.begin = std::max<std::int64_t>(0, last + 1 - blocks) * kCheckpointInterval;
    const std::int64_t part_floats = (stretch.end - stretch.begin) * padded(in.B.size[3]);
    parallel_for(slices.count(), grain_of(work_of_slice(in, slices)),
                 [&](std::int64_t begin, std::int64_t end) {
                   Scratch scratch(scratch_size);
                   for (std::int64_t i = begin; i < end; ++i) {
                     Stretch part = stretch;
                     part.dB = dB_parts.data() + i * part_floats;
                     part.dC = dC_parts.data() + i * part_floats;
                     kernels.backward(params, slices[i], part, all.of_slice(i), scratch.data());
                   }
                 });
    add_parts(params.dB, slices, dB_parts.data(), stretch);
    add_parts(params.dC, slices, dC_parts.data(), stretch);
  }
  store_sums(params, slices, all);
}

}  // namespace mamba_native::ssd::cpu
