#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "core/parallel_for.h"

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

}  // namespace

void use_torch_threads() { set_parallel_backend(&torch_parallel); }

}  // namespace mamba_native::binding
