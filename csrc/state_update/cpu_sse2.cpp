#include "state_update/cpu_kernel.h"

namespace mamba_native::state_update::cpu {

void update_rows_sse2(const Rows& rows) { update_rows<xsimd::sse2>(rows); }

}  // namespace mamba_native::state_update::cpu
