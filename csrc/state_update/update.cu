// One decode step of the selective state space on CUDA.
//
//   delta = min(max(softplus?(dt + dt_bias), dt_min), dt_max)
//   s'    = s exp(delta A) + (delta x) B          for every row p and state n of a head
//   out   = (sum_n s' C + D x) silu?(z)
//
// The step reads and writes every state once and little else, so memory bandwidth decides, and the
// mapping keeps loads of 16 bytes in flight:
//
//   warp    a tile of 32 / LANES * ROWS rows p of one (batch, head)
//   lane    column_lane = lane % LANES owns 16 bytes of N: kVector states of each of ROWS rows that
//           lie 32 / LANES rows apart, so that one instruction of the warp reads adjacent rows
//   grid.x  (head, tile) pairs, blockDim.x / 32 a block;  grid.y, grid.z  batch
//
// N wider than LANES vectors is walked in several passes. What belongs to a row (x, dt, z, D) is
// read and computed by one lane, the row's owner: lane r of each group of LANES owns row r. The
// others get delta and delta x by shuffle. At the end a transposing shuffle reduction leaves the
// sum over n of row r in lane r, so that the owner finishes and stores the output.
//
// Of the state, the kernel knows the size of an element; every dtype is known at run time. Loads
// come first, conversions after.
#include <algorithm>
#include <array>
#include <utility>

#include "core/cuda/alignment.h"
#include "core/cuda/any_dtype.cuh"
#include "core/cuda/launch.h"
#include "core/cuda/memory.cuh"
#include "core/error.h"
#include "core/math.h"
#include "state_update/plan.h"

