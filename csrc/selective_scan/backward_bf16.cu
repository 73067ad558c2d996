#include "selective_scan/backward.cuh"

template void mamba_native::selective_scan::cuda::backward<mamba_native::BFloat16>(
    const mamba_native::selective_scan::BackwardParams&);
