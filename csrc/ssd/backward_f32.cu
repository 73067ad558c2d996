#include "ssd/backward.cuh"

template void mamba_native::ssd::cuda::backward<float>(const mamba_native::ssd::BackwardParams&);
