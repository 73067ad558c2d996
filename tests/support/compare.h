// The two metrics by which every result is judged.
//
//   truth      the formula in float64, on inputs already rounded to the dtype: reference::f<double>
//   on f64
//              copies of the inputs (Tensor::to(DType::f64, kCpu))
//   yardstick  the formula in float32 on the same inputs, the output rounded once to the dtype:
//              reference::f<float> on tensors of the dtype
//   1. NMSE = sum (out - truth)^2 / sum truth^2 stays under the bound of bounds.inc
//   2. max |out - truth| <= slack max(max |yardstick - truth|, ulp / 2) + ulp, the ulp of the
//      output's dtype at max |truth|, slack 2 forward and 3 for gradients. Half an ulp is what
//      rounding once errs by: a yardstick below that is exact by chance.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/dtype.h"

namespace mamba_native::test {

inline constexpr double kForwardSlack = 2.0;
inline constexpr double kGradientSlack = 3.0;
// Factor on either for scans on CUDA: their decays are ex2.approx, which errs low by 2e-8 to 5e-8
// on average (an H200, 2026-11-22) where the yardstick's exp is right on average; a long-lived
// state adds that up.
inline constexpr double kHardwareExp2Slack = 2.0;
// Factor on either for complex states: they turn by angles of several radians, which magnify the
// last bit of softplus(delta). Whose library rounds one step's the right way decides the worst
// state: one yardstick errs by 5e-8 with Windows' C runtime, or with softplus in double, and by
// 14e-8 with glibc.
inline constexpr double kAngleSlack = 1.5;
// Factor on kGradientSlack for float32 sums over the whole batch on CUDA: atomics add up to 65,537
// terms in an order that changes between runs, where the yardstick adds them in one.
inline constexpr double kAtomicSlack = 4.0;

// The row of bounds.inc; throws when there is none.
double nmse_bound(const std::string& op, DType dtype);

double nmse(const std::vector<double>& out, const std::vector<double>& truth);

// Both metrics. `op` is bounds.inc's name and `dtype` that of the activations; `out_dtype` that of
// this output. The message, failed or not, says how much of each bound was used.
testing::AssertionResult is_close(const std::string& op, DType dtype, const std::string& output,
                                  DType out_dtype, const std::vector<double>& out,
                                  const std::vector<double>& truth,
                                  const std::vector<double>& yardstick, double slack);

}  // namespace mamba_native::test
