#include "ssd/forward.cuh"

template void mamba_native::ssd::cuda::forward<mamba_native::Half>(
    const mamba_native::ssd::ForwardParams&);
