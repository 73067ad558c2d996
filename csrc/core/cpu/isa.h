// Which instruction set the CPU kernels use, decided once at run time.
#pragma once

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

}  // namespace mamba_native::cpu
