#include "core/parallel_for.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "core/error.h"

namespace mamba_native {
namespace {

std::atomic<ParallelBackend> g_backend{nullptr};
std::atomic<int> g_threads{0};

int num_threads() {
  const int chosen = g_threads.load();
  if (chosen > 0) {
    return chosen;
  }
  const char* variable = std::getenv("OMP_NUM_THREADS");
  const int wanted = variable == nullptr ? 0 : std::atoi(variable);
  return wanted > 0 ? wanted : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Keeps the first exception of any range, so that none crosses a thread's or a C interface's
// border.
struct Guarded {
  ParallelBody body;
  void* context;
  std::exception_ptr error;
  std::mutex mutex;

  static void run(void* self, std::int64_t begin, std::int64_t end) {
    Guarded& call = *static_cast<Guarded*>(self);
    try {
      call.body(call.context, begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(call.mutex);
      if (!call.error) {
        call.error = std::current_exception();
      }
    }
  }
};

// One thread per range: an operation's work is milliseconds where this matters, so starting threads
// anew costs little and leaves no pool to shut down when a DLL unloads.
void run_on_threads(std::int64_t count, std::int64_t grain, ParallelBody body, void* context) {
  const std::int64_t ranges =
      std::min<std::int64_t>(num_threads(), (count + grain - 1) / std::max<std::int64_t>(1, grain));
  const std::int64_t step = (count + ranges - 1) / ranges;
  std::vector<std::thread> workers;
  for (std::int64_t begin = step; begin < count; begin += step) {
    workers.emplace_back(body, context, begin, std::min(count, begin + step));
  }
  body(context, 0, std::min(count, step));
  for (std::thread& worker : workers) {
    worker.join();
  }
}

}  // namespace

void parallel_for(std::int64_t count, std::int64_t grain, ParallelBody body, void* context) {
  if (count <= 0) {
    return;
  }
  MAMBA_CHECK(grain > 0, "parallel_for: grain must be positive, got ", grain);
  Guarded call{body, context, nullptr, {}};
  const ParallelBackend backend = g_backend.load();
  (backend == nullptr ? &run_on_threads : backend)(count, grain, &Guarded::run, &call);
  if (call.error) {
    std::rethrow_exception(call.error);
  }
}

void set_parallel_backend(ParallelBackend backend) { g_backend.store(backend); }

void set_num_threads(int threads) {
  MAMBA_CHECK(threads >= 0, "set_num_threads: expected 0 (default) or more, got ", threads);
  g_threads.store(threads);
}

}  // namespace mamba_native
