#include "causal_conv1d/cpu_kernel.h"

namespace mamba_native::causal_conv1d::cpu {

const Kernels kAvx512Kernels = kernels<xsimd::avx512bw>();

}  // namespace mamba_native::causal_conv1d::cpu
