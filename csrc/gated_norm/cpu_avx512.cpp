#include "gated_norm/cpu_kernel.h"

namespace mamba_native::gated_norm::cpu {

const Kernels kAvx512Kernels = {&forward_rows<xsimd::avx512bw>, &backward_rows<xsimd::avx512bw>};

}  // namespace mamba_native::gated_norm::cpu
