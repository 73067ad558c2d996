#include "gated_norm/cpu_kernel.h"

namespace mamba_native::gated_norm::cpu {

const Kernels kSse2Kernels = {&forward_rows<xsimd::sse2>, &backward_rows<xsimd::sse2>};

}  // namespace mamba_native::gated_norm::cpu
