#include "state_update/cpu_kernel.h"

namespace mamba_native::state_update::cpu {

void update_rows_avx512(const Rows& rows) { update_rows<xsimd::avx512bw>(rows); }

}  // namespace mamba_native::state_update::cpu
