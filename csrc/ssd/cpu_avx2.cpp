#include "ssd/cpu_kernel.h"

namespace mamba_native::ssd::cpu {

const Kernels kAvx2Kernels = kernels<xsimd::fma3<xsimd::avx2>>();

}  // namespace mamba_native::ssd::cpu
