// Splits independent work over the CPU's threads: torch's own pool once the binding has said so,
// otherwise std::thread workers of ours.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mamba_native {

// Runs body(context, begin, end) over disjoint ranges that cover [0, count), each of at least
// `grain` items (but the last). Returns when all have run. An exception of a body is thrown again
// here, the first one if there are several.
using ParallelBody = void (*)(void* context, std::int64_t begin, std::int64_t end);
void parallel_for(std::int64_t count, std::int64_t grain, ParallelBody body, void* context);

template <class Body>
void parallel_for(std::int64_t count, std::int64_t grain, const Body& body) {
  struct Call {
    static void run(void* context, std::int64_t begin, std::int64_t end) {
      (*static_cast<const Body*>(context))(begin, end);
    }
  };
  parallel_for(count, grain, &Call::run, const_cast<Body*>(&body));
}

// The grain for items of so much work each, in multiplications or elements moved: as many as are
// worth waking a thread for.
inline std::int64_t grain_of(std::int64_t work_per_item) {
  constexpr std::int64_t kWorthAThread = std::int64_t{1} << 15;
  return std::max<std::int64_t>(1, kWorthAThread / std::max<std::int64_t>(1, work_per_item));
}

// What parallel_for hands its work to. The binding sets torch's at load; null restores ours.
using ParallelBackend = void (*)(std::int64_t count, std::int64_t grain, ParallelBody body,
                                 void* context);
void set_parallel_backend(ParallelBackend backend);

// Threads of our own pool; 1 runs everything in the caller. Default: the hardware's, or
// OMP_NUM_THREADS where that is set. The torch backend follows torch.set_num_threads instead.
void set_num_threads(int threads);

}  // namespace mamba_native
