// How the chunked scan's kernels see their tensors, and what they all do with a chunk of steps.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/cuda/alignment.h"
#include "core/cuda/launch.h"
#include "core/cuda/math.cuh"
#include "core/cuda/matrix.cuh"
#include "core/cuda/memory.cuh"
#include "core/error.h"
#include "core/math.h"
#include "core/tensor.h"
#include "ssd/plan.h"
#include "ssd/ssd.h"

namespace mamba_native::ssd::cuda {

using mamba_native::cuda::as_float;
using mamba_native::cuda::exp2_approx;
using mamba_native::cuda::fast_sigmoid;
using mamba_native::cuda::fast_silu;
using mamba_native::cuda::fast_silu_grad;
using mamba_native::cuda::fast_softplus;
using mamba_native::cuda::fragment_column;
using mamba_native::cuda::fragment_row;
using mamba_native::cuda::from_float;
using mamba_native::cuda::load_span;
using mamba_native::cuda::load_vector;
using mamba_native::cuda::multiply;
using mamba_native::cuda::Order;
using mamba_native::cuda::recomputed;
using mamba_native::cuda::store_pair;
using mamba_native::cuda::store_span;
using mamba_native::cuda::store_vector;

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// CTAs for which a multiprocessor has registers; Turing's has shared memory for one only.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr int kCtas = 1;
#else
inline constexpr int kCtas = 2;
#endif

// ---- tensors ----

// (B, L, H or G, P or N) in T. In a reverse scan `step` is negative.
template <class T>
struct Steps {
  T* data = nullptr;
  std::int64_t batch = 0, step = 0, head = 0, element = 0;
  bool vectorize = false;  // 16 bytes may move whole

  __device__ __forceinline__ T* at(int b, std::int64_t t, int h, int first) const {
    return data + b * batch + t * step + h * head + first * element;
  }
};

// (B, L, H) in T or float32.
struct Rates {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t batch = 0, step = 0, head = 0;

  __device__ __forceinline__ std::int64_t offset(int b, std::int64_t t, int h) const {
    return b * batch + t * step + h * head;
  }
};

// (rows, H, P, N) in float32.
struct States {
  float* data = nullptr;
  std::int64_t row = 0, head = 0, channel = 0, state = 0;

  __device__ __forceinline__ float& at(int r, int h, int p, int n) const {
    return data[r * row + h * head + p * channel + n * state];
  }
};

// (H) or (H, P) in float32; zero when absent.
struct Weights {
  const float* data = nullptr;
  std::int64_t head = 0, channel = 0;

  __device__ __forceinline__ float at(int h, int p) const {
    return data == nullptr ? 0.0f : data[h * head + p * channel];
  }
};

// How seq_idx cuts the steps of a batch entry into sequences: core/sequences.h on the device.
struct DeviceSequences {
  const int* index = nullptr;  // null: one sequence per batch entry
  std::int64_t batch = 0, step = 0, length = 0;
  int count = 0;  // of the states' rows, where sequences have their own

