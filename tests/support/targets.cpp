#include "support/targets.h"

namespace mamba_native::test {

std::string unavailable(const Target& target) {
  if (target.device.is_cuda()) {
    return cuda_unavailable();
  }
  return target.isa <= cpu::highest_isa() ? "" : "this processor lacks it";
}

std::string unavailable(DType dtype) {
  const bool built = dtype == DType::f16    ? MAMBA_WITH_F16
                     : dtype == DType::bf16 ? MAMBA_WITH_BF16
                                            : true;
  return built ? "" : "built without " + std::string(name(dtype));
}

const char* short_name(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::f16 ? "f16" : "bf16";
}

std::string target_name(const testing::TestParamInfo<Target>& info) { return info.param.name; }

void PrintTo(const Target& target, std::ostream* stream) { *stream << target.name; }

}  // namespace mamba_native::test
