// How the scan's kernels see their tensors: pointers with 64-bit strides, read eight steps at a
// time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/cuda/math.cuh"
#include "core/cuda/memory.cuh"
#include "core/error.h"
#include "core/tensor.h"
#include "selective_scan/plan.h"
#include "selective_scan/selective_scan.h"

namespace mamba_native::selective_scan::cuda {

using mamba_native::cuda::exp2_approx;
using mamba_native::cuda::fast_sigmoid;
using mamba_native::cuda::fast_silu;
using mamba_native::cuda::fast_silu_grad;
using mamba_native::cuda::fast_softplus;
using mamba_native::cuda::load_vector;
using mamba_native::cuda::recomputed;
using mamba_native::cuda::store_span;
using mamba_native::cuda::store_vector;

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kItems = 8;  // consecutive steps that a thread moves at once

__device__ __forceinline__ void reverse_items(float (&items)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems / 2; ++i) {
    const float item = items[i];
    items[i] = items[kItems - 1 - i];
    items[kItems - 1 - i] = item;
  }
}

__device__ __forceinline__ void unpack(const unsigned (&words)[8], float (&to)[kItems], float) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    to[i] = __uint_as_float(words[i]);
  }
}

__device__ __forceinline__ void unpack(const unsigned (&words)[4], float (&to)[kItems],
                                       __nv_bfloat16) {
#pragma unroll
  for (int i = 0; i < kItems / 2; ++i) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(const unsigned (&words)[4], float (&to)[kItems], __half) {
#pragma unroll
  for (int i = 0; i < kItems / 2; ++i) {
    to[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
    to[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
  }
}

// In a reverse scan a step's stride is negative, and vectors hold their steps last first.

// Whether vectors hold their steps last first; `backwards` decides where a kernel knows both.
template <Scope SCOPE>
__device__ __forceinline__ bool is_mirrored(bool backwards) {
  return SCOPE == Scope::reverse || (SCOPE != Scope::plain && backwards);
}

// kItems steps as they lie in memory. Converting only when they are used lets a load stay in flight
// over the work before it.
template <class T>
struct Items {
  unsigned words[kItems * sizeof(T) / 4];

  __device__ __forceinline__ void floats(float (&to)[kItems], bool mirrored) const {
    unpack(words, to, T());
    if (mirrored) {
      reverse_items(to);
    }
  }
};

// Steps from `valid` on are zero and not read. `mirrored` says that the last step comes first, in
// memory and in the result.
template <class T>
__device__ __forceinline__ Items<T> load_items(const T* from, std::int64_t step, int valid,
                                               bool vectorize, bool mirrored) {
  Items<T> items;
  if (vectorize && valid >= kItems) {
    const T* const lowest = mirrored ? from - (kItems - 1) : from;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(items.words) / 16); ++i) {
      const uint4 vector = reinterpret_cast<const uint4*>(lowest)[i];
      items.words[4 * i] = vector.x;
      items.words[4 * i + 1] = vector.y;
      items.words[4 * i + 2] = vector.z;
      items.words[4 * i + 3] = vector.w;
    }
    return items;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int at = mirrored ? kItems - 1 - i : i;
    if constexpr (sizeof(T) == 4) {
      items.words[i] = at < valid ? __float_as_uint(from[at * step]) : 0u;
    } else {
      const unsigned bits =
          at < valid ? *reinterpret_cast<const unsigned short*>(from + at * step) : 0u;
      items.words[i / 2] = i % 2 == 0 ? bits : items.words[i / 2] | bits << 16;
    }
  }
  return items;
}

// (B, D, L) in T.
template <class T, Scope SCOPE>
struct Sequence {
  T* data = nullptr;
  std::int64_t batch = 0, channel = 0, step = 0;
  bool vectorize = false;  // kItems steps from a multiple of kItems on are whole vectors
  bool backwards = false;  // and the last of them comes first in memory

  __device__ __forceinline__ bool mirrored() const { return is_mirrored<SCOPE>(backwards); }
  __device__ __forceinline__ T* row(int b, int c) const { return data + b * batch + c * channel; }
  // The kItems steps from `first` on, of which `valid` exist.
  __device__ __forceinline__ auto load(int b, int c, std::int64_t first, int valid) const {
    return load_items(row(b, c) + first * step, step, valid, vectorize, mirrored());
  }
  __device__ __forceinline__ void read(int b, int c, std::int64_t first, int valid,
                                       float (&to)[kItems]) const {
    load(b, c, first, valid).floats(to, mirrored());
  }
  __device__ __forceinline__ void store(int b, int c, std::int64_t first, int valid,
                                        const float (&values)[kItems]) const {
    T* const at = row(b, c) + first * step;
    if (mirrored() && vectorize && valid >= kItems) {
      float reversed[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        reversed[i] = values[kItems - 1 - i];
      }
      store_vector<kItems>(at - (kItems - 1), reversed);
    } else {
      store_span(at, step, valid, vectorize, values);
    }
  }
};

// B or C: (B, G, N, L) in T when `varying` is set, (D, N) in float when `constant` is.
template <class T>
struct Coefficient {
  const T* varying = nullptr;
  const float* constant = nullptr;
  std::int64_t batch = 0, group = 0, channel = 0, state = 0, step = 0;
  bool vectorize = false, backwards = false;
};

// (B, D, N), or (D, N) with batch = 0, or (D) with state = 0 too.
template <class Float>
struct Weights {
  Float* data = nullptr;
  std::int64_t batch = 0, channel = 0, state = 0;

  __device__ __forceinline__ Float& at(int b, int c, int n) const {
    return data[b * batch + c * channel + n * state];
  }
  // The value, or zero when the argument is absent.
  __device__ __forceinline__ float get(int b, int c, int n) const {
    return data == nullptr ? 0.0f : at(b, c, n);
  }
};

// A state of row `row`, or zero where there is no such row or no tensor.
__device__ __forceinline__ float state_of(const Weights<const float>& states, int row, int c,
                                          int n) {
  return row < 0 ? 0.0f : states.get(row, c, n);
}

// How seq_idx cuts the steps of a batch entry into sequences: sequences.h on the device.
template <Scope SCOPE>
struct DeviceSequences {
  const int* index = nullptr;  // null: one sequence per batch entry
  std::int64_t batch = 0, step = 0, length = 0;
  int count = 0;  // of the states' rows, where sequences have their own

  __device__ __forceinline__ bool present() const {
    return SCOPE == Scope::packed && index != nullptr;
  }
  // Bit i: begins_at(first + i); kItems + 1 bits.
  __device__ __forceinline__ unsigned begins(int b, std::int64_t first) const {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i <= kItems; ++i) {
      bits |= begins_at(b, first + i) ? 1u << i : 0u;
    }
    return bits;
  }
  // Whether step t belongs to another sequence than the step before it.
  __device__ __forceinline__ bool begins_at(int b, std::int64_t t) const {
    return t > 0 && t < length && at(b, t) != at(b, t - 1);
  }
  // The row of initial_state that enters at a step that begins a sequence, and of last_state that
  // gets what the last step of one leaves; negative where there is none.
  __device__ __forceinline__ int entering(int b, std::int64_t t) const {
    return SCOPE != Scope::packed ? b : count > 0 ? row(b, t) : t == 0 ? b : -1;
  }
  __device__ __forceinline__ int leaving(int b, std::int64_t t) const {
    return SCOPE != Scope::packed ? b : count > 0 ? row(b, t) : t + 1 == length ? b : -1;
  }

 private:
  __device__ __forceinline__ int at(int b, std::int64_t t) const {
    return index[b * batch + t * step];
  }
  __device__ __forceinline__ int row(int b, std::int64_t t) const {
    const int found = at(b, t);
    return found < count ? found : -1;
  }
};