namespace mamba_native::state_update::cuda {

using mamba_native::cuda::bits_to_float;
using mamba_native::cuda::load_bits;
using mamba_native::cuda::load_stored;
using mamba_native::cuda::load_weight;
using mamba_native::cuda::moves_vectors;
using mamba_native::cuda::read_index;
using mamba_native::cuda::store_stored;
using mamba_native::cuda::store_weight;
using mamba_native::cuda::Stored;
using mamba_native::cuda::to_floats;
using mamba_native::cuda::to_stored;

inline constexpr int kMaxThreads = 128;
inline constexpr int kBlocksPerMultiprocessor = 4;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

// How the heads' rows are cut into tiles, which of B and C move as vectors along N, and dt's
// limits.
struct Access {
  unsigned tiles;  // of a head
  unsigned heads_per_group;
  bool B;
  bool C;
  float dt_min;
  float dt_max;
};

__device__ __forceinline__ bool present(const TensorView& tensor) { return tensor.dim >= 0; }

__device__ __forceinline__ std::int64_t offset_of(const TensorView& tensor, std::int64_t i,
                                                  std::int64_t j) {
  return i * tensor.stride[0] + j * tensor.stride[1];
}

__device__ __forceinline__ std::int64_t offset_of(const TensorView& tensor, std::int64_t i,
                                                  std::int64_t j, std::int64_t k) {
  return i * tensor.stride[0] + j * tensor.stride[1] + k * tensor.stride[2];
}

// The state's dtype, as far as SIZE bytes an element leave it open.
template <int SIZE>
__device__ __forceinline__ DType state_dtype(const Params& params) {
  if (SIZE == 4) {
    return DType::f32;
  }
  return params.state.dtype == DType::bf16 ? DType::bf16 : DType::f16;
}

// The row of `state` that batch b updates.
__device__ __forceinline__ std::int64_t entry_of(const Params& params, std::int64_t b) {
  const TensorView& indices = params.state_batch_indices;
  return present(indices) ? read_index(indices.data, indices.dtype, b * indices.stride[0]) : b;
}

__device__ __forceinline__ bool is_entry(const Params& params, std::int64_t entry) {
  return entry >= 0 && entry < params.state.size[0];
}

// The output of a batch without a state: 0 for padding, NaN for an entry that does not exist.
__device__ __forceinline__ float filler(std::int64_t entry) {
  return entry < 0 ? 0.0f : __uint_as_float(0x7fffffffu);
}

// delta of dt + dt_bias. What is no number stays none.
__device__ __forceinline__ float delta_of(const Params& params, const Access& access, float raw) {
  const float free = params.dt_softplus ? softplus(raw) : raw;
  return free < access.dt_min ? access.dt_min : free > access.dt_max ? access.dt_max : free;
}

// A of what is stored for it.
__device__ __forceinline__ float rate_of(const Params& params, float A) {
  return params.A_is_log ? -expf(A) : A;
}

// state (entries, H, P, N) of SIZE bytes an element; x, dt, z, out (B, H, P); A (H, P, N); B, C (B,
// G, N); D, dt_bias (H, P); state_batch_indices (B). N is a multiple of kVector; state, and A
// unless TIED, move as vectors.
template <int SIZE, int LANES, int ROWS, bool TIED>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor)
    update_kernel(const Params params, const Access access) {
  const DType dtype = state_dtype<SIZE>(params);
  constexpr int kVector = 16 / SIZE;
  constexpr int kRowDistance = 32 / LANES;
  static_assert(ROWS <= LANES && (ROWS & (ROWS - 1)) == 0, "a lane owns at most one row");

  const unsigned task = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const unsigned head = task / access.tiles;
  const std::int64_t h = head;
  const std::int64_t b = blockIdx.y + std::int64_t{blockIdx.z} * gridDim.y;
  if (h >= params.x.size[1] || b >= params.x.size[0]) {
    return;  // the whole warp; nothing below waits for other warps
  }
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int column_lane = lane % LANES;
  const std::int64_t headdim = params.x.size[2];
  const std::int64_t d_state = params.state.size[3];
  const std::int64_t first_row =
      std::int64_t{task % access.tiles} * (kRowDistance * ROWS) + lane / LANES;
  const std::int64_t own_row = first_row + column_lane % ROWS * kRowDistance;
  const bool owns = column_lane < ROWS && own_row < headdim;
  const std::int64_t p = own_row < headdim ? own_row : headdim - 1;  // readable in any case
  const std::int64_t g = head / access.heads_per_group;

  const std::int64_t entry = entry_of(params, b);
  if (!is_entry(params, entry)) {
    if (owns) {
      store_weight(params.out.data, params.out.dtype, offset_of(params.out, b, h, p),
                   filler(entry));
    }
    return;
  }

  // 1. Loads: the state first, because there is most of it.
  void* const state = static_cast<unsigned char*>(params.state.data) +
                      (offset_of(params.state, entry, h, first_row) + column_lane * kVector) * SIZE;
  const std::int64_t row_step = kRowDistance * params.state.stride[2];
  Stored<kVector> stored[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const bool inside = first_row + i * kRowDistance < headdim && column_lane * kVector < d_state;
    stored[i] = load_stored<kVector>(state, dtype, i * row_step, 1, inside ? kVector : 0, inside);
  }
  const std::uint32_t x_bits =
      load_bits(params.x.data, params.x.dtype, offset_of(params.x, b, h, p));
  const std::uint32_t dt_bits =
      load_bits(params.dt.data, params.dt.dtype, offset_of(params.dt, b, h, p));
  std::uint32_t bias_bits = 0;
  if (present(params.dt_bias)) {
    bias_bits =
        load_bits(params.dt_bias.data, params.dt_bias.dtype, offset_of(params.dt_bias, h, p));
  }
  std::uint32_t skip_bits = 0;
  if (present(params.D)) {
    skip_bits = load_bits(params.D.data, params.D.dtype, offset_of(params.D, h, p));
  }
  std::uint32_t z_bits = 0;
  if (present(params.z)) {
    z_bits = load_bits(params.z.data, params.z.dtype, offset_of(params.z, b, h, p));
  }
  std::uint32_t tied_a_bits = 0;
  if constexpr (TIED) {
    tied_a_bits = load_bits(params.A.data, params.A.dtype, h * params.A.stride[0]);
  }

  float x = 0.0f;
  float delta = 0.0f;
  float decay = 0.0f;
  float y[ROWS] = {};
  // Only the widest group of lanes is ever asked for more than one pass.
  const std::int64_t passes_end = LANES < 32 ? 1 : d_state;
  for (std::int64_t base = 0; base < passes_end; base += LANES * kVector) {
    const std::int64_t n = base + column_lane * kVector;
    const int valid = n < d_state ? kVector : 0;
    if (base > 0) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const bool inside = first_row + i * kRowDistance < headdim && n < d_state;
        stored[i] = load_stored<kVector>(state, dtype, i * row_step + base, 1, inside ? kVector : 0,
                                         inside);
      }
    }
    const Stored<kVector> b_stored =
        load_stored<kVector>(params.B.data, params.B.dtype, offset_of(params.B, b, g, n),
                             params.B.stride[2], valid, access.B);
    const Stored<kVector> c_stored =
        load_stored<kVector>(params.C.data, params.C.dtype, offset_of(params.C, b, g, n),
                             params.C.stride[2], valid, access.C);
    Stored<kVector> a_stored[TIED ? 1 : ROWS];
    if constexpr (!TIED) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const std::int64_t row = first_row + i * kRowDistance;
        const bool inside = row < headdim && n < d_state;
        a_stored[i] =
            load_stored<kVector>(params.A.data, params.A.dtype, offset_of(params.A, h, row, n), 1,
                                 inside ? kVector : 0, inside);
      }
    }

    // 2. What the owner of a row knows.
    if (base == 0) {
      x = bits_to_float(x_bits, params.x.dtype);
      delta = bits_to_float(dt_bits, params.dt.dtype);
      if (present(params.dt_bias)) {
        delta += bits_to_float(bias_bits, params.dt_bias.dtype);
      }
      delta = delta_of(params, access, delta);
      if constexpr (TIED) {
        decay = expf(delta * rate_of(params, bits_to_float(tied_a_bits, params.A.dtype)));
      }
    }

    // 3. The recurrence. Lanes and rows beyond the tensor hold zeros and store nothing.
    float B[kVector];
    float C[kVector];
    to_floats(b_stored, params.B.dtype, B);
    to_floats(c_stored, params.C.dtype, C);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const float drive = __shfl_sync(kWholeWarp, delta * x, i, LANES);
      float s[kVector];
      to_floats(stored[i], dtype, s);
      if constexpr (TIED) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          s[j] = fmaf(s[j], decay, drive * B[j]);
          y[i] = fmaf(s[j], C[j], y[i]);
        }
      } else {
        const float row_delta = __shfl_sync(kWholeWarp, delta, i, LANES);
        float A[kVector];
        to_floats(a_stored[i], params.A.dtype, A);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          s[j] = fmaf(s[j], expf(row_delta * rate_of(params, A[j])), drive * B[j]);
          y[i] = fmaf(s[j], C[j], y[i]);
        }
      }
      const bool inside = first_row + i * kRowDistance < headdim && n < d_state;
      store_stored(state, dtype, i * row_step + base, 1, inside ? kVector : 0, inside,
                   to_stored<kVector>(s, dtype));
    }
  }

  // 4. Sum over the lanes of a row. While more than one sum is left, a lane keeps every other one
  // and swaps the rest with its neighbour: log2(ROWS) steps bring row r to lanes r mod ROWS.
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) {
    if (step < ROWS) {
      const bool odd = (lane & step) != 0;
#pragma unroll
      for (int i = 0; i < ROWS / step / 2; ++i) {
        const float kept = odd ? y[2 * i + 1] : y[2 * i];
        const float given = odd ? y[2 * i] : y[2 * i + 1];
        y[i] = kept + __shfl_xor_sync(kWholeWarp, given, step);
      }
    } else {
      y[0] += __shfl_xor_sync(kWholeWarp, y[0], step);
    }
  }

  // 5. The owner finishes its row.
  if (owns) {
    float out = y[0];
    if (present(params.D)) {
      out = fmaf(bits_to_float(skip_bits, params.D.dtype), x, out);
    }
    if (present(params.z)) {
      out *= silu(bits_to_float(z_bits, params.z.dtype));
    }
    store_weight(params.out.data, params.out.dtype, offset_of(params.out, b, h, p), out);
  }
}

