#include "selective_scan/cpu.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "core/cpu/scratch.h"
#include "core/error.h"
#include "core/math.h"
#include "core/parallel_for.h"
#include "selective_scan/scan_order.h"

namespace mamba_native::selective_scan::cpu {
namespace {

using mamba_native::cpu::Scratch;

// About how many slices a call is cut into: enough to keep many cores busy and evenly loaded, few
// enough to share the conversion of B and C, and in backward the partial sums of dB and dC, among
// the channels of a slice. The cut is a function of the shape alone, so results do not depend on
// the number of threads.
constexpr std::int64_t kForwardSlices = 64;
constexpr std::int64_t kBackwardSlices = 32;

// Partial dB and dC of all slices take about this many floats (4 MB) at once.
constexpr std::int64_t kPartialFloats = std::int64_t{1} << 20;

const Kernels& kernels_of(Isa isa) {
  return mamba_native::cpu::kernels_for(isa, kSse2Kernels, kAvx2Kernels, kAvx512Kernels);
}

class Slices {
 public:
  Slices(const Inputs& in, int lanes, std::int64_t wanted)
      : lanes_(lanes), channels_(in.u.size[1]) {
    const std::int64_t groups = is_varying(in.B)   ? in.B.size[1]
                                : is_varying(in.C) ? in.C.size[1]
                                                   : 1;
    group_channels_ = channels_ / groups;
    const std::int64_t blocks = ceil_div(group_channels_, lanes);
    const std::int64_t all_blocks = in.u.size[0] * groups * blocks;
    slice_blocks_ = std::min(std::max<std::int64_t>(blocks, 1),
                             ceil_div(std::max<std::int64_t>(all_blocks, 1), wanted));
    group_slices_ = ceil_div(blocks, slice_blocks_);
    batch_slices_ = groups * group_slices_;
    count_ = in.u.size[0] * batch_slices_;
  }

  std::int64_t count() const { return count_; }
  std::int64_t per_group() const { return group_slices_; }
  std::int64_t largest() const { return slice_blocks_ * lanes_; }

  Slice operator[](std::int64_t i) const {
    const std::int64_t within_batch = i % batch_slices_;
    const std::int64_t group = within_batch / group_slices_;
    const std::int64_t begin = within_batch % group_slices_ * largest();
    return {i / batch_slices_, group, group * group_channels_ + begin,
            std::min(largest(), group_channels_ - begin)};
  }

  // The slice that has a channel of a batch entry, and the channel's place in it.
  std::int64_t index_of(std::int64_t batch, std::int64_t channel) const {
    return batch * batch_slices_ + channel / group_channels_ * group_slices_ +
           channel % group_channels_ / largest();
  }
  std::int64_t place_of(std::int64_t channel) const {
    return channel % group_channels_ % largest();
  }

 private:
  std::int64_t lanes_;
  std::int64_t channels_;
  std::int64_t group_channels_;
  std::int64_t slice_blocks_;
  std::int64_t group_slices_;
  std::int64_t batch_slices_;
  std::int64_t count_;
};

// What the slices of a backward call keep between segments, in the kernels' layout.
class Quantities {
 public:
  Quantities(const Slices& slices, std::int64_t lanes, std::int64_t states)
      : slices_(slices),
        lanes_(lanes),
        states_(states),
        slice_floats_(slices.largest() * (kQuantities * states + kLaneSums)),
        memory_(slices.count() * slice_floats_) {}

  float* of_slice(std::int64_t i) { return memory_.data() + i * slice_floats_; }

  float& at(Quantity quantity, std::int64_t batch, std::int64_t channel, std::int64_t state) {
    const std::int64_t place = slices_.place_of(channel);
    return block(batch, channel)[(quantity * states_ + state) * lanes_ + place % lanes_];
  }
  float& at(LaneSum sum, std::int64_t batch, std::int64_t channel) {
    const std::int64_t place = slices_.place_of(channel);
    return block(batch, channel)[(kQuantities * states_ + sum) * lanes_ + place % lanes_];
  }

 private:
  float* block(std::int64_t batch, std::int64_t channel) {
    return of_slice(slices_.index_of(batch, channel)) +
           slices_.place_of(channel) / lanes_ * lanes_ * (kQuantities * states_ + kLaneSums);
  }

