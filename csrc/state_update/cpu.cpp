#include "state_update/cpu.h"

#include <algorithm>
#include <vector>

#include "core/math.h"
#include "core/parallel_for.h"
#include "state_update/reference.h"

namespace mamba_native::state_update::cpu {
namespace {

using Kernel = void (*)(const Rows&);

void gather(const TensorView& tensor, std::int64_t offset, std::int64_t stride, std::int64_t count,
            float* to) {
  if (tensor.dtype == DType::f32 && stride == 1) {
    std::copy_n(tensor.as<const float>() + offset, count, to);
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = load_float(tensor.data, tensor.dtype, offset + i * stride);
  }
}

bool constant_over(const TensorView& tensor, int dim) {
  return tensor.size[dim] <= 1 || tensor.stride[dim] == 0;
}

// Everything of one thread; zero-filled once, so that the padding of B and C stays zero, and what A
// has there is finite.
struct Scratch {
  explicit Scratch(std::int64_t padded, bool tied)
      : B(static_cast<std::size_t>(padded)),
        C(static_cast<std::size_t>(padded)),
        A(static_cast<std::size_t>(tied ? kPad : kBlock * padded)) {}
  std::vector<float> B;
  std::vector<float> C;
  std::vector<float> A;
  std::int64_t A_head = -1, A_first = -1;  // the rows that A has
  float x[kBlock] = {};
  float delta[kBlock] = {};
  float D[kBlock] = {};
  float z[kBlock] = {};
  float out[kBlock] = {};
};

// Turns what a block of rows reads into float32 and hands it to the kernel.
void update_block(const Params& params, Kernel kernel, bool tied, std::int64_t b, std::int64_t h,
                  std::int64_t first, Scratch& scratch) {
  const TensorView& indices = params.state_batch_indices;
  const std::int64_t entry =
      indices.present() ? load_index(indices.data, indices.dtype, b * indices.stride[0]) : b;
  const std::int64_t d_state = params.state.size[3];
  const std::int64_t padded = ceil_div(d_state, kPad) * kPad;
  const std::int64_t g = h / (params.x.size[1] / params.B.size[1]);
  const std::int64_t count = std::min(kBlock, params.x.size[2] - first);
  if (entry < 0) {
    std::fill_n(scratch.out, count, 0.0f);
  } else {
    const auto rows_of = [&](const TensorView& tensor, float* to) {
      gather(tensor, b * tensor.stride[0] + h * tensor.stride[1] + first * tensor.stride[2],
             tensor.stride[2], count, to);
    };
    const auto parameter_of = [&](const TensorView& tensor, float* to) {
      gather(tensor, h * tensor.stride[0] + first * tensor.stride[1], tensor.stride[1], count, to);
    };
    rows_of(params.x, scratch.x);
    rows_of(params.dt, scratch.delta);
    if (params.z.present()) {
      rows_of(params.z, scratch.z);
    }
    if (params.D.present()) {
      parameter_of(params.D, scratch.D);
    }
    if (params.dt_bias.present()) {
      float bias[kBlock];
      parameter_of(params.dt_bias, bias);
      for (std::int64_t i = 0; i < count; ++i) {
        scratch.delta[i] += bias[i];
      }
    }
    gather(params.B, b * params.B.stride[0] + g * params.B.stride[1], params.B.stride[2], d_state,
           scratch.B.data());
    gather(params.C, b * params.C.stride[0] + g * params.C.stride[1], params.C.stride[2], d_state,
           scratch.C.data());
    Rows rows;
    const std::int64_t offset = entry * params.state.stride[0] + h * params.state.stride[1] +
                                first * params.state.stride[2];
    rows.state = static_cast<char*>(params.state.data) + offset * size_of(params.state.dtype);
    rows.dtype = params.state.dtype;
    rows.row_stride = params.state.stride[2];
    rows.stride = params.state.stride[3];
    rows.d_state = d_state;
    rows.B = scratch.B.data();
    rows.C = scratch.C.data();
    const std::int64_t a_offset = h * params.A.stride[0] + first * params.A.stride[1];
    rows.log_A = nullptr;
    if (params.A.dtype == DType::f32 && !params.A_is_log &&
        (tied || (params.A.stride[2] == 1 && d_state == padded))) {
      rows.A = params.A.as<const float>() + a_offset;
      rows.A_row_stride = tied ? 0 : params.A.stride[1];
    } else {
      if (scratch.A_head != h || scratch.A_first != first) {
        for (std::int64_t i = 0; i < (tied ? 1 : count); ++i) {
          gather(params.A, a_offset + i * params.A.stride[1], params.A.stride[2],
                 tied ? 1 : d_state, scratch.A.data() + i * padded);
        }
        scratch.A_head = h;
        scratch.A_first = first;
        rows.log_A = params.A_is_log ? scratch.A.data() : nullptr;
      }
      rows.A = scratch.A.data();
      rows.A_row_stride = tied ? 0 : padded;
    }
    rows.tied = tied;
    rows.dt_softplus = params.dt_softplus;
    rows.dt_min = static_cast<float>(params.dt_min);
    rows.dt_max = static_cast<float>(params.dt_max);
    rows.x = scratch.x;
    rows.delta = scratch.delta;
    rows.D = params.D.present() ? scratch.D : nullptr;
    rows.z = params.z.present() ? scratch.z : nullptr;
    rows.out = scratch.out;
    rows.count = count;
    kernel(rows);
  }
  for (std::int64_t i = 0; i < count; ++i) {
    store_float(
        params.out.data, params.out.dtype,
        b * params.out.stride[0] + h * params.out.stride[1] + (first + i) * params.out.stride[2],
        scratch.out[i]);
  }
}

}  // namespace

void update(const Params& params, Isa isa) {
  if (isa == Isa::plain) {
    reference::update<float, double>(params);
    return;
  }
  const Kernel kernel = mamba_native::cpu::kernels_for<Kernel>(
      isa, &update_rows_sse2, &update_rows_avx2, &update_rows_avx512);
  const std::int64_t heads = params.x.size[1];
  const std::int64_t blocks = ceil_div(params.x.size[2], kBlock);
  const std::int64_t d_state = params.state.size[3];
  const bool tied = constant_over(params.A, 1) && constant_over(params.A, 2);
  // Below some 10^5 states a second thread costs more than it brings.
  const std::int64_t grain = ceil_div(std::int64_t{1} << 17, kBlock * d_state);
  // The batch goes fastest, because A is the same for it.
  const std::int64_t batch = params.x.size[0];
  parallel_for(batch * heads * blocks, grain, [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(ceil_div(d_state, kPad) * kPad, tied);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t block = i / batch;
      update_block(params, kernel, tied, i % batch, block / blocks, block % blocks * kBlock,
                   scratch);
    }
  });
}

}  // namespace mamba_native::state_update::cpu
