// How the convolution's kernels see their tensors: pointers with 64-bit strides, read and written
// in vectors where the addresses allow it and one element at a time where they do not.
#pragma once

#include <cstdint>
#include <type_traits>

#include "causal_conv1d/plan.h"
#include "core/cuda/math.cuh"
#include "core/cuda/memory.cuh"

namespace mamba_native::causal_conv1d::cuda {

using mamba_native::cuda::fast_silu;
using mamba_native::cuda::fast_silu_grad;

// (B, D, L) or (B, D, W-1); data is null when the tensor is absent.
template <class T>
struct Sequence {
  T* data = nullptr;
  std::int64_t batch = 0, channel = 0, step = 0;
  bool vectorize = false;  // the kernel's vectors of this tensor are aligned

  __device__ __forceinline__ T* at(std::int64_t b, std::int64_t d, std::int64_t t) const {
    return data + b * batch + d * channel + t * step;
  }
};

template <class T>
Sequence<T> sequence(const TensorView& tensor, const Config& config) {
  Sequence<T> out;
  if (tensor.present()) {
    out.data = static_cast<T*>(tensor.data);
    out.batch = tensor.stride[0];
    out.channel = tensor.stride[1];
    out.step = tensor.stride[2];
    out.vectorize = moves_vectors(tensor, config);
  }
  return out;
}

// weight (D, W) and bias (D), of a dtype known at run time. A kernel for any width up to its own
// takes the oldest taps, those before first_tap, as missing: they are neither read nor added.
struct Weights {
  const void* weight = nullptr;
  const void* bias = nullptr;
  DType dtype = DType::f32;
  std::int64_t channel = 0, tap = 0, bias_channel = 0;
  int first_tap = 0;
  bool contiguous = false;  // and aligned to 16 bytes, and no tap is missing
};

// `width`: of the kernel.
inline Weights weights(const TensorView& weight, const TensorView& bias, int width) {
  Weights out;
  out.weight = weight.data;
  out.dtype = weight.dtype;
  out.channel = weight.stride[0];
  out.tap = weight.stride[1];
  out.first_tap = width - static_cast<int>(weight.size[1]);
  out.contiguous = out.first_tap == 0 && weight.is_contiguous() &&
                   reinterpret_cast<std::uintptr_t>(weight.data) % 16 == 0;
  if (bias.present()) {
    out.bias = bias.data;
    out.bias_channel = bias.stride[0];
  }
  return out;
}

// What forward and backward both read.
template <class T>
struct DeviceInputs {
  std::int64_t batch, channels, length;
  Sequence<const T> x, initial_states;
  Weights weights;
  const std::int32_t* seq_idx;  // (B, L) or null
  std::int64_t seq_batch, seq_step;
  bool silu;

  // Columns before x are of position 0's sequence.
  __device__ __forceinline__ int seq(std::int64_t b, std::int64_t t) const {
    return t >= length ? -1 : seq_idx[b * seq_batch + (t < 0 ? 0 : t) * seq_step];
  }

  // Whether a column counts in the final states.
  __device__ __forceinline__ bool is_of_last_sequence(std::int64_t b, std::int64_t t) const {
    if (seq_idx == nullptr) {
      return true;
    }
    const int last = seq(b, length - 1);
    return last >= 0 && seq(b, t) == last;
  }

  // A constant for the kernels of one width.
  template <int WIDTH>
  __device__ __forceinline__ int first_tap() const {
    return WIDTH < kMaxWidth ? 0 : weights.first_tap;
  }
};

// Of the kernel that `config` has for a weight's width.
constexpr int kernel_width(const Config& config, std::int64_t width) {
  return config.any_width                ? kMaxWidth
         : config.axis == Axis::channels ? kWidestOwnKernel
                                         : static_cast<int>(width);
}

template <class T>
DeviceInputs<T> device_inputs(const Inputs& in, const Config& config) {
  DeviceInputs<T> out;
  out.batch = in.x.size[0];
  out.channels = in.x.size[1];
  out.length = in.x.size[2];
  out.x = sequence<const T>(in.x, config);
  out.initial_states = sequence<const T>(in.initial_states, config);
  out.weights = weights(in.weight, in.bias, kernel_width(config, in.weight.size[1]));
  // Without steps there are no indices to read, and the states pass through.
  out.seq_idx = in.seq_idx.present() && out.length > 0
                    ? static_cast<const std::int32_t*>(in.seq_idx.data)
                    : nullptr;
  out.seq_batch = in.seq_idx.stride[0];
  out.seq_step = in.seq_idx.stride[1];
  out.silu = in.silu;
  return out;
}

// The bits of an element, and back to a float.
__device__ __forceinline__ unsigned bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ unsigned bits_of(__half value) { return __half_as_ushort(value); }
__device__ __forceinline__ unsigned bits_of(__nv_bfloat16 value) {
  return __bfloat16_as_ushort(value);
}

// COUNT neighbours as they lie in memory. Converting an element only when it is used keeps the load
// in flight over the work before it, and half the registers free for 16-bit types.
template <class T, int COUNT>
struct Vector {
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  static constexpr int kWords = COUNT / kPerWord;
  static_assert(COUNT % kPerWord == 0, "a vector consists of words");
  unsigned words[kWords];

