#include "causal_conv1d/cpu_kernel.h"

namespace mamba_native::causal_conv1d::cpu {

const Kernels kAvx2Kernels = kernels<xsimd::fma3<xsimd::avx2>>();

}  // namespace mamba_native::causal_conv1d::cpu
