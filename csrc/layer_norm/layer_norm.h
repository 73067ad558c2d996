// LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019) fused with the residual addition
// of a pre-norm block, forward and backward.
//
// For every row of M:
//   h    = x + residual                                (h = x without residual)
//   rstd = (mean((h - mean(h))^2) + eps)^-1/2          (RMS: (mean(h^2) + eps)^-1/2, no mean)
//   y    = (h - mean) rstd weight + bias               (RMS: h rstd weight + bias)
//
// Sizes: M rows of N features; M = 0 is valid, N >= 1. Leading dimensions are flattened by the
// caller. Dtypes: x, weight, bias, residual each float32, float16 or bfloat16 on its own (float64
// on the CPU: all of them); bias has weight's dtype. Arithmetic is float32; y has x's dtype.
// Strides: rows may be any distance apart (0 included, for inputs); features any distance, fast
// at 1. Errors: mamba_native::Error naming the argument, before memory is touched.
#pragma once

#include "core/tensor.h"

namespace mamba_native::layer_norm {

struct ForwardParams {
  TensorView x;         // (M, N)
  TensorView weight;    // (N)
  TensorView bias;      // (N), optional
  TensorView residual;  // (M, N), optional
  double eps = 1e-6;
  bool is_rms_norm = false;

  TensorView y;             // (M, N), x's dtype
  TensorView residual_out;  // (M, N), any floating dtype, optional: h rounded once. y is computed
                            // from the unrounded h.
  TensorView mean;          // (M) float32 (float64 if x is), contiguous; absent for RMS
  TensorView rstd;          // (M) float32 (float64 if x is), contiguous
  void* stream = nullptr;   // cudaStream_t
};

// With xhat = (h - mean) rstd, c1 = mean(xhat w dy), c2 = mean(w dy) (RMS: c2 = 0):
//   dh = (w dy - xhat c1 - c2) rstd + dresidual_out;  dx = dresidual = dh
//   dweight = sum over rows of dy xhat;  dbias = sum over rows of dy
struct BackwardParams {
  TensorView dy;             // (M, N), dtype of forward's x
  TensorView dresidual_out;  // (M, N), h's dtype, optional: gradient of residual_out
  TensorView h;              // (M, N): residual_out of forward, or x where there was none
  TensorView weight;         // (N)
  TensorView mean;           // (M); absent for RMS
  TensorView rstd;           // (M)
  bool is_rms_norm = false;

  TensorView dx;  // (M, N), dtype of forward's x
  TensorView
      dresidual;  // (M, N), h's dtype, optional: the same gradient for a residual of another dtype
  TensorView dweight;    // (N) float32 (float64 if x is), contiguous
  TensorView dbias;      // (N) float32 (float64 if x is), contiguous, optional
  TensorView workspace;  // (workspace_rows(...), 2, N) float32, contiguous: partial sums of dweight
                         // and dbias
  void* stream = nullptr;
};

// Rows of the workspace that backward wants for M rows on this device: partial sums are added in a
// fixed order, so gradients are the same in every run.
std::int64_t workspace_rows(std::int64_t rows, Device device);

void forward(const ForwardParams& params);
void backward(const BackwardParams& params);

}  // namespace mamba_native::layer_norm