// Bit i: step first + i begins a sequence after another. Every lane of the warp has to ask.
template <int STEPS, Scope SCOPE>
__device__ __forceinline__ unsigned begins_of(const DeviceSequences<SCOPE>& sequences, int b,
                                              std::int64_t first) {
  if constexpr (SCOPE != Scope::packed) {
    return 0u;
  } else {
    static_assert(STEPS == kWarp, "a lane looks at one step");
    const std::int64_t t = first + threadIdx.x % kWarp;
    return __ballot_sync(kAllLanes, sequences.present() && sequences.begins_at(b, t));
  }
}

// What a warp, lane = kItems steps, has to know of the sequences in its tile.
struct Cuts {
  unsigned begins, ends;  // bit i: the lane's step i begins a sequence after another, ends one
                          // before another
  int before, after;      // lanes before and after this one whose scans join this one's
  bool from_start;        // nothing begins up to this lane: the tile's entering state reaches it
  bool to_end;            // nothing ends from this lane on: the tile's entering adjoint reaches it
  bool numbered;          // of the warp: something begins or ends here that has states of its own
  unsigned keep[kItems + 1];  // 0 where step i begins a sequence, else all bits

  // What a step takes over from the step before it, or after it in the adjoint's direction: the
  // value, or a sequence's own where one begins or ends. `own` is zero elsewhere.
  __device__ __forceinline__ float before_step(int i, float value, float own) const {
    return merge(value, keep[i], own);
  }
  __device__ __forceinline__ float after_step(int i, float value, float own) const {
    return merge(value, keep[i + 1], own);
  }

