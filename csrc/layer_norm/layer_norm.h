// LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019) fused with the residual addition
// of a pre-norm block, forward and backward; also of parallel blocks, where a second branch joins
// the sum and a second weight and bias make a second output, with dropout (Srivastava et al. 2014)
// on the branches and a factor for the rows of the first.
//
// For every row of M:
//   h    = dropout(x rowscale) + dropout(x1) + residual      (each but x may be absent)
//   rstd = (mean((h - mean(h))^2) + eps)^-1/2          (RMS: (mean(h^2) + eps)^-1/2, no mean)
//   y    = (h - mean) rstd weight + bias               (RMS: h rstd weight + bias)
//   y1   = (h - mean) rstd weight1 + bias1
//
// Sizes: M rows of N features; M = 0 is valid, N >= 1. Leading dimensions are flattened by the
// caller. Dtypes: x, x1, weight, weight1, residual, rowscale each float32, float16 or bfloat16 on
// its own (float64 on the CPU: all of them); a bias has its weight's dtype. Arithmetic is float32;
// y and y1 have x's dtype. Strides: rows may be any distance apart (0 included, for inputs);
// features any distance, fast at 1. Errors: mamba_native::Error naming the argument, before memory
// is touched.
#pragma once

#include "core/tensor.h"

namespace mamba_native::layer_norm {

// Dropout sets an element to 0 with probability p and divides the others by 1 - p. The seed, the
// row, the column and the branch alone decide: the same on every device, with any threads.
struct DropoutParams {
  double p = 0.0;   // in [0, 1]; 0: none
  TensorView seed;  // (1) int64 on x's device, with p > 0
};

struct ForwardParams {
  TensorView x;         // (M, N)
  TensorView weight;    // (N)
  TensorView bias;      // (N), optional
  TensorView residual;  // (M, N), optional
  TensorView x1;        // (M, N), optional
  TensorView weight1;   // (N), optional: asks for y1
  TensorView bias1;     // (N), optional, with weight1
  TensorView rowscale;  // (M), optional
  DropoutParams dropout;
  double eps = 1e-6;
  bool is_rms_norm = false;

  TensorView y;             // (M, N), x's dtype
  TensorView y1;            // (M, N), x's dtype, with weight1
  TensorView residual_out;  // (M, N), any floating dtype, optional: h rounded once. y is computed
                            // from the unrounded h.
  TensorView mean;          // (M) float32 (float64 if x is), contiguous; absent for RMS
  TensorView rstd;          // (M) float32 (float64 if x is), contiguous
  std::uint8_t* mask = nullptr;   // (M, N) contiguous, optional, with dropout: 1 where x stays
  std::uint8_t* mask1 = nullptr;  // the same of x1
  void* stream = nullptr;         // cudaStream_t
};

// With xhat = (h - mean) rstd, g = w dy + w1 dy1, c1 = mean(xhat g), c2 = mean(g) (RMS: c2 = 0):
//   dh = (g - xhat c1 - c2) rstd + dresidual_out = dresidual
//   dx = dropout(dh) rowscale, dx1 = dropout(dh), with forward's elements dropped
//   dweight = sum over rows of dy xhat;  dbias = sum over rows of dy;  the same of dy1
struct BackwardParams {
  TensorView dy;             // (M, N), dtype of forward's x
  TensorView dy1;            // (M, N), the same, with weight1
  TensorView dresidual_out;  // (M, N), h's dtype, optional: gradient of residual_out
  TensorView h;              // (M, N): residual_out of forward, or x where that is the sum
  TensorView weight;         // (N)
  TensorView weight1;        // (N), optional
  TensorView rowscale;       // (M), optional
  DropoutParams dropout;     // forward's
  TensorView mean;           // (M); absent for RMS
  TensorView rstd;           // (M)
  bool is_rms_norm = false;

  TensorView dx;         // (M, N), dtype of forward's x
  TensorView dx1;        // (M, N), dtype of forward's x1, optional
  TensorView dresidual;  // (M, N), h's dtype, optional: where dx is not the residual's gradient
  TensorView dweight;    // (N) float32 (float64 if x is), contiguous
  TensorView dbias;      // (N) float32 (float64 if x is), contiguous, optional
  TensorView dweight1;   // (N) float32 (float64 if x is), contiguous, with weight1
  TensorView dbias1;     // (N) float32 (float64 if x is), contiguous, optional
  TensorView workspace;  // (workspace_rows(...), 2, N) float32, contiguous; (..., 4, N) with
                         // weight1: partial sums of dweight, dbias, dweight1 and dbias1
  void* stream = nullptr;
};

// Rows of the workspace that backward wants for M rows on this device: partial sums are added in a
// fixed order, so gradients are the same in every run.
std::int64_t workspace_rows(std::int64_t rows, Device device);

void forward(const ForwardParams& params);
void backward(const BackwardParams& params);

}  // namespace mamba_native::layer_norm
