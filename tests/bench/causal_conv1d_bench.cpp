// The convolution on one core of the CPU, with SiLU and bias. Bytes are what the tensors
// need: x and out forward; x, dout and dx backward.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "causal_conv1d/cpu.h"
#include "core/parallel_for.h"

namespace mamba_native::causal_conv1d {
namespace {

using Isa = mamba_native::cpu::Isa;

// Tensors of one call; T is x's type.
template <class T>
struct Problem {
  Problem(std::int64_t channels, std::int64_t length, bool channel_last, std::int64_t width)
      : x(static_cast<std::size_t>(channels * length)),
        out(x.size()),
        dx(x.size()),
        weight(static_cast<std::size_t>(channels * width), 0.3f),
        bias(static_cast<std::size_t>(channels), 0.1f),
        dweight(weight),
        dbias(bias) {
    constexpr DType kType = sizeof(T) == 4 ? DType::f32 : DType::bf16;
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] = from_float<T>(static_cast<double>(i * 37 % 101) / 50.0 - 1.0);
    }
    const auto view = [&](std::vector<T>& data) {
      TensorView tensor(data.data(), kType, {1, channels, length});
      if (channel_last) {
        tensor.stride[1] = 1;
        tensor.stride[2] = channels;
      }
      return tensor;
    };
    forward.in.x = view(x);
    forward.in.weight = TensorView(weight.data(), DType::f32, {channels, width});
    forward.in.bias = TensorView(bias.data(), DType::f32, {channels});
    forward.in.silu = true;
    forward.out = view(out);
    backward.in = forward.in;
    backward.dout = view(x);
    backward.dx = view(dx);
    backward.dweight = TensorView(dweight.data(), DType::f32, {channels, width});
    backward.dbias = TensorView(dbias.data(), DType::f32, {channels});
  }

  std::vector<T> x, out, dx;
  std::vector<float> weight, bias, dweight, dbias;
  ForwardParams forward;
  BackwardParams backward;
};

// Arguments: instruction set, channels, length, channel-last, width.
template <class T, bool BACKWARD>
void causal_conv1d(benchmark::State& state) {
  const Isa isa = static_cast<Isa>(state.range(0));
  if (isa > mamba_native::cpu::highest_isa()) {
    state.SkipWithError("this processor lacks it");
    return;
  }
  Problem<T> problem(state.range(1), state.range(2), state.range(3) != 0, state.range(4));
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
  const std::int64_t elements = state.iterations() * state.range(1) * state.range(2);
  state.SetLabel(mamba_native::cpu::name(isa));
  state.SetItemsProcessed(elements);
  state.SetBytesProcessed(elements * static_cast<std::int64_t>(sizeof(T)) * (BACKWARD ? 3 : 2));
}

void shapes(benchmark::internal::Benchmark* bench) {
  for (const Isa isa : {Isa::plain, Isa::sse2, Isa::avx2, Isa::avx512}) {
    for (const std::int64_t channel_last : {0, 1}) {
      for (const std::int64_t width : {4, 8}) {
        bench->Args({static_cast<std::int64_t>(isa), 1536, 2048, channel_last, width});
      }
    }
  }
  bench->ArgNames({"isa", "D", "L", "channel_last", "W"})->Unit(benchmark::kMillisecond);
}

BENCHMARK(causal_conv1d<float, false>)->Name("causal_conv1d_forward_f32")->Apply(shapes);
BENCHMARK(causal_conv1d<float, true>)->Name("causal_conv1d_backward_f32")->Apply(shapes);
#if MAMBA_WITH_BF16
BENCHMARK(causal_conv1d<BFloat16, false>)->Name("causal_conv1d_forward_bf16")->Apply(shapes);
BENCHMARK(causal_conv1d<BFloat16, true>)->Name("causal_conv1d_backward_bf16")->Apply(shapes);
#endif

// One decode step of one sequence. Arguments: instruction set, channels.
void causal_conv1d_update(benchmark::State& state) {
  const Isa isa = static_cast<Isa>(state.range(0));
  if (isa > mamba_native::cpu::highest_isa()) {
    state.SkipWithError("this processor lacks it");
    return;
  }
  constexpr std::int64_t kWidth = 4;
  const std::int64_t channels = state.range(1);
  Problem<float> problem(channels, 1, false, kWidth);
  std::vector<float> conv_state(static_cast<std::size_t>(channels * kWidth), 0.5f);
  UpdateParams params;
  params.x = problem.forward.in.x;
  params.conv_state = TensorView(conv_state.data(), DType::f32, {1, channels, kWidth});
  params.weight = problem.forward.in.weight;
  params.bias = problem.forward.in.bias;
  params.out = problem.forward.out;
  params.silu = true;
  set_num_threads(1);
  for (auto _ : state) {
    cpu::update(params, isa);
    benchmark::ClobberMemory();
  }
  set_num_threads(0);
  state.SetLabel(mamba_native::cpu::name(isa));
  state.SetItemsProcessed(state.iterations() * channels);
}

void decode_shapes(benchmark::internal::Benchmark* bench) {
  for (const Isa isa : {Isa::plain, Isa::sse2, Isa::avx2, Isa::avx512}) {
    bench->Args({static_cast<std::int64_t>(isa), 1536});
  }
  bench->ArgNames({"isa", "D"})->Unit(benchmark::kMicrosecond);
}

BENCHMARK(causal_conv1d_update)->Name("causal_conv1d_update_f32")->Apply(decode_shapes);

}  // namespace
}  // namespace mamba_native::causal_conv1d