// The same step for any strides, alignment and N: a warp per row p, lanes over n, one element at a
// time. Grid as above with a tile of one row.
__global__ void __launch_bounds__(kMaxThreads)
    update_kernel_strided(const Params params, const Access access) {
  const unsigned task = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const unsigned head = task / access.tiles;
  const std::int64_t h = head;
  const std::int64_t b = blockIdx.y + std::int64_t{blockIdx.z} * gridDim.y;
  if (h >= params.x.size[1] || b >= params.x.size[0]) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t p = task % access.tiles;
  const std::int64_t g = head / access.heads_per_group;
  const std::int64_t entry = entry_of(params, b);
  if (!is_entry(params, entry)) {
    if (lane == 0) {
      store_weight(params.out.data, params.out.dtype, offset_of(params.out, b, h, p),
                   filler(entry));
    }
    return;
  }
  const float x = load_weight(params.x.data, params.x.dtype, offset_of(params.x, b, h, p));
  float delta = load_weight(params.dt.data, params.dt.dtype, offset_of(params.dt, b, h, p));
  if (present(params.dt_bias)) {
    delta +=
        load_weight(params.dt_bias.data, params.dt_bias.dtype, offset_of(params.dt_bias, h, p));
  }
  delta = delta_of(params, access, delta);
  float y = 0.0f;
  for (std::int64_t n = lane; n < params.state.size[3]; n += 32) {
    const std::int64_t offset = offset_of(params.state, entry, h, p) + n * params.state.stride[3];
    const float A =
        rate_of(params, load_weight(params.A.data, params.A.dtype, offset_of(params.A, h, p, n)));
    const float B = load_weight(params.B.data, params.B.dtype, offset_of(params.B, b, g, n));
    const float C = load_weight(params.C.data, params.C.dtype, offset_of(params.C, b, g, n));
    const float s = fmaf(load_weight(params.state.data, params.state.dtype, offset),
                         expf(delta * A), delta * x * B);
    store_weight(params.state.data, params.state.dtype, offset, s);
    y = fmaf(s, C, y);
  }
  y = mamba_native::cuda::warp_sum(y);
  if (lane == 0) {
    if (present(params.D)) {
      y = fmaf(load_weight(params.D.data, params.D.dtype, offset_of(params.D, h, p)), x, y);
    }
    if (present(params.z)) {
      y *= silu(load_weight(params.z.data, params.z.dtype, offset_of(params.z, b, h, p)));
    }
    store_weight(params.out.data, params.out.dtype, offset_of(params.out, b, h, p), y);
  }
}

