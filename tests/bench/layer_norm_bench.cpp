// RMSNorm with a float32 residual on the CPU, plain and with dropout. Bytes are what the tensors
// need: x, residual, y and residual_out forward; dy, h, dresidual_out, dx and dresidual backward.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "core/parallel_for.h"
#include "layer_norm/cpu.h"

namespace mamba_native::layer_norm {
namespace {

using Isa = mamba_native::cpu::Isa;

// Tensors of one call; T is x's type.
template <class T>
struct Problem {
  Problem(std::int64_t rows, std::int64_t features)
      : x(static_cast<std::size_t>(rows * features), from_float<T>(0.5)),
        y(x),
        residual(x.size(), 0.25f),
        h(x.size()),
        weight(static_cast<std::size_t>(features), 1.0f),
        dweight(weight),
        rstd(static_cast<std::size_t>(rows), 1.0f),
        workspace(static_cast<std::size_t>(cpu::blocks(rows) * 2 * features)) {
    constexpr DType kType = sizeof(T) == 4 ? DType::f32 : DType::bf16;
    forward.x = TensorView(x.data(), kType, {rows, features});
    forward.weight = TensorView(weight.data(), DType::f32, {features});
    forward.residual = TensorView(residual.data(), DType::f32, {rows, features});
    forward.is_rms_norm = true;
    forward.y = TensorView(y.data(), kType, {rows, features});
    forward.residual_out = TensorView(h.data(), DType::f32, {rows, features});
    forward.rstd = TensorView(rstd.data(), DType::f32, {rows});
    backward.dy = forward.x;
    backward.dresidual_out = forward.residual;
    backward.h = forward.residual_out;
    backward.weight = forward.weight;
    backward.rstd = forward.rstd;
    backward.is_rms_norm = true;
    backward.dx = forward.y;
    backward.dresidual = forward.residual_out;
    backward.dweight = TensorView(dweight.data(), DType::f32, {features});
    backward.workspace = TensorView(workspace.data(), DType::f32, {cpu::blocks(rows), 2, features});
  }

  void drop(double p) {
    forward.dropout = {p, TensorView(&seed, DType::i64, {1})};
    backward.dropout = forward.dropout;
  }

  std::int64_t seed = 1;
  std::vector<T> x, y;
  std::vector<float> residual, h, weight, dweight, rstd, workspace;
  ForwardParams forward;
  BackwardParams backward;
};

// Arguments: instruction set, rows, features.
template <class T, bool BACKWARD, bool DROPOUT = false>
void rms_norm(benchmark::State& state) {
  const Isa isa = static_cast<Isa>(state.range(0));
  if (isa > mamba_native::cpu::highest_isa()) {
    state.SkipWithError("this processor lacks it");
    return;
  }
  Problem<T> problem(state.range(1), state.range(2));
  if (DROPOUT) {
    problem.drop(0.1);
  }
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
  constexpr std::int64_t kBytes = BACKWARD ? 2 * sizeof(T) + 12 : 2 * sizeof(T) + 8;
  state.SetLabel(mamba_native::cpu::name(isa));
  state.SetBytesProcessed(state.iterations() * state.range(1) * state.range(2) * kBytes);
}

void shapes(benchmark::internal::Benchmark* bench) {
  for (const Isa isa : {Isa::plain, Isa::sse2, Isa::avx2, Isa::avx512}) {
    bench->Args({static_cast<std::int64_t>(isa), 256, 768});
    bench->Args({static_cast<std::int64_t>(isa), 2048, 2560});
  }
  bench->ArgNames({"isa", "M", "N"})->Unit(benchmark::kMicrosecond);
}

BENCHMARK(rms_norm<float, false>)->Name("rms_norm_forward_f32")->Apply(shapes);
BENCHMARK(rms_norm<float, true>)->Name("rms_norm_backward_f32")->Apply(shapes);
BENCHMARK(rms_norm<float, false, true>)->Name("rms_norm_dropout_forward_f32")->Apply(shapes);
BENCHMARK(rms_norm<float, true, true>)->Name("rms_norm_dropout_backward_f32")->Apply(shapes);
#if MAMBA_WITH_BF16
BENCHMARK(rms_norm<BFloat16, false>)->Name("rms_norm_forward_bf16")->Apply(shapes);
BENCHMARK(rms_norm<BFloat16, true>)->Name("rms_norm_backward_bf16")->Apply(shapes);
#endif

}  // namespace
}  // namespace mamba_native::layer_norm
