#include "core/cpu/isa.h"

#include <cstdlib>
#include <string>
#include <xsimd/xsimd.hpp>

#include "core/error.h"

namespace mamba_native::cpu {
namespace {

Isa choose() {
  const Isa highest = highest_isa();
  const char* variable = std::getenv("MAMBA_CPU_ISA");
  if (variable == nullptr || *variable == '\0') {
    return highest;
  }
  for (const Isa isa : {Isa::plain, Isa::sse2, Isa::avx2, Isa::avx512}) {
    if (std::string(variable) == name(isa)) {
      MAMBA_CHECK(isa <= highest, "MAMBA_CPU_ISA=", variable,
                  " asks for more than this machine has: ", name(highest));
      return isa;
    }
  }
  fail("MAMBA_CPU_ISA must be plain, sse2, avx2 or avx512, got \"", variable, "\"");
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::plain:
      return "plain";
    case Isa::sse2:
      return "sse2";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  fail("unknown instruction set ", static_cast<int>(isa));
}

Isa highest_isa() {
  const auto here = xsimd::available_architectures();
  // Every processor with AVX512BW also has DQ and VL, and every one with AVX2 and FMA has F16C.
  if (here.has(xsimd::avx512bw{})) {
    return Isa::avx512;
  }
  return here.has(xsimd::fma3<xsimd::avx2>{}) ? Isa::avx2 : Isa::sse2;
}

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace mamba_native::cpu