 private:
  // One instruction. A product with 0 would let NaN through.
  __device__ __forceinline__ static float merge(float value, unsigned mask, float own) {
    return __uint_as_float((__float_as_uint(value) & mask) | __float_as_uint(own));
  }
};

template <Scope SCOPE>
__device__ __forceinline__ Cuts cuts_of(const DeviceSequences<SCOPE>& sequences, int b,
                                        std::int64_t first, int lane, bool active) {
  Cuts cuts;
  cuts.begins = cuts.ends = 0u;
  cuts.before = lane;
  cuts.after = kWarp - 1 - lane;
  cuts.from_start = cuts.to_end = true;
  cuts.numbered = false;
#pragma unroll
  for (int i = 0; i <= kItems; ++i) {
    cuts.keep[i] = 0xffffffffu;
  }
  if (sequences.present()) {
    const unsigned begins = active ? sequences.begins(b, first) : 0u;
    cuts.begins = begins & ((1u << kItems) - 1u);
    cuts.ends = begins >> 1;
#pragma unroll
    for (int i = 0; i <= kItems; ++i) {
      cuts.keep[i] = (begins >> i & 1u) - 1u;
    }
    const unsigned left =
        __ballot_sync(kAllLanes, cuts.begins != 0u) & (kAllLanes >> (kWarp - 1 - lane));
    const unsigned ending = __ballot_sync(kAllLanes, cuts.ends != 0u);
    const unsigned right = ending >> lane;
    cuts.numbered = sequences.count > 0 && (ending | __ballot_sync(kAllLanes, begins != 0u)) != 0u;
    if (left != 0u) {
      cuts.from_start = false;
      cuts.before = lane - (kWarp - 1 - __clz(static_cast<int>(left)));
    }
    if (right != 0u) {
      cuts.to_end = false;
      cuts.after = __ffs(static_cast<int>(right)) - 1;
    }
  }
  return cuts;
}

// What forward and backward both read. T is the device's element type.
template <class T, Scope SCOPE>
struct DeviceInputs {
  int channels, channels_per_group, groups, d_state;
  int tiles;  // of kCheckpointInterval steps
  std::int64_t length;
  Sequence<const T, SCOPE> u, delta, z;
  Coefficient<T> B, C;
  Weights<const float> A, D, delta_bias, initial_state;
  DeviceSequences<SCOPE> sequences;
  bool delta_softplus;
};

// Where checkpoints, (B, D, tiles, N), keep the states that enter a tile.
template <class Inputs>
__device__ __forceinline__ std::int64_t checkpoint_offset(const Inputs& in, int b, int c,
                                                          int tile) {
  return ((static_cast<std::int64_t>(b) * in.channels + c) * in.tiles + tile) * in.d_state;
}

// A stride that only a size of one uses says nothing about alignment.
inline std::int64_t stride_of(const TensorView& tensor, int dim) {
  return tensor.size[dim] == 1 ? 0 : tensor.stride[dim];
}

// Whether kItems steps from a multiple of kItems on are whole vectors, in either direction of time.
inline bool can_vectorize(const TensorView& tensor) {
  const std::int64_t item = size_of(tensor.dtype);
  const std::int64_t step = tensor.stride[tensor.dim - 1];
  const std::uintptr_t lowest = reinterpret_cast<std::uintptr_t>(tensor.data) -
                                static_cast<std::uintptr_t>(step < 0 ? (kItems - 1) * item : 0);
  bool aligned = (step == 1 || step == -1) && lowest % 16 == 0;
  for (int i = 0; i + 1 < tensor.dim; ++i) {
    aligned = aligned && stride_of(tensor, i) * item % 16 == 0;
  }
  return aligned;
}

template <class T, Scope SCOPE>
Sequence<T, SCOPE> sequence(const TensorView& tensor) {
  Sequence<T, SCOPE> out;
  if (tensor.present()) {
    out.data = static_cast<T*>(tensor.data);
    out.batch = tensor.stride[0];
    out.channel = tensor.stride[1];
    out.step = tensor.stride[2];
    out.vectorize = can_vectorize(tensor);
    out.backwards = out.vectorize && out.step < 0;
  }
  return out;
}

