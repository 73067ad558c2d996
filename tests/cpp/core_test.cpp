#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/math.h"
#include "core/parallel_for.h"
#include "core/tensor.h"

namespace mamba_native {
namespace {

TEST(Dtype, HalfRoundTripsEveryFiniteValue) {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Half half{static_cast<std::uint16_t>(bits)};
    const float value = to_float(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(to_float(round_to_f16(value)))) << bits;
    } else {
      EXPECT_EQ(round_to_f16(value).bits, half.bits) << bits;
    }
  }
}

TEST(Dtype, HalfKnownValues) {
  EXPECT_EQ(to_float(Half{0x3c00}), 1.0f);
  EXPECT_EQ(to_float(Half{0x0001}), std::ldexp(1.0f, -24));
  EXPECT_EQ(to_float(Half{0x7bff}), 65504.0f);
  EXPECT_EQ(round_to_f16(65519.0f).bits, 0x7bff);
  EXPECT_EQ(round_to_f16(65520.0f).bits, 0x7c00);
  EXPECT_EQ(round_to_f16(1.0f + std::ldexp(1.0f, -11)).bits, 0x3c00) << "ties go to even";
  EXPECT_EQ(round_to_f16(1.0f + 3 * std::ldexp(1.0f, -11)).bits, 0x3c02) << "ties go to even";
}

TEST(Dtype, BFloat16RoundsToNearestEven) {
  EXPECT_EQ(round_to_bf16(1.0f).bits, 0x3f80);
  EXPECT_EQ(round_to_bf16(1.0f + std::ldexp(1.0f, -8)).bits, 0x3f80);
  EXPECT_EQ(round_to_bf16(1.0f + 3 * std::ldexp(1.0f, -8)).bits, 0x3f82);
  EXPECT_TRUE(std::isnan(to_float(round_to_bf16(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_TRUE(std::isinf(to_float(round_to_bf16(std::numeric_limits<float>::max()))));
}

TEST(Math, SoftplusHasTheFieldsThreshold) {
  EXPECT_DOUBLE_EQ(softplus(0.0), std::log(2.0));
  EXPECT_EQ(softplus(20.5), 20.5);
  EXPECT_GT(softplus(19.5), 19.5);
  EXPECT_EQ(softplus_grad(20.5), 1.0);
}

TEST(Tensor, ContiguousStrides) {
  float data[24];
  const TensorView view(data, DType::f32, {2, 3, 4});
  EXPECT_EQ(view.stride[0], 12);
  EXPECT_EQ(view.stride[2], 1);
  EXPECT_TRUE(view.is_contiguous());
  EXPECT_EQ(view.numel(), 24);
  EXPECT_EQ(describe(view), "(2, 3, 4) float32 on cpu");
}

TEST(Tensor, ChecksNameTheArgument) {
  float data[4];
  const TensorView view(data, DType::f32, {2, 2});
  try {
    check_shape("op", "weight", view, {2, 3});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()),
              "op: weight must have shape (2, 3), got (2, 2) float32 on cpu");
  }
  EXPECT_THROW(check_dtype("op", "weight", view, DType::i32), Error);
  EXPECT_THROW(check_device("op", "weight", view, Device{DeviceType::cuda, 1}), Error);
}

TEST(ParallelFor, CoversEveryItemOnce) {
  for (const std::int64_t count : {0, 1, 7, 1000}) {
    std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
    parallel_for(count, 3, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        ++seen[static_cast<std::size_t>(i)];
      }
    });
    for (const std::atomic<int>& times : seen) {
      EXPECT_EQ(times.load(), 1);
    }
  }
}

TEST(ParallelFor, ThrowsWhatABodyThrew) {
  for (int repeat = 0; repeat < 100; ++repeat) {
    EXPECT_THROW(parallel_for(100, 1,
                              [](std::int64_t begin, std::int64_t) {
                                if (begin == 0) {
                                  fail("first range");
                                }
                              }),
                 Error);
  }
}

TEST(Isa, ChoosesOneThatHasAName) { EXPECT_NE(std::string(cpu::name(cpu::current_isa())), ""); }

}  // namespace
}  // namespace mamba_native
