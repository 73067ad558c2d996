// Which instruction set the CPU kernels use, decided once at run time.
#pragma once

#include "core/error.h"

namespace mamba_native::cpu {

// `plain` is portable scalar C++ and never chosen by itself: the baseline that benchmarks compare
// with.
enum class Isa { plain, sse2, avx2, avx512 };

const char* name(Isa isa);

// The highest that this processor and operating system run: avx512 needs F, CD, BW, DQ and VL, avx2
// needs FMA and F16C too.
Isa highest_isa();

// highest_isa(), unless MAMBA_CPU_ISA=plain|sse2|avx2|avx512 in the environment forces one; an
// unknown name or one that this machine lacks is an Error.
Isa current_isa();

// An operation's kernels for an instruction set. `plain` has none: it runs the reference.
template <class Kernels>
const Kernels& kernels_for(Isa isa, const Kernels& sse2, const Kernels& avx2,
                           const Kernels& avx512) {
  switch (isa) {
    case Isa::sse2:
      return sse2;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::plain:
      break;
  }
  fail("no SIMD kernels for instruction set ", name(isa));
}

}  // namespace mamba_native::cpu
