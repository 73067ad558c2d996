#include "selective_scan/cpu_kernel.h"

namespace mamba_native::selective_scan::cpu {

const Kernels kAvx512Kernels = kernels<xsimd::avx512bw>();

}  // namespace mamba_native::selective_scan::cpu