template <class T>
Coefficient<T> coefficient(const TensorView& tensor) {
  Coefficient<T> out;
  if (tensor.dim == 2) {
    out.constant = static_cast<const float*>(tensor.data);
    out.channel = tensor.stride[0];
    out.state = tensor.stride[1];
  } else {
    out.varying = static_cast<const T*>(tensor.data);
    out.batch = tensor.stride[0];
    out.group = tensor.stride[1];
    out.state = tensor.stride[2];
    out.step = tensor.stride[3];
    out.vectorize = can_vectorize(tensor);
    out.backwards = out.vectorize && out.step < 0;
  }
  return out;
}

template <class Float>
Weights<Float> weights(const TensorView& tensor) {
  Weights<Float> out;
  if (tensor.present()) {
    out.data = static_cast<Float*>(tensor.data);
    out.batch = tensor.dim == 3 ? tensor.stride[0] : 0;
    out.channel = tensor.stride[tensor.dim == 3 ? 1 : 0];
    out.state = tensor.dim == 1 ? 0 : tensor.stride[tensor.dim - 1];
  }
  return out;
}

// Offsets have 64 bits; what the kernels count in 32 is checked here.
inline int count(std::int64_t size) {
  MAMBA_CHECK(size <= 0x7fffff00, "selective_scan: ", size, " exceeds what a CUDA launch counts");
  return static_cast<int>(size);
}

template <Scope SCOPE>
DeviceSequences<SCOPE> device_sequences(const Inputs& in) {
  DeviceSequences<SCOPE> out;
  out.length = in.u.size[2];
  out.count = count(in.sequences);
  if (in.seq_idx.present()) {
    out.index = in.seq_idx.as<const int>();
    out.batch = in.seq_idx.stride[0];
    out.step = in.seq_idx.stride[1];
  }
  return out;
}

template <class T, Scope SCOPE>
DeviceInputs<T, SCOPE> device_inputs(const Inputs& in, std::int64_t groups) {
  DeviceInputs<T, SCOPE> out;
  out.channels = count(in.u.size[1]);
  out.channels_per_group = count(in.u.size[1] / groups);
  out.groups = count(groups);
  out.d_state = count(in.A.size[1]);
  out.length = in.u.size[2];
  out.tiles = count(ceil_div(out.length, kCheckpointInterval));
  out.u = sequence<const T, SCOPE>(in.u);
  out.delta = sequence<const T, SCOPE>(in.delta);
  out.z = sequence<const T, SCOPE>(in.z);
  out.B = coefficient<T>(in.B);
  out.C = coefficient<T>(in.C);
  out.A = weights<const float>(in.A);
  out.D = weights<const float>(in.D);
  out.delta_bias = weights<const float>(in.delta_bias);
  out.initial_state = weights<const float>(in.initial_state);
  out.delta_softplus = in.delta_softplus;
  out.sequences = device_sequences<SCOPE>(in);
  return out;
}

// Steps of [first, first + kItems) that lie before `length`.
__device__ __forceinline__ int valid_items(std::int64_t length, std::int64_t first) {
  const std::int64_t left = length - first;
  return left >= kItems ? kItems : (left > 0 ? static_cast<int>(left) : 0);
}

// delta as the recurrence uses it. A step beyond the end has delta = 0 and u = 0: it multiplies the
// state by one and adds nothing, so tails need no branch in the scans.
__device__ __forceinline__ void discretise(float (&delta)[kItems], float bias, bool softplus,
                                           int valid) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const float value = delta[i] + bias;
    delta[i] = i < valid ? (softplus ? fast_softplus(value) : value) : 0.0f;
  }
}

// B or C of one (batch, channel): row n at steps from `first` on.
template <class T, Scope SCOPE>
struct CoefficientRows {
  const T* varying;
  const float* constant;
  std::int64_t state, step;
  bool vectorize, mirrored;

  __device__ __forceinline__ CoefficientRows(const Coefficient<T>& all, int b, int group,
                                             int channel)
      : varying(all.varying + b * all.batch + group * all.group),
        constant(all.constant == nullptr ? nullptr : all.constant + channel * all.channel),
        state(all.state),
        step(all.step),
        vectorize(all.vectorize),
        mirrored(is_mirrored<SCOPE>(all.backwards)) {}

  // What `values` needs; rows beyond d_state are asked for with valid = 0.
  __device__ __forceinline__ Items<T> load(int n, std::int64_t first, int valid) const {
    return load_items(varying + n * state + first * step, step, constant == nullptr ? valid : 0,
                      vectorize, mirrored);
  }
  __device__ __forceinline__ void values(const Items<T>& loaded, int n, bool exists,
                                         float (&to)[kItems]) const {
    if (constant == nullptr) {
      loaded.floats(to, mirrored);
      return;
    }
    const float value = exists ? constant[n * state] : 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      to[i] = value;
    }
  }
};

}  // namespace mamba_native::selective_scan::cuda
