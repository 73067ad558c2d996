// The choice of kernels, which needs no GPU.
#include "selective_scan/plan.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "core/error.h"

namespace mamba_native::selective_scan {
namespace {

using mamba_native::cuda::DeviceInfo;

constexpr int kKilobyte = 1024;
constexpr DeviceInfo kH200{132, 9, 0, 227 * kKilobyte};
constexpr DeviceInfo kTuring{40, 7, 5, 64 * kKilobyte};

Problem problem(std::int64_t batch, std::int64_t channels, std::int64_t length,
                std::int64_t d_state = 16, std::int64_t groups = 1) {
  Problem out;
  out.batch = batch;
  out.channels = channels;
  out.length = length;
  out.d_state = d_state;
  out.groups = groups;
  return out;
}

const ForwardConfig& forward_row(const Problem& problem, const DeviceInfo& device = kH200) {
  return kForwardConfigs[choose_forward(problem, device)];
}

const BackwardConfig& backward_row(const Problem& problem, const DeviceInfo& device = kH200) {
  return kBackwardConfigs[choose_backward(problem, device)];
}

template <class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(SelectiveScanPlan, ManyChannelsRunSeriallyWithFewerLanesTheMoreThereAre) {
  int lanes = 32;
  for (const std::int64_t batch : {4, 8, 16, 64}) {
    const ForwardConfig& row = forward_row(problem(batch, 1536, 2048));
    EXPECT_EQ(row.mapping, Mapping::serial) << batch;
    EXPECT_LE(row.lanes, lanes) << batch;
    lanes = row.lanes;
  }
  EXPECT_EQ(lanes, 2);
}

TEST(SelectiveScanPlan, FewChannelsSpreadOverTime) {
  EXPECT_EQ(forward_row(problem(1, 1536, 2048)).mapping, Mapping::lanes);
  EXPECT_EQ(forward_row(problem(1, 1, 65536)).mapping, Mapping::lanes);
}

TEST(SelectiveScanPlan, TheSameChannelsAreManyOnASmallDevice) {
  EXPECT_EQ(forward_row(problem(1, 5120, 2048), kTuring).mapping, Mapping::serial);
}

TEST(SelectiveScanPlan, ShortSequencesRunSerially) {
  EXPECT_EQ(forward_row(problem(1, 1536, 16)).mapping, Mapping::serial);
  EXPECT_EQ(forward_row(problem(4096, 1024, 16)).mapping, Mapping::serial);
}

TEST(SelectiveScanPlan, WhatTheSerialMappingCannotHoldSpreadsOverTime) {
  EXPECT_EQ(forward_row(problem(64, 1536, 2048, 17)).mapping, Mapping::lanes);
  EXPECT_EQ(forward_row(problem(64, 1536, 2048, 256)).mapping, Mapping::lanes);
  EXPECT_EQ(forward_row(problem(64, 1536, 2048, 16, 1536)).mapping, Mapping::lanes)
      << "groups of one channel leave a serial CTA empty";
  Problem constant = problem(64, 1536, 2048);
  constant.varying_B = false;
  EXPECT_EQ(forward_row(constant).mapping, Mapping::lanes);
}

TEST(SelectiveScanPlan, RowsAreForWhatTheProblemNeedsAndNoMore) {
  const Problem plain = problem(64, 1536, 2048);
  Problem reverse = plain, packed = plain, deterministic = plain;
  reverse.reverse = true;
  packed.packed = packed.reverse = true;
  deterministic.deterministic = true;
  EXPECT_EQ(forward_row(plain).scope, Scope::plain);
  EXPECT_EQ(forward_row(reverse).scope, Scope::reverse);
  EXPECT_EQ(forward_row(reverse).mapping, Mapping::serial);
  EXPECT_EQ(forward_row(packed).scope, Scope::packed);
  EXPECT_EQ(backward_row(plain).scope, Scope::plain);
  EXPECT_EQ(backward_row(reverse).scope, Scope::either);
  EXPECT_EQ(backward_row(deterministic).scope, Scope::either);
  EXPECT_EQ(backward_row(packed).scope, Scope::packed);
  const int row = choose_forward(plain, kH200);
  const std::string refused = message_of([&] { choose_forward(reverse, kH200, row); });
  EXPECT_NE(refused.find("it is for another direction"), std::string::npos) << refused;
}

TEST(SelectiveScanPlan, BackwardReducesAsManyChannelsAsAGroupHas) {
  int widest = 0;
  for (const BackwardConfig& row : kBackwardConfigs) {
    widest = row.warps > widest ? row.warps : widest;
  }
  EXPECT_EQ(backward_row(problem(8, 1536, 2048)).warps, widest);
  EXPECT_EQ(backward_row(problem(8, 1536, 2048, 16, 1536)).warps, 1);
}

TEST(SelectiveScanPlan, BackwardFitsTheDevicesSharedMemory) {
  for (const DeviceInfo& device : {kTuring, kH200}) {
    for (const std::int64_t d_state : {1, 16, 64, 256, 1000, 4000}) {
      for (const bool reverse : {false, true}) {
        Problem each = problem(1, 1536, 2048, d_state);
        each.reverse = reverse && d_state < 2000;
        const BackwardConfig& row = backward_row(each, device);
        EXPECT_LE(backward_shared_memory(row.warps, d_state), device.shared_memory_per_block)
            << d_state;
      }
    }
  }
  for (const BackwardConfig& row : kBackwardConfigs) {
    EXPECT_LE(backward_shared_memory(row.warps, 16), 48 * kKilobyte) << describe(row);
  }
  const std::string message =
      message_of([] { choose_backward(problem(1, 16, 16, 100000), kTuring); });
  EXPECT_NE(message.find("does not hold that many states"), std::string::npos) << message;
}

TEST(SelectiveScanPlan, AForcedRowIsTakenOrRefusedWithTheReason) {
  const Problem wide = problem(8, 1536, 2048);
  for (int i = 0; i < kForwardConfigCount; ++i) {
    Problem each = wide;
    each.reverse = kForwardConfigs[i].scope == Scope::reverse;
    EXPECT_EQ(choose_forward(each, kH200, i), i);
  }
  for (int i = 0; i < kBackwardConfigCount; ++i) {
    EXPECT_EQ(choose_backward(wide, kH200, i), i);
  }
  const int serial = choose_forward(wide, kH200);
  const std::string refused =
      message_of([&] { choose_forward(problem(8, 1536, 2048, 64), kH200, serial); });
  EXPECT_NE(refused.find("16 states at most"), std::string::npos) << refused;
  EXPECT_NE(refused.find(describe(kForwardConfigs[serial])), std::string::npos) << refused;
}

TEST(SelectiveScanPlan, AnUnknownRowListsThoseThatExist) {
  const std::string forward =
      message_of([] { choose_forward(problem(1, 1, 1), kH200, kForwardConfigCount); });
  for (const ForwardConfig& row : kForwardConfigs) {
    EXPECT_NE(forward.find(describe(row)), std::string::npos) << forward;
  }
  const std::string backward =
      message_of([] { choose_backward(problem(1, 1, 1), kH200, kBackwardConfigCount); });
  for (const BackwardConfig& row : kBackwardConfigs) {
    EXPECT_NE(backward.find(describe(row)), std::string::npos) << backward;
  }
}

TEST(SelectiveScanPlan, RowsDescribeThemselvesDistinctly) {
  std::set<std::string> names;
  for (const ForwardConfig& row : kForwardConfigs) {
    names.insert(describe(row));
  }
  for (const BackwardConfig& row : kBackwardConfigs) {
    names.insert(describe(row));
  }
  EXPECT_EQ(names.size(), static_cast<std::size_t>(kForwardConfigCount + kBackwardConfigCount));
}

TEST(SelectiveScanPlan, ReadsTheProblemFromTheTensors) {
  Inputs in;
  in.u = TensorView(nullptr, DType::bf16, {2, 12, 300});
  in.A = TensorView(nullptr, DType::f32, {12, 8});
  in.B = TensorView(nullptr, DType::f32, {12, 8});
  in.C = TensorView(nullptr, DType::bf16, {2, 3, 8, 300});
  const Problem read = problem_of(in);
  EXPECT_EQ(read.batch, 2);
  EXPECT_EQ(read.channels_per_group(), 4);
  EXPECT_EQ(read.length, 300);
  EXPECT_EQ(read.d_state, 8);
  EXPECT_FALSE(read.varying_B);
  EXPECT_TRUE(read.varying_C);
  EXPECT_FALSE(read.packed);
  in.seq_idx = TensorView(nullptr, DType::i32, {2, 300});
  EXPECT_TRUE(problem_of(in).packed);
}

}  // namespace
}  // namespace mamba_native::selective_scan
