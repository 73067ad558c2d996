#include "selective_scan/cpu_kernel.h"

namespace mamba_native::selective_scan::cpu {

const Kernels kSse2Kernels = kernels<xsimd::sse2>();

}  // namespace mamba_native::selective_scan::cpu
