// torch's threads for the loops of core/parallel_for.h.
#pragma once

namespace mamba_native::binding {

// Once per library, when torch loads it.
void use_torch_threads();

}  // namespace mamba_native::binding