  __device__ __forceinline__ bool begins(int b, std::int64_t t) const {
    return t == 0 || (index != nullptr && at(b, t) != at(b, t - 1));
  }
  __device__ __forceinline__ bool ends(int b, std::int64_t t) const {
    return t + 1 == length || begins(b, t + 1);
  }
  // The row of the initial states that enters at a step that begins a sequence, and of the last
  // states that gets what a step that ends one leaves; negative where there is none.
  __device__ __forceinline__ int entering(int b, std::int64_t t) const {
    return count > 0 ? row(b, t) : t == 0 ? b : -1;
  }
  __device__ __forceinline__ int leaving(int b, std::int64_t t) const {
    return count > 0 ? row(b, t) : t + 1 == length ? b : -1;
  }
  // Where the steps of one sequence from `begin` on end, `limit` at most; and where those up to
  // `end` begin, `limit` at least. The whole warp has to ask.
  __device__ __forceinline__ std::int64_t end_of(int b, std::int64_t begin,
                                                 std::int64_t limit) const {
    for (std::int64_t t = begin + 1; index != nullptr && t < limit; t += kWarp) {
      const std::int64_t mine = t + threadIdx.x % kWarp;
      const unsigned found = __ballot_sync(kAllLanes, mine < limit && begins(b, mine));
      if (found != 0u) {
        return t + __ffs(static_cast<int>(found)) - 1;
      }
    }
    return limit;
  }
  __device__ __forceinline__ std::int64_t begin_of(int b, std::int64_t end,
                                                   std::int64_t limit) const {
    for (std::int64_t t = end - 1; index != nullptr && t > limit; t -= kWarp) {
      const std::int64_t mine = t - threadIdx.x % kWarp;
      const unsigned found = __ballot_sync(kAllLanes, mine > limit && begins(b, mine));
      if (found != 0u) {
        return t - __ffs(static_cast<int>(found)) + 1;
      }
    }
    return limit;
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

// What forward and backward both read. T is the device's element type.
template <class T>
struct DeviceInputs {
  int batch, heads, heads_per_group, headdim, states;
  std::int64_t length;
  Steps<const T> x, B, C, z;
  Rates dt;
  Weights A, D, dt_bias;
  States initial_states;
  DeviceSequences sequences;
  bool dt_softplus;
  float dt_min, dt_max;

  // delta, and its derivative by dt.
  __device__ __forceinline__ float discretise(int b, std::int64_t t, int h, float* slope) const {
    const float raw =
        mamba_native::cuda::load_weight(dt.data, dt.dtype, dt.offset(b, t, h)) + dt_bias.at(h, 0);
    const float free = dt_softplus ? fast_softplus(raw) : raw;
    const bool outside = free < dt_min || free > dt_max;
    *slope = outside ? 0.0f : dt_softplus && raw <= kSoftplusThreshold ? fast_sigmoid(raw) : 1.0f;
    return free < dt_min ? dt_min : free > dt_max ? dt_max : free;
  }
};

// Where checkpoints keep the state (P, N) before block k.
template <class T>
__device__ __forceinline__ States checkpoint(const DeviceInputs<T>& in, float* data, int b,
                                             std::int64_t k) {
  const std::int64_t blocks = ceil_div(in.length, kCheckpointInterval);
  const std::int64_t plane = static_cast<std::int64_t>(in.headdim) * in.states;
  States to;
  to.data = data == nullptr ? nullptr : data + (b * blocks + k) * in.heads * plane;
  to.head = plane;
  to.channel = in.states;
  to.state = 1;
  return to;
}

// A stride that only a size of one uses says nothing, and may be anything.
inline std::int64_t stride_of(const TensorView& tensor, int dim) {
  return tensor.size[dim] == 1 ? 0 : tensor.stride[dim];
}

template <class T>
Steps<T> steps(const TensorView& view) {
  Steps<T> to;
  if (view.present()) {
    to.data = view.as<T>();
    to.batch = stride_of(view, 0);
    to.step = stride_of(view, 1);
    to.head = stride_of(view, 2);
    to.element = stride_of(view, 3);
    to.vectorize = mamba_native::cuda::moves_vectors(view, 16 / size_of(view.dtype));
  }
  return to;
}

inline Rates rates(const TensorView& view) {
  return {view.data, view.dtype, stride_of(view, 0), stride_of(view, 1), stride_of(view, 2)};
}

inline States states(const TensorView& view) {
  States to;
  if (view.present()) {
    to = {view.as<float>(), stride_of(view, 0), stride_of(view, 1), stride_of(view, 2),
          stride_of(view, 3)};
  }
  return to;
}

inline Weights weights(const TensorView& view) {
  Weights to;
  if (view.present()) {
    to = {view.as<float>(), stride_of(view, 0), view.dim == 2 ? stride_of(view, 1) : 0};
  }
  return to;
}

inline int count(std::int64_t value) {
  MAMBA_CHECK(value <= INT32_MAX, "ssd: ", value, " is more than a CUDA launch can count");
  return static_cast<int>(value);
}

template <class T>
DeviceInputs<T> device_inputs(const Inputs& in) {
  DeviceInputs<T> to;
  to.batch = count(in.x.size[0]);
  to.heads = count(in.x.size[2]);
  to.heads_per_group = count(in.x.size[2] / in.B.size[2]);
  to.headdim = count(in.x.size[3]);
  to.states = count(in.B.size[3]);
  to.length = in.x.size[1];
  to.x = steps<const T>(in.x);
  to.B = steps<const T>(in.B);
  to.C = steps<const T>(in.C);
  to.z = steps<const T>(in.z);
  to.dt = rates(in.dt);
  to.A = weights(in.A);
  to.D = weights(in.D);
  to.dt_bias = weights(in.dt_bias);
  to.initial_states = states(in.initial_states);
  if (in.seq_idx.present()) {
    to.sequences.index = in.seq_idx.as<const int>();
    to.sequences.batch = stride_of(in.seq_idx, 0);
    to.sequences.step = stride_of(in.seq_idx, 1);
  }
  to.sequences.length = in.x.size[1];
  to.sequences.count = count(in.sequences);
  to.dt_softplus = in.dt_softplus;
  to.dt_min = static_cast<float>(in.dt_min);
  to.dt_max = static_cast<float>(in.dt_max);
  return to;
}

template <class Args>
void launch(void (*kernel)(Args), std::int64_t ctas, int warps, std::int64_t shared_memory,
            const Args& args, void* stream) {
  mamba_native::cuda::allow_shared_memory(kernel, static_cast<int>(shared_memory));
  kernel<<<static_cast<unsigned>(count(ctas)), warps * kWarp,
           static_cast<std::size_t>(shared_memory), static_cast<cudaStream_t>(stream)>>>(args);
  MAMBA_CUDA_CHECK_LAUNCH();
}

// ---- tiles of shared memory ----

// Elements between rows of a tile: 16 bytes more than they have, so that the 16 bytes at one column
// of eight rows lie in all the banks.
template <class T, int COLUMNS>
inline constexpr int kRowStride = COLUMNS + 16 / static_cast<int>(sizeof(T));

// How THREADS threads share a tile's vectors of 16 bytes: each has one column of them, every kRows
// rows. No arithmetic but additions is left for their loops.
template <class T, int COLUMNS, int THREADS>
struct TileVectors {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  static constexpr int kPerRow = COLUMNS / kElements;
  static constexpr int kRows = THREADS / kPerRow;
  static_assert(THREADS % kPerRow == 0, "a thread keeps its column");

  static __device__ __forceinline__ int row(int thread) { return thread / kPerRow; }
  static __device__ __forceinline__ int column(int thread) { return thread % kPerRow * kElements; }
};

// Thread `thread` of THREADS brings its part of ROWS x COLUMNS elements in; what is outside of the
// tensor, from `valid_rows` and `valid_columns` on, is 0. Follow with wait_for_copies() and a
// barrier.
template <int THREADS, int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void load_tile(T* to, int stride, const T* from, std::int64_t step,
                                          std::int64_t element, bool vectorize, int valid_rows,
                                          int valid_columns, int thread) {
  using Vectors = TileVectors<T, COLUMNS, THREADS>;
  constexpr int kElements = Vectors::kElements;
  const int row = Vectors::row(thread), column = Vectors::column(thread);
  to += row * stride + column;
  from += row * step + column * element;
  if (vectorize && valid_rows >= ROWS && column + kElements <= valid_columns) {
#pragma unroll
    for (int r = 0; r < ROWS; r += Vectors::kRows) {
      if (ROWS % Vectors::kRows == 0 || row + r < ROWS) {
        mamba_native::cuda::copy16_async(to + r * stride, from);
      }
      from += Vectors::kRows * step;
    }
    return;
  }
#pragma unroll 1
  for (int r = row; r < ROWS; r += Vectors::kRows) {
    const int valid = r < valid_rows ? valid_columns - column : 0;
    if (vectorize && valid >= kElements) {
      mamba_native::cuda::copy16_async(to, from);
    } else if (valid <= 0) {
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        to[i] = i < valid ? from[i * element] : from_float<T>(0.0f);
      }
    }
    to += Vectors::kRows * stride;
    from += Vectors::kRows * step;
  }
}

template <int THREADS, int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void store_tile(const T* from, int stride, T* to, std::int64_t step,
                                           std::int64_t element, bool vectorize, int valid_rows,
                                           int valid_columns, int thread) {
  using Vectors = TileVectors<T, COLUMNS, THREADS>;
  constexpr int kElements = Vectors::kElements;
  const int row = Vectors::row(thread), column = Vectors::column(thread);
  from += row * stride + column;
  to += row * step + column * element;
  if (vectorize && valid_rows >= ROWS && column + kElements <= valid_columns) {
#pragma unroll
    for (int r = 0; r < ROWS; r += Vectors::kRows) {
      if (ROWS % Vectors::kRows == 0 || row + r < ROWS) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from + r * stride);
      }
      to += Vectors::kRows * step;
    }
    return;
  }
#pragma unroll 1
  for (int r = row; r < min(ROWS, valid_rows); r += Vectors::kRows) {
    const int valid = valid_columns - column;
    if (vectorize && valid >= kElements) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (i < valid) {
          to[i * element] = from[i];
        }
      }
    }
    from += Vectors::kRows * stride;
    to += Vectors::kRows * step;
  }
}

