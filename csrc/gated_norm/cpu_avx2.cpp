#include "gated_norm/cpu_kernel.h"

namespace mamba_native::gated_norm::cpu {

const Kernels kAvx2Kernels = {&forward_rows<xsimd::fma3<xsimd::avx2>>,
                              &backward_rows<xsimd::fma3<xsimd::avx2>>};

}  // namespace mamba_native::gated_norm::cpu
