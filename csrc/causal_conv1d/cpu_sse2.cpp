#include "causal_conv1d/cpu_kernel.h"

namespace mamba_native::causal_conv1d::cpu {

const Kernels kSse2Kernels = kernels<xsimd::sse2>();

}  // namespace mamba_native::causal_conv1d::cpu
