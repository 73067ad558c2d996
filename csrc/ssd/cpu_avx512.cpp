#include "ssd/cpu_kernel.h"

namespace mamba_native::ssd::cpu {

const Kernels kAvx512Kernels = kernels<xsimd::avx512bw>();

}  // namespace mamba_native::ssd::cpu