  __device__ __forceinline__ float operator[](int i) const {
    const unsigned word = words[i / kPerWord];
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(word);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      return __half2float(
          __ushort_as_half(static_cast<unsigned short>(i % 2 == 0 ? word & 0xffffu : word >> 16)));
    }
  }

  __device__ __forceinline__ void set_bits(int i, unsigned bits) {
    words[i / kPerWord] |= bits << (32 / kPerWord * (i % kPerWord));
  }
};

template <int COUNT, class T>
__device__ __forceinline__ Vector<T, COUNT> load_vector(const T* from) {
  Vector<T, COUNT> to;
  constexpr int kWords = Vector<T, COUNT>::kWords;
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 vector = reinterpret_cast<const uint4*>(from)[i / 4];
      to.words[i] = vector.x;
      to.words[i + 1] = vector.y;
      to.words[i + 2] = vector.z;
      to.words[i + 3] = vector.w;
    }
  } else if constexpr (kWords % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      const uint2 vector = reinterpret_cast<const uint2*>(from)[i / 2];
      to.words[i] = vector.x;
      to.words[i + 1] = vector.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      to.words[i] = reinterpret_cast<const unsigned*>(from)[i];
    }
  }
  return to;
}

// Elements `from`, from + step, ...; those from `valid` on are 0 and not read.
template <int COUNT, class T>
__device__ __forceinline__ Vector<T, COUNT> load_elements(const T* from, std::int64_t step,
                                                          int valid) {
  Vector<T, COUNT> to;
#pragma unroll
  for (int i = 0; i < Vector<T, COUNT>::kWords; ++i) {
    to.words[i] = 0;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (i < valid) {
      to.set_bits(i, bits_of(*from));
    }
    from += step;
  }
  return to;
}

template <int COUNT, class T>
__device__ __forceinline__ Vector<T, COUNT> load(const T* from, std::int64_t step, int valid,
                                                 bool vectorize) {
  return vectorize && valid >= COUNT ? load_vector<COUNT>(from)
                                     : load_elements<COUNT>(from, step, valid);
}

// The first `valid` of COUNT floats, rounded to T.
template <int COUNT, class T>
__device__ __forceinline__ void store(T* to, std::int64_t step, int valid, bool vectorize,
                                      const float (&from)[COUNT]) {
  if (vectorize && valid >= COUNT) {
    mamba_native::cuda::store_vector<COUNT>(to, from);
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (i < valid) {
      *to = mamba_native::cuda::from_float<T>(from[i]);
    }
    to += step;
  }
}

// Weights and bias of CHANNELS neighbouring channels.
template <int CHANNELS, int WIDTH>
struct Taps {
  float weight[WIDTH][CHANNELS];
  float bias[CHANNELS];
};

template <class W, int CHANNELS, int WIDTH>
__device__ __forceinline__ void load_taps_as(const Weights& from, std::int64_t d, int valid,
                                             Taps<CHANNELS, WIDTH>& to) {
  const W* weight = static_cast<const W*>(from.weight);
  const W* bias = static_cast<const W*>(from.bias);
  constexpr bool kWholeWords = CHANNELS * WIDTH * sizeof(W) % 4 == 0;
  if constexpr (kWholeWords) {
    if (from.contiguous && valid >= CHANNELS) {
      const Vector<W, CHANNELS * WIDTH> all = load_vector<CHANNELS * WIDTH>(weight + d * WIDTH);
#pragma unroll
      for (int i = 0; i < CHANNELS * WIDTH; ++i) {
        to.weight[i % WIDTH][i / WIDTH] = all[i];
      }
    }
  }
  if (!(kWholeWords && from.contiguous && valid >= CHANNELS)) {
#pragma unroll
    for (int i = 0; i < CHANNELS * WIDTH; ++i) {
      const int c = i / WIDTH;
      const int tap = i % WIDTH - from.first_tap;
      to.weight[i % WIDTH][c] =
          c < valid && tap >= 0
              ? mamba_native::cuda::as_float(weight[(d + c) * from.channel + tap * from.tap])
              : 0.0f;
    }
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    to.bias[c] = bias != nullptr && c < valid
                     ? mamba_native::cuda::as_float(bias[(d + c) * from.bias_channel])
                     : 0.0f;
  }
}

