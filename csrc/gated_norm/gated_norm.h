// The gated LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019) of Mamba-2 (Dao & Gu
// 2024, section 7.2): normalised in groups of features, and multiplied by silu(z) before or after.
//
// For every row of M and every group of group_size neighbouring features:
//   u    = x silu(z)                             without norm_before_gate, else x
//   rstd = (mean((u - mean(u))^2) + eps)^-1/2    (RMS: (mean(u^2) + eps)^-1/2, no mean)
//   v    = (u - mean) rstd weight + bias         (RMS: u rstd weight + bias)
//   y    = v silu(z)                             with norm_before_gate, else v
// Without z there is no gate.
//
// Sizes: M rows of N features, G = N / group_size groups; M = 0 is valid, N >= 1. Leading
// dimensions are flattened by the caller. Dtypes: x, z, weight, bias each float32, float16 or
// bfloat16 on its own (float64 on the CPU: all of them). Arithmetic is float32; y has x's dtype.
// Strides: rows may be any distance apart (0 included, for inputs); features any distance, fast at
// 1. Errors: mamba_native::Error naming the argument, before memory is touched.
#pragma once

#include "core/tensor.h"

namespace mamba_native::gated_norm {

struct ForwardParams {
  TensorView x;       // (M, N)
  TensorView weight;  // (N)
  TensorView bias;    // (N), optional
  TensorView z;       // (M, N), optional
  double eps = 1e-6;
  std::int64_t group_size = 0;  // divides N
  bool norm_before_gate = true;
  bool is_rms_norm = false;

  TensorView y;            // (M, N), x's dtype
  TensorView mean;         // (G, M) float32 (float64 if x is), contiguous; absent for RMS
  TensorView rstd;         // (G, M) float32 (float64 if x is), contiguous
  void* stream = nullptr;  // cudaStream_t
};

// With xhat = (u - mean) rstd, dv = dy silu(z) with norm_before_gate and dy without, g = weight dv,
// and over the features of a group c1 = mean(xhat g), c2 = mean(g) (RMS: c2 = 0):
//   du = (g - xhat c1 - c2) rstd
//   norm_before_gate:  dx = du,          dz = dy v silu'(z)
//   otherwise:         dx = du silu(z),  dz = du x silu'(z)
//   dweight = sum over rows of dv xhat;  dbias = sum over rows of dv
struct BackwardParams {
  TensorView dy;      // (M, N), x's dtype
  TensorView x;       // (M, N)
  TensorView weight;  // (N)
  TensorView bias;    // (N), optional
  TensorView z;       // (M, N), optional
  TensorView mean;    // (G, M), any strides; absent for RMS
  TensorView rstd;    // (G, M), any strides
  std::int64_t group_size = 0;
  bool norm_before_gate = true;
  bool is_rms_norm = false;

  TensorView dx;         // (M, N), x's dtype
  TensorView dz;         // (M, N), z's dtype, with z
  TensorView dweight;    // (N) float32 (float64 if x is), contiguous
  TensorView dbias;      // (N) float32 (float64 if x is), contiguous, with bias
  TensorView y;          // (M, N), x's dtype, optional: forward's output once more
  TensorView workspace;  // (workspace_rows(...), 2, N) float32, contiguous: partial sums of dweight
                         // and dbias
  void* stream = nullptr;
};

// G. Throws Error, naming the operation, unless group_size divides the features.
std::int64_t groups_of(const char* op, std::int64_t features, std::int64_t group_size);

// Rows of the workspace that backward wants for M rows of G groups on this device: partial sums are
// added in a fixed order, so gradients are the same in every run.
std::int64_t workspace_rows(std::int64_t rows, std::int64_t groups, Device device);

void forward(const ForwardParams& params);
void backward(const BackwardParams& params);

}  // namespace mamba_native::gated_norm
