// Operations that fail on purpose, for tests/python/test_errors.py: what the binding does with an
// exception, from the caller's thread and from inside a loop on torch's threads.
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>

#include "core/error.h"
#include "core/parallel_for.h"
#include "torch/box.h"
#include "torch/parallel.h"

namespace {

using torch::stable::Tensor;

// A long text, so that a leak of it would show.
Tensor fail(const Tensor&) {
  mamba_native::fail("found this, ", std::string(2000, '.'), " expected that");
}

// Every range of [0, count) fails; the caller gets one of their messages, "range <begin>".
Tensor fail_in_loop(const Tensor&, std::int64_t count, std::int64_t grain) {
  mamba_native::parallel_for(
      count, grain, [](std::int64_t begin, std::int64_t) { mamba_native::fail("range ", begin); });
  mamba_native::fail("no range failed");
}

}  // namespace

STABLE_TORCH_LIBRARY(mamba_native_test, m) {
  m.def("fail(Tensor x) -> Tensor");
  m.def("fail_in_loop(Tensor x, int count, int grain) -> Tensor");
  mamba_native::binding::use_torch_threads();
}

STABLE_TORCH_LIBRARY_IMPL(mamba_native_test, CPU, m) {
  m.impl("fail", MAMBA_BOX(&fail));
  m.impl("fail_in_loop", MAMBA_BOX(&fail_in_loop));
}
