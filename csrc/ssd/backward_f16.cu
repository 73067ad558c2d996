#include "ssd/backward.cuh"

template void mamba_native::ssd::cuda::backward<mamba_native::Half>(
    const mamba_native::ssd::BackwardParams&);
