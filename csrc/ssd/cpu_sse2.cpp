#include "ssd/cpu_kernel.h"

namespace mamba_native::ssd::cpu {

const Kernels kSse2Kernels = kernels<xsimd::sse2>();

}  // namespace mamba_native::ssd::cpu
