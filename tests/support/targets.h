// The implementations that tests compare with the oracle, and the tests' rows: every case in every
// dtype on every implementation. A row that cannot run here is skipped, with the reason.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <initializer_list>
#include <ostream>
#include <string>
#include <vector>

#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "support/device_memory.h"
#include "support/tensor.h"

namespace mamba_native::test {

struct Target {
  const char* name;
  Device device;
  cpu::Isa isa;  // on the CPU
};

inline const Target kTargets[] = {{"plain", kCpu, cpu::Isa::plain},
                                  {"sse2", kCpu, cpu::Isa::sse2},
                                  {"avx2", kCpu, cpu::Isa::avx2},
                                  {"avx512", kCpu, cpu::Isa::avx512},
                                  {"cuda", kCuda, cpu::Isa::plain}};

// Why a target or a dtype cannot run here; empty if it can.
std::string unavailable(const Target& target);
std::string unavailable(DType dtype);

const char* short_name(DType dtype);  // "bf16"

// A target's implementation of an operation, given the one that dispatches by device, and the
// CPU's, which takes the instruction set.
template <class Params>
std::function<void(const Params&)> on(const Target& target, void (*dispatch)(const Params&),
                                      void (*on_cpu)(const Params&, cpu::Isa)) {
  if (target.device.is_cuda()) {
    return dispatch;
  }
  return [on_cpu, isa = target.isa](const Params& params) { on_cpu(params, isa); };
}

// What a test needs, and skips without.
inline void require(std::initializer_list<std::string> reasons) {
  for (const std::string& reason : reasons) {
    if (!reason.empty()) {
      GTEST_SKIP() << reason;
    }
  }
}

// Base of the tests that run once for each of kTargets.
class TargetTest : public testing::TestWithParam<Target> {
 protected:
  void SetUp() override { require({unavailable(GetParam())}); }
};
std::string target_name(const testing::TestParamInfo<Target>& info);
void PrintTo(const Target& target, std::ostream* stream);

template <class Case>
struct Row {
  Target target;
  DType dtype;
  Case problem;  // has a name
};

template <class Case>
std::vector<Row<Case>> rows(const std::vector<Case>& problems) {
  std::vector<Row<Case>> all;
  for (const Target& target : kTargets) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const Case& problem : problems) {
        all.push_back({target, dtype, problem});
      }
    }
  }
  return all;
}

template <class Case>
std::string row_name(const testing::TestParamInfo<Row<Case>>& info) {
  return std::string(info.param.target.name) + "_" + short_name(info.param.dtype) + "_" +
         info.param.problem.name;
}

template <class Case>
void PrintTo(const Row<Case>& row, std::ostream* stream) {
  *stream << row.target.name << " " << short_name(row.dtype) << " " << row.problem.name;
}

// Base of the tests that run once for each row.
template <class Case>
class RowTest : public testing::TestWithParam<Row<Case>> {
 protected:
  void SetUp() override {
    const Row<Case>& row = this->GetParam();
    require({unavailable(row.target), unavailable(row.dtype)});
  }
};

}  // namespace mamba_native::test
