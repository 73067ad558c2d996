#include "state_update/cpu_kernel.h"

namespace mamba_native::state_update::cpu {

void update_rows_avx2(const Rows& rows) { update_rows<xsimd::fma3<xsimd::avx2>>(rows); }

}  // namespace mamba_native::state_update::cpu
