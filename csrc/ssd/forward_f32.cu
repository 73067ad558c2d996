#include "ssd/forward.cuh"

template void mamba_native::ssd::cuda::forward<float>(const mamba_native::ssd::ForwardParams&);