  const Slices& slices_;
  std::int64_t lanes_;
  std::int64_t states_;
  std::int64_t slice_floats_;
  Scratch memory_;
};

float* address(const TensorView& tensor, std::int64_t i, std::int64_t j) {
  return tensor.as<float>() + i * tensor.stride[0] + j * tensor.stride[1];
}

// Of (D, N).
float& element(const Inputs& in, const TensorView& tensor, std::int64_t d, std::int64_t row) {
  return tensor.as<float>()[d * tensor.stride[0] + rows_of(in, tensor, 1).offset(row)];
}

// What sequences without steps leave; kernels overwrite the rows of the others.
void copy_states(const Inputs& in, const TensorView& to, const TensorView& from) {
  for (std::int64_t row = 0; to.present() && row < to.size[0]; ++row) {
    for (std::int64_t d = 0; d < to.size[1]; ++d) {
      for (std::int64_t n = 0; n < count_rows(in); ++n) {
        address(to, row, d)[rows_of(in, to, 2).offset(n)] =
            from.present() ? address(from, row, d)[rows_of(in, from, 2).offset(n)] : 0.0f;
      }
    }
  }
}

// Whether a state's row may have no step.
bool has_empty_rows(const Inputs& in) { return in.sequences > 0 || in.u.size[2] == 0; }

// Adds the slices' parts of dB or dC for one segment, in the slices' order. `to` is contiguous but
// for the direction of time.
void add_parts(const TensorView& to, const Slices& slices, const std::vector<float>& parts,
               std::int64_t begin, std::int64_t end) {
  const std::int64_t parts_of_number = to.dim - 3;
  const std::int64_t states = to.size[2] * parts_of_number;
  const std::int64_t length = to.size[3];
  const std::int64_t time = to.stride[3];  // 1, or 2 for complex numbers; negative in reverse scans
  const std::int64_t part_steps = ceil_div(end - begin, kCheckpointInterval) * kCheckpointInterval;
  parallel_for(
      to.size[0] * to.size[1] * states, grain_of(slices.per_group() * (end - begin)),
      [&](std::int64_t first, std::int64_t last) {
        std::vector<float> sum(static_cast<std::size_t>(end - begin));
        for (std::int64_t row = first; row < last; ++row) {
          std::fill(sum.begin(), sum.end(), 0.0f);
          for (std::int64_t s = 0; s < slices.per_group(); ++s) {
            const std::int64_t slice = row / states * slices.per_group() + s;
            const float* part = parts.data() + (slice * states + row % states) * part_steps;
            for (std::int64_t t = 0; t < end - begin; ++t) {
              sum[static_cast<std::size_t>(t)] += part[t];
            }
          }
          float* const at = to.as<float>() + row / parts_of_number * parts_of_number * length +
                            row % parts_of_number + begin * time;
          for (std::int64_t t = 0; t < end - begin; ++t) {
            at[t * time] = sum[static_cast<std::size_t>(t)];
          }
        }
      });
}

}  // namespace

void forward(const ForwardParams& given, Isa isa) {
  const ForwardParams params = in_scan_order(given);
  if (has_empty_rows(params.in)) {
    copy_states(params.in, params.last_state, params.in.initial_state);
  }
  if (isa == Isa::plain) {
    plain::forward(params);
    return;
  }
  const Kernels& kernels = kernels_of(isa);
  const Slices slices(params.in, kernels.lanes, kForwardSlices);
  const std::int64_t states = count_rows(params.in);
  const std::int64_t scratch_size = kernels.forward_scratch(states, slices.largest());
  const std::int64_t slice_grain = grain_of(slices.largest() * params.in.u.size[2] * states);
  parallel_for(slices.count(), slice_grain, [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(scratch_size);
    for (std::int64_t i = begin; i < end; ++i) {
      kernels.forward(params, slices[i], scratch.data());
    }
  });
}

void backward(const BackwardParams& given, Isa isa) {
  if (isa == Isa::plain) {
    plain::backward(given);
    return;
  }
  const BackwardParams params = in_scan_order(given);
  if (has_empty_rows(params.in)) {
    copy_states(params.in, params.dinitial_state, params.dlast_state);
  }
  const Kernels& kernels = kernels_of(isa);
  const Inputs& in = params.in;
  const std::int64_t batch = in.u.size[0];
  const std::int64_t channels = in.u.size[1];
  const std::int64_t length = in.u.size[2];
  const std::int64_t states = count_rows(in);
  const Slices slices(in, kernels.lanes, kBackwardSlices);
  Quantities quantities(slices, kernels.lanes, states);

  // Backwards through time, a segment at a time: the partial sums of one segment bound the memory.
  const bool varying_B = is_varying(in.B);
  const bool varying_C = is_varying(in.C);
  const std::int64_t tiles = ceil_div(length, kCheckpointInterval);
  const std::int64_t tile_floats =
      slices.count() * states * kCheckpointInterval * (int{varying_B} + int{varying_C});
  const std::int64_t segment_tiles = tile_floats == 0
                                         ? std::max<std::int64_t>(tiles, 1)
                                         : std::max<std::int64_t>(1, kPartialFloats / tile_floats);
  const std::int64_t scratch_size = kernels.backward_scratch(states, slices.largest());
  const std::int64_t slice_grain = grain_of(slices.largest() * length * states);
  const std::size_t all_parts = static_cast<std::size_t>(
      slices.count() * states * std::min(tiles, segment_tiles) * kCheckpointInterval);
  std::vector<float> dB_parts(varying_B ? all_parts : 0);
  std::vector<float> dC_parts(varying_C ? all_parts : 0);
  for (std::int64_t last = tiles; last > 0; last -= std::min(last, segment_tiles)) {
    const std::int64_t first = std::max<std::int64_t>(0, last - segment_tiles);
    const std::int64_t part_floats = states * (last - first) * kCheckpointInterval;
    parallel_for(slices.count(), slice_grain, [&](std::int64_t begin, std::int64_t end) {
      Scratch scratch(scratch_size);
      for (std::int64_t i = begin; i < end; ++i) {
        Segment segment = {first, last, nullptr, nullptr};
        if (varying_B) {
          segment.dB = dB_parts.data() + i * part_floats;
          std::fill_n(segment.dB, part_floats, 0.0f);
        }
        if (varying_C) {
          segment.dC = dC_parts.data() + i * part_floats;
          std::fill_n(segment.dC, part_floats, 0.0f);
        }
        kernels.backward(params, slices[i], segment, quantities.of_slice(i), scratch.data());
      }
    });
    const std::int64_t begin = first * kCheckpointInterval;
    const std::int64_t end = std::min(length, last * kCheckpointInterval);
    if (varying_B) {
      add_parts(params.dB, slices, dB_parts, begin, end);
    }
    if (varying_C) {
      add_parts(params.dC, slices, dC_parts, begin, end);
    }
  }

  // Sums over the batch, in its order.
  parallel_for(channels, grain_of(batch * states), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t d = begin; d < end; ++d) {
      for (std::int64_t n = 0; n < states; ++n) {
        float dA = 0, dB = 0, dC = 0;
        for (std::int64_t b = 0; b < batch; ++b) {
          dA += quantities.at(kSumA, b, d, n);
          dB += quantities.at(kSumB, b, d, n);
          dC += quantities.at(kSumC, b, d, n);
        }
        element(in, params.dA, d, n) = dA;
        if (!varying_B) {
          element(in, params.dB, d, n) = dB;
        }
        if (!varying_C) {
          element(in, params.dC, d, n) = dC;
        }
      }
      float dD = 0, ddelta_bias = 0;
      for (std::int64_t b = 0; b < batch; ++b) {
        dD += quantities.at(kSumD, b, d);
        ddelta_bias += quantities.at(kSumBias, b, d);
      }
      if (params.dD.present()) {
        params.dD.as<float>()[d * params.dD.stride[0]] = dD;
      }
      if (params.ddelta_bias.present()) {
        params.ddelta_bias.as<float>()[d * params.ddelta_bias.stride[0]] = ddelta_bias;
      }
    }
  });
}

}  // namespace mamba_native::selective_scan::cpu
