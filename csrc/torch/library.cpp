// What belongs to the library as a whole: torch's threads for our loops, and what this build is.
#include "binding.h"
#include "core/cpu/isa.h"
#include "core/error.h"
#include "core/parallel_for.h"

#if MAMBA_WITH_CUDA
#include "core/cuda/device.h"
#endif

namespace mamba_native::binding {
namespace {

struct Work {
  ParallelBody body;
  void* context;

  static void run(std::int64_t begin, std::int64_t end, void* self) {
    const Work& work = *static_cast<const Work*>(self);
    work.body(work.context, begin, end);
  }
};

void torch_parallel(std::int64_t count, std::int64_t grain, ParallelBody body, void* context) {
  Work work{body, context};
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, &Work::run, &work));
}

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
  return text("{\"version\": \"", MAMBA_VERSION, "\", \"cuda\": ", toolkit,
              ", \"architectures\": [", architectures, "], \"cpu_isa\": \"",
              cpu::name(cpu::current_isa()), "\", \"dtypes\": [", dtypes, "]}");
}

}  // namespace
}  // namespace mamba_native::binding

STABLE_TORCH_LIBRARY(mamba_native, m) {
  m.def("native_info() -> str");
  mamba_native::set_parallel_backend(&mamba_native::binding::torch_parallel);
}

STABLE_TORCH_LIBRARY_IMPL(mamba_native, CompositeExplicitAutograd, m) {
  m.impl("native_info", TORCH_BOX(&mamba_native::binding::native_info));
}