// How the warps of a CTA share a product of ROWS x COLUMNS: each has 16 rows and kJ times eight
// columns of it; warps from the last column on have none.
template <int ROWS, int COLUMNS, int WARPS>
struct Split {
  static constexpr int kRowBlocks = ROWS / 16;
  static constexpr int kColumnBlocks = WARPS / kRowBlocks;
  static constexpr int kWidth = COLUMNS / kColumnBlocks > 16 ? COLUMNS / kColumnBlocks : 16;
  static constexpr int kJ = kWidth / 8;
  static_assert(ROWS % 16 == 0 && COLUMNS % kWidth == 0 && WARPS % kRowBlocks == 0,
                "the product is made of whole parts");

  static __device__ __forceinline__ int row(int warp) { return warp / kColumnBlocks * 16; }
  static __device__ __forceinline__ int column(int warp) { return warp % kColumnBlocks * kWidth; }
  static __device__ __forceinline__ bool active(int warp) { return column(warp) < COLUMNS; }
};

// to = from, tiles whose rows have a factor each; they may be the same.
template <int THREADS, int ROWS, int COLUMNS, class T, class Factor>
__device__ __forceinline__ void scale_tile(T* to, const T* from, int stride, const Factor& factor,
                                           int thread) {
  using Vectors = TileVectors<T, COLUMNS, THREADS>;
  const int row = Vectors::row(thread), at = row * stride + Vectors::column(thread);
#pragma unroll
  for (int r = 0; r < ROWS; r += Vectors::kRows) {
    if (ROWS % Vectors::kRows == 0 || row + r < ROWS) {
      const float by = factor(row + r);
      float values[Vectors::kElements];
      load_vector<Vectors::kElements>(from + at + r * stride, values);
#pragma unroll
      for (int i = 0; i < Vectors::kElements; ++i) {
        values[i] *= by;
      }
      store_vector<Vectors::kElements>(to + at + r * stride, values);
    }
  }
}

