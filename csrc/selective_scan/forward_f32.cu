#include "selective_scan/forward.cuh"

template void mamba_native::selective_scan::cuda::forward<float>(
    const mamba_native::selective_scan::ForwardParams&);