// Channels from `valid` on are 0.
template <int CHANNELS, int WIDTH>
__device__ __forceinline__ void load_taps(const Weights& from, std::int64_t d, int valid,
                                          Taps<CHANNELS, WIDTH>& to) {
  if (from.dtype == DType::f32) {
    load_taps_as<float>(from, d, valid, to);
  } else if (from.dtype == DType::bf16) {
    load_taps_as<__nv_bfloat16>(from, d, valid, to);
  } else {
    load_taps_as<__half>(from, d, valid, to);
  }
}

// The W-1 columns of [initial_states, x] before step t of channel d, oldest first; VECTOR says how
// many steps a vector spans, and t is a multiple of it.
template <int VECTOR, int HALO, class T>
__device__ __forceinline__ void load_halo(const DeviceInputs<T>& in, std::int64_t b, std::int64_t d,
                                          std::int64_t t, float (&halo)[HALO]) {
  static_assert(HALO < 4 && VECTOR >= 4, "four steps before t are whole vectors");
  if (t > 0) {
    if (in.x.vectorize) {
      const Vector<T, 4> before = load_vector<4>(in.x.at(b, d, t - 4));
#pragma unroll
      for (int i = 0; i < HALO; ++i) {
        halo[i] = before[4 - HALO + i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < HALO; ++i) {
        halo[i] = mamba_native::cuda::as_float(*in.x.at(b, d, t - HALO + i));
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < HALO; ++i) {
    halo[i] = in.initial_states.data == nullptr
                  ? 0.0f
                  : mamba_native::cuda::as_float(*in.initial_states.at(b, d, i));
  }
}

// Which columns the outputs of ITEMS steps from t on see, a bit for every step: taps[w] for tap w,
// of which the last is the step itself, seen unless it is padding. Padding sees nothing. The loop
// stays rolled because the indices of all steps in registers would cost kernels without seq_idx
// half of their occupancy.
template <int ITEMS, int WIDTH>
struct Mask {
  static_assert(ITEMS <= 32, "one bit for every step");
  unsigned taps[WIDTH];

  template <class T>
  __device__ __forceinline__ Mask(const DeviceInputs<T>& in, std::int64_t b, std::int64_t t) {
    int seq[WIDTH];  // of the taps
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      taps[w] = 0;
      seq[w] = w == 0 ? 0 : in.seq(b, t - WIDTH + w);
    }
#pragma unroll 1
    for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
      for (int w = 0; w + 1 < WIDTH; ++w) {
        seq[w] = seq[w + 1];
      }
      const int now = in.seq(b, t + i);
      seq[WIDTH - 1] = now;
#pragma unroll
      for (int w = 0; w < WIDTH; ++w) {
        taps[w] |= static_cast<unsigned>(now >= 0 && seq[w] == now) << i;
      }
    }
  }

  __device__ __forceinline__ bool sees(int i, int w) const { return (taps[w] >> i & 1) != 0; }
  __device__ __forceinline__ bool is_padding(int i) const { return !sees(i, WIDTH - 1); }
};

// Column t of [initial_states, x] for COUNT channels from d on.
template <int COUNT, int WIDTH, class T>
__device__ __forceinline__ Vector<T, COUNT> load_column(const DeviceInputs<T>& in, std::int64_t b,
                                                        std::int64_t d, std::int64_t t, int valid) {
  if (t >= 0) {
    return load<COUNT>(in.x.at(b, d, t), in.x.channel, t < in.length ? valid : 0, in.x.vectorize);
  }
  const std::int64_t state = t + (WIDTH - 1 - in.template first_tap<WIDTH>());
  const bool known = in.initial_states.data != nullptr && state >= 0;
  return load<COUNT>(in.initial_states.at(b, d, state), in.initial_states.channel,
                     known ? valid : 0, in.initial_states.vectorize);
}

}  // namespace mamba_native::causal_conv1d::cuda