template <int J>
__device__ __forceinline__ void clear(float (&acc)[J][4]) {
#pragma unroll
  for (int j = 0; j < J; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      acc[j][e] = 0.0f;
    }
  }
}

// Rows `row` and `row` + 8 of the product times a factor each.
template <int J>
__device__ __forceinline__ void scale_rows(float (&acc)[J][4], float upper, float lower) {
#pragma unroll
  for (int j = 0; j < J; ++j) {
    acc[j][0] *= upper;
    acc[j][1] *= upper;
    acc[j][2] *= lower;
    acc[j][3] *= lower;
  }
}

// This lane's part of a product into a tile; `to` is where the warp's part begins.
template <int J, class T>
__device__ __forceinline__ void store_fragments(const float (&acc)[J][4], T* to, int stride,
                                                int lane) {
  T* const at = to + fragment_row(lane) * stride + fragment_column(lane);
#pragma unroll
  for (int j = 0; j < J; ++j) {
    store_pair(at + 8 * j, acc[j][0], acc[j][1]);
    store_pair(at + 8 * stride + 8 * j, acc[j][2], acc[j][3]);
  }
}

// This lane's part of a state (P, N), whose warp's part begins at channel p and state n, from and
// to row `row` of a tensor; 0 where there is no such row or no tensor. ADD: to what is there.
template <bool ADD = false, int J, class T>
__device__ __forceinline__ void load_states(float (&acc)[J][4], const DeviceInputs<T>& in,
                                            const States& from, int row, int h, int p, int n,
                                            int lane) {
  const int channel = p + fragment_row(lane), state = n + fragment_column(lane);
  const bool exists = from.data != nullptr && row >= 0;
  const float* const first = exists ? &from.at(row, h, channel, state) : nullptr;
#pragma unroll
  for (int j = 0; j < J; ++j) {
    if (ADD && j == J / 2) {
      __syncwarp();  // or registers would hold both states at once
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int down = e / 2 * 8, right = 8 * j + e % 2;
      const float value = exists && channel + down < in.headdim && state + right < in.states
                              ? first[down * from.channel + right * from.state]
                              : 0.0f;
      acc[j][e] = ADD ? acc[j][e] + value : value;
    }
  }
}

