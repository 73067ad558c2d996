// The chunked scan of Mamba-2 on one CPU core, and on a GPU:
//   mamba_bench --benchmark_filter=ssd
//   mamba_bench --benchmark_filter=ssd/.*/cuda
// state_elements: B H P N L a second; over_plain: how many times faster than the oracle in float32
// on the same problem; over_forward: how many times forward's time backward takes. A GPU's times
// are those of one of 20 calls in a row, with what the host needs to launch them.
#include "ssd/ssd.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <initializer_list>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/math.h"
#include "core/parallel_for.h"
#include "ssd/cpu.h"
#include "support/device_memory.h"

namespace mamba_native::ssd {
namespace {

using Isa = mamba_native::cpu::Isa;

struct Size {
  std::int64_t batch, length, heads, headdim, groups, states;
};

constexpr Size kSizes[] = {
    {1, 512, 24, 64, 1, 128}, {1, 2048, 80, 64, 1, 128}, {2, 512, 8, 64, 8, 64}};

// Those that were timed with upstream's kernels.
constexpr Size kGpuSizes[] = {{1, 2048, 80, 64, 1, 128}, {8, 2048, 80, 64, 1, 128},
                              {1, 8192, 80, 64, 1, 128}, {1, 32768, 80, 64, 1, 128},
                              {8, 2048, 24, 64, 1, 128}, {8, 2048, 80, 64, 8, 64}};

// As Mamba-2's layer calls it: D, dt_bias and softplus, and on the CPU z, which the layer's norm
// takes otherwise.
class Problem {
 public:
  Problem(const Size& size, DType dtype, Device device = {}) : size_(size), device_(device) {
    const auto [B, L, H, P, G, N] = size;
    ForwardParams& f = forward_;
    f.in.x = fill(dtype, {B, L, H, P}, -1, 1);
    f.in.dt = fill(dtype, {B, L, H}, -1, 1);
    f.in.A = fill(DType::f32, {H}, -16, -1);
    f.in.B = fill(dtype, {B, L, G, N}, -1, 1);
    f.in.C = fill(dtype, {B, L, G, N}, -1, 1);
    f.in.D = fill(DType::f32, {H}, -1, 1);
    if (!device.is_cuda()) {
      f.in.z = fill(dtype, {B, L, H, P}, -1, 1);
    }
    f.in.dt_bias = fill(DType::f32, {H}, -6, -2);
    f.in.dt_softplus = true;
    f.out = fill(dtype, {B, L, H, P}, 0, 0);
    f.last_states = fill(DType::f32, {B, H, P, N}, 0, 0);
    f.checkpoints = fill(DType::f32, {B, ceil_div(L, kCheckpointInterval), H, P, N}, 0, 0);
    BackwardParams& b = backward_;
    b.in = f.in;
    b.dout = fill(dtype, {B, L, H, P}, -1, 1);
    b.checkpoints = f.checkpoints;
    b.dx = fill(dtype, {B, L, H, P}, 0, 0);
    b.ddt = fill(dtype, {B, L, H}, 0, 0);
    b.dA = fill(DType::f32, {H}, 0, 0);
    b.dB = fill(DType::f32, {B, L, G, N}, 0, 0);
    b.dC = fill(DType::f32, {B, L, G, N}, 0, 0);
    b.dD = fill(DType::f32, {H}, 0, 0);
    if (f.in.z.present()) {
      b.dz = fill(dtype, {B, L, H, P}, 0, 0);
    }
    b.ddt_bias = fill(DType::f32, {H}, 0, 0);
    f.workspace = fill(DType::f32, {forward_workspace(f.in)}, 0, 0);
    b.workspace = fill(DType::f32, {backward_workspace(b)}, 0, 0);
  }
  ~Problem() {
    for (void* const memory : device_memory_) {
      test::device_release(memory);
    }
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  void forward() const { ssd::forward(forward_); }
  void backward() const { ssd::backward(backward_); }
  void wait() const {  // for the device
    float value = 0;
    test::copy_from_device(&value, forward_.last_states.data, sizeof(value));
  }

  void forward(Isa isa) const { cpu::forward(forward_, isa); }
  void backward(Isa isa) const { cpu::backward(backward_, isa); }
  double state_elements() const {
    return static_cast<double>(size_.batch * size_.length * size_.heads * size_.headdim *
                               size_.states);
  }

 private:
  TensorView fill(DType dtype, std::initializer_list<std::int64_t> sizes, float low, float high) {
    constexpr std::int64_t kPeriod = 1 << 20;  // large tensors repeat themselves
    TensorView view(nullptr, dtype, sizes, device_);
    const std::int64_t count = view.numel(), size = size_of(dtype);
    std::vector<unsigned char> host(static_cast<std::size_t>(count * size));
    std::uniform_real_distribution<float> distribution(low, high);
    for (std::int64_t i = 0; i < std::min(count, kPeriod); ++i) {
      store_float(host.data(), dtype, i, static_cast<double>(distribution(random_)));
    }
    for (std::int64_t i = kPeriod; i < count; i += kPeriod) {
      std::copy_n(host.begin(), std::min(kPeriod, count - i) * size, host.begin() + i * size);
    }
    if (device_.is_cuda()) {
      device_memory_.push_back(test::device_allocate(host.size()));
      view.data = device_memory_.back();
      test::copy_to_device(view.data, host.data(), host.size());
    } else {
      storage_.push_back(std::move(host));
      view.data = storage_.back().data();
    }
    return view;
  }

  Size size_;
  Device device_;
  std::vector<void*> device_memory_;
  std::mt19937 random_{1};
  std::vector<std::vector<unsigned char>> storage_;
  ForwardParams forward_;
  BackwardParams backward_;
};

// Processor seconds of the fastest of a few calls, measured once per key and kept for the ratios.
// Processor time, because a shared machine's clock on the wall says little about one core.
template <class Call>
double seconds_of(const std::string& key, const Call& call) {
  static std::map<std::string, double> known;
  const auto found = known.find(key);
  if (found != known.end()) {
    return found->second;
  }
  double best = 1e9;
  for (int i = 0; i < 7; ++i) {
    const std::clock_t start = std::clock();
    call();
    best = std::min(best, static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
  }
  return known[key] = best;
}

std::string label(const Size& size, DType dtype) {
  return text(name(dtype), "/B", size.batch, "_L", size.length, "_H", size.heads, "_P",
              size.headdim, "_G", size.groups, "_N", size.states);
}

void run(benchmark::State& state, const Size& size, DType dtype, Isa isa, bool is_backward) {
  set_num_threads(1);
  const Problem problem(size, dtype);
  problem.forward(isa);  // writes the checkpoints that backward reads
  for (auto _ : state) {
    if (is_backward) {
      problem.backward(isa);
    } else {
      problem.forward(isa);
    }
  }
  const std::string key = label(size, dtype);
  const std::string own = std::string(mamba_native::cpu::name(isa)) + " " + key;
  const double forward = seconds_of(own, [&] { problem.forward(isa); });
  state.counters["state_elements"] =
      benchmark::Counter(problem.state_elements(), benchmark::Counter::kIsIterationInvariantRate);
  if (is_backward) {
    const double backward = seconds_of("backward " + own, [&] { problem.backward(isa); });
    state.counters["over_forward"] = backward / forward;
  } else {
    const double plain = seconds_of(std::string(mamba_native::cpu::name(Isa::plain)) + " " + key,
                                    [&] { problem.forward(Isa::plain); });
    state.counters["over_plain"] = plain / forward;
  }
  set_num_threads(0);
}

void run_on_gpu(benchmark::State& state, const Size& size, DType dtype, bool is_backward) {
  const Problem problem(size, dtype, Device{DeviceType::cuda, 0});
  problem.forward();
  constexpr int kCalls = 20;
  for (auto _ : state) {
    problem.wait();
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) {
      is_backward ? problem.backward() : problem.forward();
    }
    problem.wait();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    state.SetIterationTime(seconds.count() / kCalls);
  }
  state.counters["state_elements"] =
      benchmark::Counter(problem.state_elements(), benchmark::Counter::kIsIterationInvariantRate);
}

const int kRegistered = [] {
  for (const bool is_backward : {false, true}) {
    for (const Size& size : kSizes) {
      for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        for (const Isa isa : {Isa::plain, Isa::sse2, Isa::avx2, Isa::avx512}) {
          const bool is_slow = isa == Isa::plain && is_backward;  // it is the oracle
          if (isa > mamba_native::cpu::highest_isa() || is_slow ||
              (dtype == DType::f16 && !MAMBA_WITH_F16) ||
              (dtype == DType::bf16 && !MAMBA_WITH_BF16)) {
            continue;
          }
          const std::string row = std::string("ssd/") + (is_backward ? "backward/" : "forward/") +
                                  mamba_native::cpu::name(isa) + "/" + label(size, dtype);
          benchmark::RegisterBenchmark(row.c_str(), run, size, dtype, isa, is_backward)
              ->Unit(benchmark::kMillisecond);
        }
      }
    }
  }
  for (const bool is_backward : {false, true}) {
    for (const Size& size : kGpuSizes) {
      for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
        if (!test::cuda_unavailable().empty() || (dtype == DType::f16 && !MAMBA_WITH_F16) ||
            (dtype == DType::bf16 && !MAMBA_WITH_BF16)) {
          continue;
        }
        const std::string row = std::string("ssd/") + (is_backward ? "backward" : "forward") +
                                "/cuda/" + label(size, dtype);
        benchmark::RegisterBenchmark(row.c_str(), run_on_gpu, size, dtype, is_backward)
            ->Unit(benchmark::kMicrosecond)
            ->UseManualTime();
      }
    }
  }
  return 0;
}();

}  // namespace
}  // namespace mamba_native::ssd