template <int SIZE, std::size_t I>
void launch(const Params& params, int warps) {
  constexpr Config kConfig = kConfigs[I];
  constexpr int kVector = 16 / SIZE;
  const std::int64_t tiles = ceil_div(params.x.size[2], rows_of_warp(kConfig));
  const std::int64_t blocks = ceil_div(params.x.size[1] * tiles, warps);
  MAMBA_CHECK(blocks * warps < std::int64_t{1} << 31,
              "selective_state_update: more than 2^31 tiles of rows");
  const Access access{
      static_cast<unsigned>(tiles),      static_cast<unsigned>(params.x.size[1] / params.B.size[1]),
      moves_vectors(params.B, kVector),  moves_vectors(params.C, kVector),
      static_cast<float>(params.dt_min), static_cast<float>(params.dt_max)};
  const std::int64_t batch = params.x.size[0];
  const std::int64_t batch_y = std::min<std::int64_t>(batch, 65535);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(batch_y),
                  static_cast<unsigned>(ceil_div(batch, batch_y)));
  const unsigned threads = static_cast<unsigned>(32 * warps);
  const cudaStream_t stream = static_cast<cudaStream_t>(params.stream);
  if constexpr (kConfig.lanes == 0) {
    update_kernel_strided<<<grid, threads, 0, stream>>>(params, access);
  } else {
    update_kernel<SIZE, kConfig.lanes, kConfig.rows, kConfig.tied>
        <<<grid, threads, 0, stream>>>(params, access);
  }
  MAMBA_CUDA_CHECK_LAUNCH();
}

using Launcher = void (*)(const Params&, int);

template <int SIZE, std::size_t... I>
constexpr std::array<Launcher, sizeof...(I)> launchers(std::index_sequence<I...>) {
  return {{&launch<SIZE, I>...}};
}

void update(const Params& params, const Plan& plan) {
  constexpr auto kRows = std::make_index_sequence<kConfigCount>();
  static constexpr std::array<Launcher, kConfigCount> kTables[] = {launchers<4>(kRows),
                                                                   launchers<2>(kRows)};
  const std::size_t table = params.state.dtype == DType::f32 ? 0 : 1;
  kTables[table][static_cast<std::size_t>(plan.config)](params, plan.warps);
}

}  // namespace mamba_native::state_update::cuda