template <int J, class T>
__device__ __forceinline__ void store_states(const float (&acc)[J][4], const DeviceInputs<T>& in,
                                             const States& to, int row, int h, int p, int n,
                                             int lane) {
  if (to.data == nullptr || row < 0) {
    return;
  }
  const int channel = p + fragment_row(lane), state = n + fragment_column(lane);
  float* const first = &to.at(row, h, channel, state);
#pragma unroll
  for (int j = 0; j < J; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int down = e / 2 * 8, right = 8 * j + e % 2;
      if (channel + down < in.headdim && state + right < in.states) {
        first[down * to.channel + right * to.state] = acc[j][e];
      }
    }
  }
}

// Of a product over the states.
__device__ __forceinline__ int depth_of(int states) { return (states + 15) / 16 * 16; }

// ---- decays of a chunk ----

// delta[t] of the STEPS steps of a chunk and the sums of delta A / ln 2 up to and with each; steps
// beyond the chunk's end have delta 0. Decays are powers of two of differences of sums, which a
// float's rounding of a long sum would spoil: float32 keeps what rounding took.
template <class T, int STEPS>
struct Decays {
  static constexpr bool kExact = sizeof(T) == sizeof(float);
  float delta[STEPS];
  float sum[STEPS];
  float rest[kExact ? STEPS : 1];

  // exp(A sum of delta over (s, t]).
  __device__ __forceinline__ float between(int s, int t) const {
    float power = sum[t] - sum[s];
    if constexpr (kExact) {
      power += rest[t] - rest[s];
    }
    return exp2_approx(power);
  }
  __device__ __forceinline__ float to_end(int s) const { return between(s, STEPS - 1); }
  // From before the chunk's first step on.
  __device__ __forceinline__ float from_start(int t) const { return exp2_approx(sum[t]); }
  __device__ __forceinline__ float whole() const { return from_start(STEPS - 1); }

  // By one whole warp, for the `steps` steps from `begin` on.
  __device__ __forceinline__ void prepare(const DeviceInputs<T>& in, int b, int h,
                                          std::int64_t begin, int steps) {
    constexpr int kItems = STEPS > kWarp ? STEPS / kWarp : 1;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const double rate = static_cast<double>(in.A.at(h, 0)) * 1.4426950408889634;
    double sums[kItems];
    double run = 0.0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int t = lane * kItems + i;
      float slope = 0.0f;
      const float step = t < steps ? in.discretise(b, begin + t, h, &slope) : 0.0f;
      if (t < STEPS) {
        delta[t] = step;
      }
      run += static_cast<double>(step) * rate;
      sums[i] = run;
    }
    double before = run;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const double other = __shfl_up_sync(kAllLanes, before, offset);
      before += lane >= offset ? other : 0.0;
    }
    before -= run;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int t = lane * kItems + i;
      if (t < STEPS) {
        const double total = before + sums[i];
        sum[t] = static_cast<float>(total);
        if constexpr (kExact) {
          rest[t] = static_cast<float>(total - static_cast<double>(sum[t]));
        }
      }
    }
  }
};

// What a step adds to the state that runs through a chunk.
template <class T, int STEPS>
struct DriveFactor {  // delta decay(s, end), of x
  const Decays<T, STEPS>& decays;
  __device__ __forceinline__ float operator()(int s) const {
    return decays.delta[s] * decays.to_end(s);
  }
};
template <class T, int STEPS>
struct AdjointFactor {  // decay(-1, t), of g
  const Decays<T, STEPS>& decays;
  __device__ __forceinline__ float operator()(int t) const { return decays.from_start(t); }
};

}  // namespace mamba_native::ssd::cuda
