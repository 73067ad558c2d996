// What belongs to the library as a whole: torch's threads for our loops, and what this build is.
#include "binding.h"
#include "box.h"
#include "core/cpu/isa.h"
#include "core/error.h"
#include "parallel.h"

#if MAMBA_WITH_CUDA
#include "core/cuda/device.h"
#endif

namespace mamba_native::binding {
namespace {

// JSON, for the loader, the benchmark and bug reports.
std::string native_info() {
#if MAMBA_WITH_CUDA
  const std::string cuda =
      text(cuda::toolkit_version() / 1000, ".", cuda::toolkit_version() % 1000 / 10);
  const std::string toolkit = text('"', cuda, '"');
  const std::string architectures = cuda::compiled_architectures();
#else
  const std::string toolkit = "null";
  const std::string architectures;
#endif
  std::string dtypes = "\"float32\", \"float64\"";
#if MAMBA_WITH_F16
  dtypes += ", \"float16\"";
#endif
#if MAMBA_WITH_BF16
  dtypes += ", \"bfloat16\"";
#endif
  constexpr std::uint64_t kTarget = TORCH_TARGET_VERSION;
  const std::string torch_abi = text(kTarget >> 56, ".", (kTarget >> 48) & 0xff);
  return text("{\"version\": \"", MAMBA_VERSION, "\", \"torch_abi\": \"", torch_abi,
              "\", \"cuda\": ", toolkit, ", \"architectures\": [", architectures,
              "], \"cpu_isa\": \"", cpu::name(cpu::current_isa()), "\", \"dtypes\": [", dtypes,
              "]}");
}

}  // namespace
}  // namespace mamba_native::binding

STABLE_TORCH_LIBRARY(mamba_native, m) {
  m.def("native_info() -> str");
  mamba_native::binding::use_torch_threads();
}

STABLE_TORCH_LIBRARY_IMPL(mamba_native, CompositeExplicitAutograd, m) {
  m.impl("native_info", MAMBA_BOX(&mamba_native::binding::native_info));
}
