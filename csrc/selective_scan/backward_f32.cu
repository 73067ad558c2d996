#include "selective_scan/backward.cuh"

template void mamba_native::selective_scan::cuda::backward<float>(
    const mamba_native::selective_scan::BackwardParams&);
