#include "state_update/update.cuh"

namespace mamba_native::state_update::cuda {

template void update<Half>(const Params&, const Plan&);

}  // namespace mamba_native::state_update::cuda
