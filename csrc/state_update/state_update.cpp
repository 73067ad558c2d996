#include "state_update/state_update.h"

#include "core/error.h"
#include "state_update/cpu.h"
#include "state_update/reference.h"
#if MAMBA_WITH_CUDA
#include "state_update/plan.h"
#endif

namespace mamba_native::state_update {
namespace {

constexpr char kOp[] = "selective_state_update";

void check_input(const char* argument, const TensorView& tensor, Device device, bool is_double) {
  check_float(kOp, argument, tensor);
  check_device(kOp, argument, tensor, device);
  MAMBA_CHECK((tensor.dtype == DType::f64) == is_double, kOp, ": ", argument,
              " must be float64 exactly when x is, got ", describe(tensor));
}

// A written tensor must have an address of its own for every element.
void check_written(const char* argument, const TensorView& tensor) {
  for (int i = 0; i < tensor.dim && tensor.numel() > 0; ++i) {
    MAMBA_CHECK(tensor.size[i] <= 1 || tensor.stride[i] != 0, kOp, ": ", argument,
                " is written, so it cannot be an expanded view (stride 0 in dimension ", i,
                "); pass a contiguous copy, got ", describe(tensor));
  }
}

// What changes with the token: (B, T, rows, columns), without T where x has none.
void check_token_shape(const Params& p, const char* argument, const TensorView& tensor,
                       std::int64_t rows, std::int64_t columns) {
  if (p.x.dim == 3) {
    check_shape(kOp, argument, tensor, {p.x.size[0], rows, columns});
  } else {
    check_shape(kOp, argument, tensor, {p.x.size[0], p.x.size[1], rows, columns});
  }
}

void validate(const Params& p) {
  MAMBA_CHECK(
      p.x.dim == 3 || p.x.dim == 4, kOp,
      ": x must have shape (batch, heads, headdim) or (batch, tokens, heads, headdim), got ",
      describe(p.x));
  MAMBA_CHECK(p.state.dim == 4, kOp,
              ": state must have shape (entries, heads, headdim, d_state), got ",
              describe(p.state));
  MAMBA_CHECK(p.B.dim == p.x.dim, kOp, ": B must have shape (batch, ",
              p.x.dim == 3 ? "" : "tokens, ", "groups, d_state), got ", describe(p.B));
  const std::int64_t batch = p.x.size[0];
  const std::int64_t heads = p.x.size[p.x.dim - 2];
  const std::int64_t headdim = p.x.size[p.x.dim - 1];
  const std::int64_t d_state = p.state.size[3];
  const std::int64_t groups = p.B.size[p.B.dim - 2];
  const bool gathered = p.state_batch_indices.present();

  MAMBA_CHECK(d_state > 0, kOp, ": state must have at least one value a row, got ",
              describe(p.state));
  const Device device = p.x.device;
  const bool is_double = p.x.dtype == DType::f64;
  check_input("x", p.x, device, is_double);
  check_input("state", p.state, device, is_double);
  check_shape(kOp, "state", p.state, {gathered ? p.state.size[0] : batch, heads, headdim, d_state});
  check_input("dt", p.dt, device, is_double);
  check_token_shape(p, "dt", p.dt, heads, headdim);
  check_input("A", p.A, device, is_double);
  check_shape(kOp, "A", p.A, {heads, headdim, d_state});
  check_input("B", p.B, device, is_double);
  check_token_shape(p, "B", p.B, groups, d_state);
  check_input("C", p.C, device, is_double);
  check_token_shape(p, "C", p.C, groups, d_state);
  MAMBA_CHECK(groups > 0 && heads % groups == 0, kOp, ": the heads (", heads,
              ") must be a multiple of the groups of B and C (", groups, ")");
  if (p.D.present()) {
    check_input("D", p.D, device, is_double);
    check_shape(kOp, "D", p.D, {heads, headdim});
  }
  if (p.z.present()) {
    check_input("z", p.z, device, is_double);
    check_token_shape(p, "z", p.z, heads, headdim);
  }
  if (p.dt_bias.present()) {
    check_input("dt_bias", p.dt_bias, device, is_double);
    check_shape(kOp, "dt_bias", p.dt_bias, {heads, headdim});
  }
  MAMBA_CHECK(p.dt_min <= p.dt_max, kOp, ": dt_limit must be (smallest, largest), got (", p.dt_min,
              ", ", p.dt_max, ")");
  check_device(kOp, "out", p.out, device);
  check_dtype(kOp, "out", p.out, p.x.dtype);
  check_token_shape(p, "out", p.out, heads, headdim);
  check_written("state", p.state);
  check_written("out", p.out);

  if (!gathered) {
    return;
  }
  const TensorView& indices = p.state_batch_indices;
  MAMBA_CHECK(indices.dtype == DType::i32 || indices.dtype == DType::i64, kOp,
              ": state_batch_indices must be int32 or int64, got ", describe(indices));
  check_device(kOp, "state_batch_indices", indices, device);
  check_shape(kOp, "state_batch_indices", indices, {batch});
  // Looking at a CUDA tensor would wait for the device; there the kernel looks.
  for (std::int64_t b = 0; !device.is_cuda() && b < batch; ++b) {
    const std::int64_t entry = load_index(indices.data, indices.dtype, b * indices.stride[0]);
    MAMBA_CHECK(entry < p.state.size[0], kOp, ": state_batch_indices[", b, "] is ", entry,
                ", but state has ", p.state.size[0], " entries");
  }
}

// Token t of what changes with the token: (B, T, ...) becomes (B, ...).
TensorView token_of(const TensorView& tensor, std::int64_t t) {
  TensorView one = tensor;
  if (tensor.dim != 4) {
    return one;  // absent, or without the axis
  }
  one.data = static_cast<char*>(tensor.data) + t * tensor.stride[1] * size_of(tensor.dtype);
  one.dim = 3;
  for (int i = 1; i < 3; ++i) {
    one.size[i] = tensor.size[i + 1];
    one.stride[i] = tensor.stride[i + 1];
  }
  return one;
}

void update_token(const Params& params) {
  if (params.x.dtype == DType::f64) {
    reference::update<double>(params);
    return;
  }
  if (!params.x.device.is_cuda()) {
    cpu::update(params);
    return;
  }
#if MAMBA_WITH_CUDA
  cuda::update(params,
               cuda::choose(params, mamba_native::cuda::device_info(params.x.device.index)));
#else
  fail(kOp, ": x is on ", name(params.x.device), ", but this library was built without CUDA");
#endif
}

}  // namespace

void update(const Params& params) {
  validate(params);
  if (params.out.numel() == 0) {
    return;
  }
  const std::int64_t tokens = params.x.dim == 4 ? params.x.size[1] : 1;
  for (std::int64_t t = 0; t < tokens; ++t) {
    Params one = params;
    for (TensorView* tensor : {&one.x, &one.dt, &one.B, &one.C, &one.z, &one.out}) {
      *tensor = token_of(*tensor, t);
    }
    update_token(one);
  }
}

}  // namespace mamba_native::state_update
