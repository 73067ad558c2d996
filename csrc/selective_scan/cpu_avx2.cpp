#include "selective_scan/cpu_kernel.h"

namespace mamba_native::selective_scan::cpu {

const Kernels kAvx2Kernels = kernels<xsimd::fma3<xsimd::avx2>>();

}  // namespace mamba_native::selective_scan::cpu
