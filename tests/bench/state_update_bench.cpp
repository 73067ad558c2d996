// One decode step on the CPU. Counters: states is state elements a second, bytes what the state
// alone moves (read and written once).
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "core/parallel_for.h"
#include "state_update/cpu.h"
#include "state_update/reference.h"

namespace mamba_native::state_update {
namespace {

using Isa = mamba_native::cpu::Isa;

// Arguments: instruction set, batch, heads, headdim, d_state, tied.
void update_f32(benchmark::State& state) {
  const Isa isa = static_cast<Isa>(state.range(0));
  if (isa > mamba_native::cpu::highest_isa()) {
    state.SkipWithError("this processor lacks it");
    return;
  }
  const std::int64_t batch = state.range(1), heads = state.range(2), headdim = state.range(3),
                     states = state.range(4);
  const bool tied = state.range(5) != 0;
  const auto filled = [](std::int64_t count, float value) {
    return std::vector<float>(static_cast<std::size_t>(count), value);
  };
  std::vector<float> S = filled(batch * heads * headdim * states, 0.5f);
  std::vector<float> x = filled(batch * heads * headdim, 0.25f);
  std::vector<float> dt = filled(batch * heads * headdim, -2.0f);
  std::vector<float> A = filled(heads * headdim * states, -1.0f);
  std::vector<float> B = filled(batch * states, 0.5f);
  std::vector<float> C = filled(batch * states, -0.5f);
  std::vector<float> D = filled(heads * headdim, 1.0f);
  std::vector<float> out = filled(batch * heads * headdim, 0.0f);
  Params params;
  params.state = TensorView(S.data(), DType::f32, {batch, heads, headdim, states});
  params.x = TensorView(x.data(), DType::f32, {batch, heads, headdim});
  params.dt = TensorView(dt.data(), DType::f32, {batch, heads, headdim});
  params.A = TensorView(A.data(), DType::f32, {heads, headdim, states});
  params.B = TensorView(B.data(), DType::f32, {batch, 1, states});
  params.C = TensorView(C.data(), DType::f32, {batch, 1, states});
  params.D = TensorView(D.data(), DType::f32, {heads, headdim});
  params.z = params.x;
  params.out = TensorView(out.data(), DType::f32, {batch, heads, headdim});
  params.dt_softplus = true;
  if (tied) {
    params.dt.stride[2] = 0;
    params.A.stride[1] = params.A.stride[2] = 0;
  }
  set_num_threads(1);
  for (auto _ : state) {
    cpu::update(params, isa);
    benchmark::ClobberMemory();
  }
  set_num_threads(0);
  const double elements = static_cast<double>(S.size());
  state.SetLabel(mamba_native::cpu::name(isa));
  state.counters["states"] =
      benchmark::Counter(elements, benchmark::Counter::kIsIterationInvariantRate);
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(S.size() * 8));
}

void shapes(benchmark::internal::Benchmark* bench) {
  for (const Isa isa : {Isa::plain, Isa::sse2, Isa::avx2, Isa::avx512}) {
    const std::int64_t i = static_cast<std::int64_t>(isa);
    bench->Args({i, 1, 1, 1536, 16, 0});   // Mamba-1 130M
    bench->Args({i, 16, 1, 5120, 16, 0});  // Mamba-1 2.8B
    bench->Args({i, 1, 80, 64, 128, 1});   // Mamba-2 2.7B
  }
}

BENCHMARK(update_f32)
    ->ArgNames({"isa", "B", "H", "P", "N", "tied"})
    ->Apply(shapes)
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace mamba_native::state_update
