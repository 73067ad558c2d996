// The gated RMSNorm of Mamba-2 on the CPU, the gate first. Bytes are what the tensors need: x, z
// and y forward; dy, x, z, dx and dz backward.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "core/parallel_for.h"
#include "gated_norm/cpu.h"

namespace mamba_native::gated_norm {
namespace {

using Isa = mamba_native::cpu::Isa;

// Tensors of one call; T is their type.
template <class T>
struct Problem {
  Problem(std::int64_t rows, std::int64_t features, std::int64_t group_size)
      : x(static_cast<std::size_t>(rows * features), from_float<T>(0.5)),
        y(x),
        dz(x),
        weight(static_cast<std::size_t>(features), 1.0f),
        dweight(weight),
        rstd(static_cast<std::size_t>(rows * (features / group_size)), 1.0f),
        workspace(static_cast<std::size_t>(cpu::blocks(rows) * 2 * features)) {
    constexpr DType kType = sizeof(T) == 4 ? DType::f32 : DType::bf16;
    forward.x = forward.z = TensorView(x.data(), kType, {rows, features});
    forward.weight = TensorView(weight.data(), DType::f32, {features});
    forward.group_size = group_size;
    forward.norm_before_gate = false;
    forward.is_rms_norm = true;
    forward.y = TensorView(y.data(), kType, {rows, features});
    forward.rstd = TensorView(rstd.data(), DType::f32, {features / group_size, rows});
    backward.dy = backward.x = backward.z = forward.x;
    backward.weight = forward.weight;
    backward.rstd = forward.rstd;
    backward.group_size = group_size;
    backward.norm_before_gate = false;
    backward.is_rms_norm = true;
    backward.dx = forward.y;
    backward.dz = TensorView(dz.data(), kType, {rows, features});
    backward.dweight = TensorView(dweight.data(), DType::f32, {features});
    backward.workspace = TensorView(workspace.data(), DType::f32, {cpu::blocks(rows), 2, features});
  }

  std::vector<T> x, y, dz;
  std::vector<float> weight, dweight, rstd, workspace;
  ForwardParams forward;
  BackwardParams backward;
};

// Arguments: instruction set, rows, features, group_size.
template <class T, bool BACKWARD>
void gated_norm(benchmark::State& state) {
  const Isa isa = static_cast<Isa>(state.range(0));
  if (isa > mamba_native::cpu::highest_isa()) {
    state.SkipWithError("this processor lacks it");
    return;
  }
  Problem<T> problem(state.range(1), state.range(2), state.range(3));
  set_num_threads(1);
  for (auto _ : state) {
    if (BACKWARD) {
      cpu::backward(problem.backward, isa);
    } else {
      cpu::forward(problem.forward, isa);
    }
    benchmark::ClobberMemory();
  }
  set_num_threads(0);
  constexpr std::int64_t kBytes = (BACKWARD ? 5 : 3) * sizeof(T);
  state.SetLabel(mamba_native::cpu::name(isa));
  state.SetBytesProcessed(state.iterations() * state.range(1) * state.range(2) * kBytes);
}

void shapes(benchmark::internal::Benchmark* bench) {
  for (const Isa isa : {Isa::plain, Isa::sse2, Isa::avx2, Isa::avx512}) {
    bench->Args({static_cast<std::int64_t>(isa), 256, 1536, 1536});
    bench->Args({static_cast<std::int64_t>(isa), 256, 1536, 192});
  }
  bench->ArgNames({"isa", "M", "N", "group"})->Unit(benchmark::kMicrosecond);
}

BENCHMARK(gated_norm<float, false>)->Name("gated_norm_forward_f32")->Apply(shapes);
BENCHMARK(gated_norm<float, true>)->Name("gated_norm_backward_f32")->Apply(shapes);
#if MAMBA_WITH_BF16
BENCHMARK(gated_norm<BFloat16, false>)->Name("gated_norm_forward_bf16")->Apply(shapes);
BENCHMARK(gated_norm<BFloat16, true>)->Name("gated_norm_backward_bf16")->Apply(shapes);
#endif

}  // namespace
}  // namespace mamba_native::gated_norm
