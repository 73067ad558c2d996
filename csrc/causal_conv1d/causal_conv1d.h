// The causal depthwise convolution in front of every Mamba scan: forward, backward, the decode step
// and the states of packed sequences.
//
// For every batch b and channel d, with x[b,d,t] for t < 0 taken from initial_states (or 0):
//   p[b,d,l]   = bias[d] + sum_{w=0}^{W-1} weight[d,w] x[b,d,l-(W-1-w)]
//   out[b,d,l] = silu(p) or p
// With seq_idx a tap counts only if seq_idx at the tap equals seq_idx at the output; outputs where
// seq_idx is negative are exactly 0, and their gradient reaches nothing. Columns of initial_states
// belong to the sequence of position 0. final_states are then what the next step of the last
// position's sequence would see: columns of other sequences are 0, and so are all of them where the
// last position is padding.
//
// Sizes: B batch, D channels, L length, W width (2 to 8; 2 to 4 are fast). B = 0, D = 0 and L = 0
// are valid; L = 0 passes initial_states on, and their gradient back.
// Dtypes: x and weight each float32, float16 or bfloat16 in any pair (float64 on the CPU, both
// then); bias has weight's dtype. Arithmetic is float32, rounded once to x's dtype. Strides: any
// for every tensor, any alignment; x with unit stride along L (channel-first) or along D
// (channel-last) is fast. Errors: mamba_native::Error naming the argument, before memory is
// touched. CUDA work is enqueued on `stream`, whose device must be the current one; nothing
// synchronises or allocates. Outputs overlap neither inputs nor each other.
// Source: causal-conv1d 1.6's functions of the same names; its limits on layouts, alignment, D mod
// 8, width and options are not kept, and padding takes part in no gradient.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace mamba_native::causal_conv1d {

inline constexpr int kMinWidth = 2;
inline constexpr int kMaxWidth = 8;

struct Inputs {
  TensorView x;               // (B, D, L)
  TensorView weight;          // (D, W)
  TensorView bias;            // (D), optional
  TensorView seq_idx;         // (B, L) int32, optional
  TensorView initial_states;  // (B, D, W-1), x's dtype, optional: the W-1 inputs before x
  bool silu = false;
};

struct ForwardParams {
  Inputs in;
  TensorView out;           // (B, D, L), x's dtype
  TensorView final_states;  // (B, D, W-1), x's dtype, optional: the last W-1 columns of
                            // [initial_states, x], masked by seq_idx
  void* stream = nullptr;   // cudaStream_t
};

struct BackwardParams {
  Inputs in;
  TensorView dout;             // (B, D, L), x's dtype
  TensorView dfinal_states;    // (B, D, W-1), x's dtype, optional
  TensorView dx;               // (B, D, L), x's dtype
  TensorView dweight;          // (D, W), float32 (float64 if x is), contiguous
  TensorView dbias;            // (D), float32 (float64 if x is), contiguous, present iff bias is
  TensorView dinitial_states;  // (B, D, W-1), x's dtype, present iff initial_states is
  TensorView workspace;        // (workspace_rows(in), D, W+1) float32, contiguous, optional: asks
                               // CUDA to add dweight and dbias up in a fixed order
  void* stream = nullptr;
};

// Rows of the workspace that makes backward give the same bits in every run: 0 on the CPU, where
// it always does.
std::int64_t workspace_rows(const Inputs& in);

// One decode step of S >= 1 new tokens; conv_state is changed in place.
//  linear buffer (no cache_seqlens): v = [conv_state row, x]; out_i = act(bias + sum_w weight_w
//    v[state_len + i - (W-1-w)]); conv_state row = last state_len columns of v.
//  circular buffer: with c = cache_seqlens[b], the W-1 columns before token 0 are
//    conv_state[(c-(W-1)+j) mod state_len], j = 0..W-2; token i is stored at (c+i) mod state_len;
//    outputs are computed as if the context were read before being overwritten.
// Index values out of range are an Error on the CPU. On CUDA nobody waits to look: a row beyond
// conv_state gives NaN and touches no state, a negative cache_seqlens counts modulo state_len.
// Sequences that share a row of conv_state have no defined result.
struct UpdateParams {
  TensorView x;                   // (B, D, S)
  TensorView conv_state;          // (B or entries, D, state_len >= W-1), x's dtype, any strides
  TensorView weight;              // (D, W)
  TensorView bias;                // (D), optional
  TensorView cache_seqlens;       // (B) int32, optional, >= 0
  TensorView conv_state_indices;  // (B) int32, optional: conv_state's row for each b; a negative
                                  // one gives an output row of 0 and touches no state
  TensorView out;                 // (B, D, S), x's dtype
  bool silu = false;
  void* stream = nullptr;
};

// The last min(length, state_len) tokens of each packed sequence, right-aligned, zeros before them.
// cu_seqlens that fall or leave [0, T] are an Error on the CPU; on CUDA they are clamped to [0, T].
struct VarlenStatesParams {
  TensorView x;           // (T, D), any strides
  TensorView cu_seqlens;  // (S+1) int32 or int64, sorted, within [0, T]
  TensorView states;      // (S, D, state_len), x's dtype
  void* stream = nullptr;
};

// Without a workspace, dweight and dbias are summed with float32 atomics on CUDA. Everything is
// overwritten whole.
void forward(const ForwardParams& params);
void backward(const BackwardParams& params);
void update(const UpdateParams& params);
void varlen_states(const VarlenStatesParams& params);

}  // namespace mamba_native::causal_conv1d
