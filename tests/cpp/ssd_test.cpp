// The chunked scan on every device and instruction set, against the oracle; the oracle itself
// against numbers worked out by hand and against finite differences.
#include "ssd/ssd.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/math.h"
#include "core/parallel_for.h"
#include "ssd/cpu.h"
#include "ssd/plan.h"
#include "ssd/reference.h"
#include "support/compare.h"
#include "support/device_memory.h"
#include "support/targets.h"
#include "support/tensor.h"

namespace mamba_native::ssd {
namespace {

using test::Shape;
using test::Target;
using test::Tensor;

// ---- what is computed, and by whom ----

enum class Layout {
  contiguous,
  time_last,  // (B, H, P, L) seen as (B, L, H, P)
  sliced,     // a window of a larger tensor at an odd offset, elements 2 apart
  expanded,   // stride 0: x over the batch, dout over everything, B and C over groups
};

// Several sequences in a batch entry, and whether they are numbered: with states of their own.
enum class Packing { none, indices, numbered };

enum class Skip { none, per_head, per_channel };  // D

struct Case {
  const char* name;
  std::int64_t batch = 2;
  std::int64_t heads = 6;
  std::int64_t headdim = 20;
  std::int64_t groups = 2;
  std::int64_t states = 24;
  std::int64_t length = 150;  // two chunks and a ragged one
  Skip skip = Skip::per_head;
  bool gate = true;  // z
  bool bias = true;
  bool softplus = true;
  bool initial = true;
  bool dlast = true;
  bool reverse = false;
  bool dt_in_f32 = false;
  Packing packing = Packing::none;
  bool one_step = false;  // every sequence has one
  Layout layout = Layout::contiguous;
  double dt_low = -1.0;  // before bias and softplus
  double dt_high = 1.0;
  double limit_low = 0.0;
  double limit_high = std::numeric_limits<double>::infinity();
  double slowest = -0.5;  // A
  double fastest = -8.0;
  // The second metric compares the largest of two rounding noises, which is luck where one or two
  // large elements decide it, as in dA: such a row has a seed of its own.
  unsigned seed = 4;
};

Case with(const char* name, const std::function<void(Case&)>& change) {
  Case row;
  row.name = name;
  change(row);
  return row;
}

// The base row, then rows that change one thing.
std::vector<Case> star() {
  const auto packed = [](const char* name, Packing packing,
                         const std::function<void(Case&)>& change) {
    return with(name, [&](Case& c) {
      c.packing = packing;
      c.batch = packing == Packing::numbered ? 1 : 2;
      change(c);
    });
  };
  return {
      with("base", [](Case&) {}),
      with("length_1", [](Case& c) { c.length = 1; }),
      with("length_2",
           [](Case& c) {
             c.length = 2;
             c.seed = 1;
           }),
      with("length_63", [](Case& c) { c.length = 63; }),
      with("length_64", [](Case& c) { c.length = 64; }),
      with("length_65", [](Case& c) { c.length = 65; }),
      with("length_255", [](Case& c) { c.length = 255; }),
      with("length_256", [](Case& c) { c.length = 256; }),
      with("length_257", [](Case& c) { c.length = 257; }),
      with("length_600", [](Case& c) { c.length = 600; }),
      with("length_1600", [](Case& c) { c.length = 1600; }),  // segments, on a GPU
      with("many_batches", [](Case& c) { c.batch = 5; }),
      with("one_head",  // sums over heads would be a single number each
           [](Case& c) {
             c.heads = c.groups = 1;
             c.skip = Skip::per_channel;
             c.bias = false;
           }),
      with("many_heads", [](Case& c) { c.heads = 34; }),
      with("one_group", [](Case& c) { c.groups = 1; }),
      with("group_per_head", [](Case& c) { c.groups = c.heads; }),
      with("headdim_1", [](Case& c) { c.headdim = 1; }),
      with("headdim_3", [](Case& c) { c.headdim = 3; }),
      with("headdim_16", [](Case& c) { c.headdim = 16; }),
      with("headdim_64", [](Case& c) { c.headdim = 64; }),
      with("headdim_80", [](Case& c) { c.headdim = 80; }),
      with("headdim_128", [](Case& c) { c.headdim = 128; }),
      with("headdim_256", [](Case& c) { c.headdim = 256; }),
      with("states_1", [](Case& c) { c.states = 1; }),
      with("states_3", [](Case& c) { c.states = 3; }),
      with("states_16", [](Case& c) { c.states = 16; }),
      with("states_64", [](Case& c) { c.states = 64; }),
      with("states_96", [](Case& c) { c.states = 96; }),
      with("states_128", [](Case& c) { c.states = 128; }),
      with("states_256", [](Case& c) { c.states = 256; }),
      with("states_300", [](Case& c) { c.states = 300; }),
      with("headdim_64_states_128",  // Mamba-2's own
           [](Case& c) {
             c.headdim = 64;
             c.states = 128;
             c.groups = 1;
           }),
      with("no_D", [](Case& c) { c.skip = Skip::none; }),
      with("D_per_channel", [](Case& c) { c.skip = Skip::per_channel; }),
      with("no_z", [](Case& c) { c.gate = false; }),
      with("no_bias", [](Case& c) { c.bias = false; }),
      with("no_softplus",
           [](Case& c) {
             c.softplus = false;
             c.bias = false;
             c.dt_low = 0.001;
             c.dt_high = 0.1;
           }),
      with("negative_dt_is_zero",
           [](Case& c) {
             c.softplus = false;
             c.bias = false;
             c.dt_low = -0.1;
             c.dt_high = 0.1;
           }),
      with("dt_limit",
           [](Case& c) {
             c.limit_low = 0.05;
             c.limit_high = 0.2;
           }),
      with("dt_in_f32", [](Case& c) { c.dt_in_f32 = true; }),
      with("no_initial_states", [](Case& c) { c.initial = false; }),
      with("no_dlast_states", [](Case& c) { c.dlast = false; }),
      with("softplus_above_threshold",
           [](Case& c) {
             c.dt_low = 15;
             c.dt_high = 30;
             c.slowest = -0.001;
             c.fastest = -0.02;
           }),
      with("fast_decay",  // nothing survives a step; products of decays are subnormal or 0
           [](Case& c) {
             c.slowest = -80;
             c.fastest = -2000;
           }),
      with("slow_decay",
           [](Case& c) {
             c.slowest = -1e-5;
             c.fastest = -1e-3;
           }),
      with("growth",
           [](Case& c) {
             c.slowest = 0.1;
             c.fastest = -1.0;
           }),
      with("time_last", [](Case& c) { c.layout = Layout::time_last; }),
      with("sliced", [](Case& c) { c.layout = Layout::sliced; }),
      with("expanded", [](Case& c) { c.layout = Layout::expanded; }),
      with("reverse", [](Case& c) { c.reverse = true; }),
      with("reverse_length_1",
           [](Case& c) {
             c.reverse = true;
             c.length = 1;
           }),
      with("reverse_length_600",
           [](Case& c) {
             c.reverse = true;
             c.length = 600;
           }),
      with("reverse_time_last",
           [](Case& c) {
             c.reverse = true;
             c.layout = Layout::time_last;
           }),
      with("reverse_sliced",
           [](Case& c) {
             c.reverse = true;
             c.layout = Layout::sliced;
           }),
      with("reverse_expanded",
           [](Case& c) {
             c.reverse = true;
             c.layout = Layout::expanded;
           }),
      packed("packed", Packing::indices, [](Case&) {}),
      packed("packed_length_600", Packing::indices, [](Case& c) { c.length = 600; }),
      packed("packed_length_1600", Packing::indices, [](Case& c) { c.length = 1600; }),
      packed("packed_reverse_length_600", Packing::indices,
             [](Case& c) {
               c.length = 600;
               c.reverse = true;
             }),
      packed("packed_one_step_each", Packing::indices,
             [](Case& c) {
               c.length = 70;
               c.one_step = true;
             }),
      packed("packed_group_per_head", Packing::indices, [](Case& c) { c.groups = c.heads; }),
      packed("packed_sliced_reverse", Packing::indices,
             [](Case& c) {
               c.layout = Layout::sliced;
               c.reverse = true;
             }),
      packed("numbered", Packing::numbered, [](Case&) {}),
      packed("numbered_length_1", Packing::numbered, [](Case& c) { c.length = 1; }),
      packed("numbered_length_600", Packing::numbered, [](Case& c) { c.length = 600; }),
      packed("numbered_reverse_length_1600", Packing::numbered,
             [](Case& c) {
               c.length = 1600;
               c.reverse = true;
             }),
      packed("numbered_reverse_length_600", Packing::numbered,
             [](Case& c) {
               c.length = 600;
               c.reverse = true;
             }),
      packed("numbered_one_step_each", Packing::numbered,
             [](Case& c) {
               c.length = 70;
               c.one_step = true;
             }),
      packed("numbered_no_initial_states", Packing::numbered, [](Case& c) { c.initial = false; }),
      packed("numbered_no_dlast_states", Packing::numbered, [](Case& c) { c.dlast = false; }),
      packed("numbered_time_last_reverse", Packing::numbered,
             [](Case& c) {
               c.layout = Layout::time_last;
               c.reverse = true;
             }),
  };
}

Shape activations(const Case& c, bool expand_all = false) {
  const std::int64_t B = c.batch, L = c.length, H = c.heads, P = c.headdim;
  const std::int64_t row = 2 * H * P + 3;
  switch (c.layout) {
    case Layout::contiguous:
      return {{B, L, H, P}};
    case Layout::time_last:
      return {{B, L, H, P}, {H * P * L, 1, P * L, L}};
    case Layout::sliced:
      return {{B, L, H, P}, {L * row, row, 2 * P, 2}, 3};
    case Layout::expanded:
      return {
          {B, L, H, P},
          expand_all ? std::vector<std::int64_t>(4) : std::vector<std::int64_t>{0, H * P, P, 1}};
  }
  fail("unknown layout");
}

Shape steps_of_heads(const Case& c) {
  const std::int64_t B = c.batch, L = c.length, H = c.heads;
  switch (c.layout) {
    case Layout::contiguous:
      return {{B, L, H}};
    case Layout::time_last:
      return {{B, L, H}, {H * L, 1, L}};
    case Layout::sliced:
      return {{B, L, H}, {L * (2 * H + 1), 2 * H + 1, 2}, 3};
    case Layout::expanded:
      return {{B, L, H}, {0, H, 1}};
  }
  fail("unknown layout");
}

Shape projection(const Case& c) {
  const std::int64_t B = c.batch, L = c.length, G = c.groups, N = c.states;
  const std::int64_t row = 2 * G * N + 3;
  switch (c.layout) {
    case Layout::contiguous:
      return {{B, L, G, N}};
    case Layout::time_last:
      return {{B, L, G, N}, {G * N * L, 1, N * L, L}};
    case Layout::sliced:
      return {{B, L, G, N}, {L * row, row, 2 * N, 2}, 1};
    case Layout::expanded:
      return {{B, L, G, N}, {L * N, N, 0, 1}};
  }
  fail("unknown layout");
}

// Sequences of one step, sequences that begin and end beside the borders of chunks, sequences
// without steps (a gap in the numbers), and at the end padding with an index that has no row.
std::vector<double> sequence_indices(const Case& c) {
  std::vector<double> indices;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    double index = 0;
    for (std::int64_t t = 0; t < c.length; ++t) {
      const std::int64_t cuts[] = {1,   2,   30,  63,  64,  65,  128, 129,
                                   255, 256, 257, 380, 512, 768, 1100};
      const std::int64_t place = t + 3 * b;
      if (t > 0 && (c.one_step || std::count(std::begin(cuts), std::end(cuts), place) > 0)) {
        index += place == 30 || place == 256 ? 2 : 1;
      }
      indices.push_back(c.length > 20 && t >= c.length - 5 ? -1 : index);
    }
  }
  return indices;
}

struct Data {
  DType dtype = DType::f32;
  DType dt_dtype = DType::f32;
  bool softplus = false;
  bool reverse = false;
  int config = -1;
  double limit_low = 0.0;
  double limit_high = std::numeric_limits<double>::infinity();
  std::int64_t sequences = 0;
  Tensor x, dt, A, B, C, D, z, bias, initial, seq_idx, dout, dlast;

  // The same numbers elsewhere. Parameters and states follow as float32, or float64 with float64.
  Data to(DType type, Device device) const {
    const DType sum = type == DType::f64 ? DType::f64 : DType::f32;
    Data copy = *this;
    copy.dtype = type;
    copy.dt_dtype = type == dtype ? dt_dtype : type;
    for (Tensor Data::* tensor : {&Data::x, &Data::B, &Data::C, &Data::z, &Data::dout, &Data::dt}) {
      copy.*tensor = (this->*tensor).to(tensor == &Data::dt ? copy.dt_dtype : type, device);
    }
    for (Tensor Data::* tensor : {&Data::A, &Data::D, &Data::bias, &Data::initial, &Data::dlast}) {
      copy.*tensor = (this->*tensor).to(sum, device);
    }
    copy.seq_idx = seq_idx.to(DType::i32, device);
    return copy;
  }

  Inputs inputs() const {
    Inputs in;
    in.x = x.view();
    in.dt = dt.view();
    in.A = A.view();
    in.B = B.view();
    in.C = C.view();
    in.D = D.view();
    in.z = z.view();
    in.dt_bias = bias.view();
    in.initial_states = initial.view();
    in.seq_idx = seq_idx.view();
    in.sequences = sequences;
    in.dt_softplus = softplus;
    in.dt_min = limit_low;
    in.dt_max = limit_high;
    in.reverse = reverse;
    in.config = config;
    return in;
  }

  // Of initial_states and last_states.
  std::int64_t rows() const { return sequences > 0 ? sequences : x.shape().sizes[0]; }
};

Data make(const Case& c, DType dtype) {
  std::mt19937 random(c.seed);
  const DType sum = dtype == DType::f64 ? DType::f64 : DType::f32;
  const std::int64_t B = c.batch, H = c.heads, P = c.headdim, N = c.states;
  const auto uniform = [&](DType type, const Shape& shape, double low, double high) {
    return Tensor::uniform(random, type, test::kCpu, shape, low, high);
  };
  Data p;
  p.dtype = dtype;
  p.dt_dtype = c.dt_in_f32 ? sum : dtype;
  p.softplus = c.softplus;
  p.reverse = c.reverse;
  p.limit_low = c.limit_low;
  p.limit_high = c.limit_high;
  p.x = uniform(dtype, activations(c), -1, 1);
  p.dt = uniform(p.dt_dtype, steps_of_heads(c), c.dt_low, c.dt_high);
  p.A = uniform(sum, {{H}}, c.fastest, c.slowest);
  p.B = uniform(dtype, projection(c), -1, 1);
  p.C = uniform(dtype, projection(c), -1, 1);
  p.dout = uniform(dtype, activations(c, true), -1, 1);
  if (c.skip != Skip::none) {
    const std::int64_t step = c.layout == Layout::sliced ? 3 : 1;
    p.D = uniform(sum,
                  c.skip == Skip::per_head ? Shape{{H}, {step}} : Shape{{H, P}, {step * P, step}},
                  -1, 1);
  }
  if (c.gate) {
    p.z = uniform(dtype, activations(c), -2, 2);
  }
  if (c.bias) {
    p.bias = uniform(sum, {{H}}, -3, -1);
  }
  if (c.packing != Packing::none) {
    const std::vector<double> indices = sequence_indices(c);
    p.seq_idx = Tensor::from_values(DType::i32, test::kCpu, {{B, c.length}}, indices);
    if (c.packing == Packing::numbered) {  // and one more that has no step
      p.sequences =
          static_cast<std::int64_t>(*std::max_element(indices.begin(), indices.end())) + 2;
    }
  }
  const std::int64_t rows = p.rows();
  if (c.initial) {
    p.initial =
        uniform(sum,
                c.layout == Layout::time_last ? Shape{{rows, H, P, N}, {H * N * P, N * P, 1, P}}
                                              : Shape{{rows, H, P, N}},
                -1, 1);
  }
  if (c.dlast) {
    p.dlast = uniform(sum,
                      c.layout == Layout::expanded ? Shape{{rows, H, P, N}, {0, 0, 0, 0}}
                                                   : Shape{{rows, H, P, N}},
                      -1, 1);
  }
  return p;
}

// Outputs are as strided as the inputs, but for stride 0.
Shape writable(const Tensor& like) {
  const Shape& shape = like.shape();
  const bool expanded = std::count(shape.strides.begin(), shape.strides.end(), 0) > 0;
  return expanded ? Shape{shape.sizes} : shape;
}

struct Forward {
  Tensor out, last_states, checkpoints;
};

struct Backward {
  Tensor dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial;
};

using RunForward = std::function<void(const ForwardParams&)>;
using RunBackward = std::function<void(const BackwardParams&)>;

Forward run_forward(const Data& p, Device device, const RunForward& run, bool checkpoints = true) {
  const DType sum = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const std::vector<std::int64_t>& size = p.x.shape().sizes;
  const std::int64_t N = p.B.shape().sizes[3];
  Forward result;
  result.out = Tensor(p.dtype, device, writable(p.x));
  result.last_states =
      Tensor(sum, device,
             p.initial.present() ? writable(p.initial) : Shape{{p.rows(), size[2], size[3], N}});
  if (checkpoints) {
    result.checkpoints = Tensor(
        sum, device, {{size[0], ceil_div(size[1], kCheckpointInterval), size[2], size[3], N}});
  }
  ForwardParams params;
  params.in = p.inputs();
  params.out = result.out.view();
  params.last_states = result.last_states.view();
  params.checkpoints = result.checkpoints.view();
  const Tensor workspace(DType::f32, device, {{forward_workspace(params.in)}});
  params.workspace = workspace.view();
  run(params);
  return result;
}

Backward run_backward(const Data& p, Device device, const RunBackward& run,
                      const Tensor& checkpoints) {
  const DType sum = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto like = [&](const Tensor& tensor) {
    return tensor.present() ? Tensor(sum, device, {tensor.shape().sizes}) : Tensor();
  };
  Backward result;
  result.dx = Tensor(p.dtype, device, writable(p.x));
  result.ddt = Tensor(p.dt.dtype(), device, writable(p.dt));
  result.dA = like(p.A);
  result.dB = like(p.B);
  result.dC = like(p.C);
  result.dD = like(p.D);
  result.dz = p.z.present() ? Tensor(p.dtype, device, writable(p.z)) : Tensor();
  result.dbias = like(p.bias);
  result.dinitial = like(p.initial);
  BackwardParams params;
  params.in = p.inputs();
  params.dout = p.dout.view();
  params.dlast_states = p.dlast.view();
  params.checkpoints = checkpoints.view();
  params.dx = result.dx.view();
  params.ddt = result.ddt.view();
  params.dA = result.dA.view();
  params.dB = result.dB.view();
  params.dC = result.dC.view();
  params.dD = result.dD.view();
  params.dz = result.dz.view();
  params.ddt_bias = result.dbias.view();
  params.dinitial_states = result.dinitial.view();
  const Tensor workspace(DType::f32, device, {{backward_workspace(params)}});
  params.workspace = workspace.view();
  run(params);
  return result;
}

// Truth in float64 and yardstick in float32, as compare.h wants them.
struct Expected {
  explicit Expected(const Data& p) {
    const Data exact = p.to(DType::f64, test::kCpu);
    truth = run_forward(exact, test::kCpu, &reference::forward<double>);
    yardstick = run_forward(p, test::kCpu, &reference::forward<float>);
    truth_gradients =
        run_backward(exact, test::kCpu, &reference::backward<double>, truth.checkpoints);
    yardstick_gradients =
        run_backward(p, test::kCpu, &reference::backward<float>, yardstick.checkpoints);
  }
  Forward truth, yardstick;
  Backward truth_gradients, yardstick_gradients;
};

testing::AssertionResult close(const char* op, const char* output, DType dtype, const Tensor& got,
                               const Tensor& truth, const Tensor& yardstick, double slack) {
  if (got.present() != truth.present()) {
    return testing::AssertionFailure()
           << output << (got.present() ? " is unexpected" : " is missing");
  }
  if (!got.present()) {
    return testing::AssertionSuccess();
  }
  // Tensor cores multiply numbers of 16-bit types only: states, scores and adjoints are rounded to
  // the inputs' dtype, and so what float32 outputs are made of.
  const bool rounded = got.device().is_cuda() && size_of(dtype) == 2;
  const auto largest = [](const Tensor& tensor) {
    double size = 0;
    for (const double value : tensor.values()) {
      size = std::max(size, std::isnan(value) ? HUGE_VAL : std::abs(value));
    }
    return size;
  };
  constexpr double kSmallestHalf = 5.9604644775390625e-8;
  if (rounded && dtype == DType::f16 && largest(truth) < kSmallestHalf) {
    return largest(got) < kSmallestHalf ? testing::AssertionSuccess()
                                        : testing::AssertionFailure() << output << " is not tiny";
  }
  return test::is_close(rounded ? std::string(op) + "_tensor_cores" : op, dtype, output,
                        rounded ? dtype : got.dtype(), got.values(), truth.values(),
                        yardstick.values(),
                        got.device().is_cuda() ? slack * test::kHardwareExp2Slack : slack);
}

void expect_close(const Forward& got, const Expected& expected, DType dtype) {
  constexpr char kOp[] = "ssd_forward";
  const Forward& truth = expected.truth;
  const Forward& yard = expected.yardstick;
  EXPECT_TRUE(close(kOp, "out", dtype, got.out, truth.out, yard.out, test::kForwardSlack));
  EXPECT_TRUE(close(kOp, "last_states", dtype, got.last_states, truth.last_states, yard.last_states,
                    test::kForwardSlack));
  EXPECT_TRUE(close(kOp, "checkpoints", dtype, got.checkpoints, truth.checkpoints, yard.checkpoints,
                    test::kForwardSlack));
}

// Factor on kGradientSlack for sums over the whole batch and time, of which every head has one:
// what the yardstick errs by is a draw of few. With the same inputs it errs by 5.5e-6 with glibc
// and by 1.9e-6 with Windows' C runtime, and the kernels by 7.7e-6 on both.
constexpr double kSumOfHeadSlack = 2.0;

void expect_close(const Backward& got, const Expected& expected, DType dtype) {
  struct Row {
    const char* name;
    Tensor Backward::* output;
    double slack = test::kGradientSlack;
  };
  constexpr double kOfHead = test::kGradientSlack * kSumOfHeadSlack;
  const Row rows[] = {{"dx", &Backward::dx},
                      {"ddt", &Backward::ddt},
                      {"dA", &Backward::dA, kOfHead},
                      {"dB", &Backward::dB},
                      {"dC", &Backward::dC},
                      {"dD", &Backward::dD, kOfHead},
                      {"dz", &Backward::dz},
                      {"ddt_bias", &Backward::dbias, kOfHead},
                      {"dinitial_states", &Backward::dinitial}};
  for (const Row& row : rows) {
    EXPECT_TRUE(close("ssd_backward", row.name, dtype, got.*row.output,
                      expected.truth_gradients.*row.output,
                      expected.yardstick_gradients.*row.output, row.slack));
  }
}

// ---- every implementation on every row ----

RunForward forward_on(const Target& target) {
  return test::on<ForwardParams>(target, &forward, &cpu::forward);
}

RunBackward backward_on(const Target& target) {
  return test::on<BackwardParams>(target, &backward, &cpu::backward);
}

using Row = test::Row<Case>;
using Ssd = test::RowTest<Case>;

std::vector<Row> rows(const std::vector<Case>& problems) {
  std::vector<Row> all = test::rows(problems);
  const auto too_wide = [](const Row& row) {  // SsdPlan asks for more
    return row.target.device.is_cuda() && row.problem.states > 256;
  };
  all.erase(std::remove_if(all.begin(), all.end(), too_wide), all.end());
  return all;
}

TEST_P(Ssd, MatchesTheOracle) {
  const Row& row = GetParam();
  const Data host = make(row.problem, row.dtype);
  const Data p = host.to(row.dtype, row.target.device);
  const Expected expected(host);
  const Forward result = run_forward(p, row.target.device, forward_on(row.target));
  expect_close(result, expected, row.dtype);
  expect_close(run_backward(p, row.target.device, backward_on(row.target), result.checkpoints),
               expected, row.dtype);
}

INSTANTIATE_TEST_SUITE_P(Star, Ssd, testing::ValuesIn(rows(star())), test::row_name<Case>);

#if MAMBA_WITH_CUDA
// Every row of CUDA's tables is right on every problem that it can run, chosen or not.
class SsdCudaConfig : public testing::TestWithParam<std::tuple<DType, int>> {};

TEST_P(SsdCudaConfig, MatchesTheOracle) {
  const std::string reason = test::cuda_unavailable();
  if (!reason.empty()) {
    GTEST_SKIP() << reason;
  }
  const DType dtype = std::get<0>(GetParam());
  const int config = std::get<1>(GetParam());
  int ran = 0;
  for (const Case& c : star()) {
    SCOPED_TRACE(c.name);
    const Data host = make(c, dtype);
    const Config& row = config_of(config, size_of(dtype));
    if (c.states > row.states) {
      continue;
    }
    ++ran;
    Data p = host.to(dtype, test::kCuda);
    p.config = config;
    const Expected expected(host);
    const Forward result = run_forward(p, test::kCuda, [](const ForwardParams& q) { forward(q); });
    expect_close(result, expected, dtype);
    expect_close(
        run_backward(
            p, test::kCuda, [](const BackwardParams& q) { backward(q); }, result.checkpoints),
        expected, dtype);
  }
  EXPECT_GT(ran, 0) << "no problem of the star can run this row";
}

INSTANTIATE_TEST_SUITE_P(Config, SsdCudaConfig,
                         testing::Combine(testing::Values(DType::f32, DType::f16, DType::bf16),
                                          testing::Range(0, kConfigCount)),
                         [](const testing::TestParamInfo<std::tuple<DType, int>>& info) {
                           return std::string("cuda_") + test::short_name(std::get<0>(info.param)) +
                                  "_" + std::to_string(std::get<1>(info.param));
                         });
#endif

// A kernel that forgot a term must not pass: each is dropped here in turn, on the kernel's side
// only.
using SsdMutation = Ssd;

TEST_P(SsdMutation, ADroppedTermFails) {
  const Row& row = GetParam();
  const Data host = make(row.problem, row.dtype);
  const Expected expected(host);
  struct Mutation {
    const char* term;
    void (*drop)(Data&);
    Tensor Backward::* gradient;  // one that has the term
    bool forward;                 // whether out has it too
  };
  const Mutation mutations[] = {
      {"D", [](Data& p) { p.D = Tensor(); }, &Backward::dx, true},
      {"z", [](Data& p) { p.z = Tensor(); }, &Backward::dx, true},
      {"dt_bias", [](Data& p) { p.bias = Tensor(); }, &Backward::ddt, true},
      {"softplus", [](Data& p) { p.softplus = false; }, &Backward::ddt, true},
      {"dt_limit", [](Data& p) { p.limit_low = 0; }, &Backward::ddt, true},
      {"initial_states", [](Data& p) { p.initial = Tensor(); }, &Backward::dA, true},
      {"dlast_states", [](Data& p) { p.dlast = Tensor(); }, &Backward::dx, false},
      {"reverse", [](Data& p) { p.reverse = true; }, &Backward::dx, true}};
  for (const Mutation& mutation : mutations) {
    Data p = host.to(row.dtype, row.target.device);
    mutation.drop(p);
    const Forward result = run_forward(p, row.target.device, forward_on(row.target));
    EXPECT_EQ(!close("ssd_forward", "out", row.dtype, result.out, expected.truth.out,
                     expected.yardstick.out, test::kForwardSlack),
              mutation.forward)
        << mutation.term;
    const Backward gradients =
        run_backward(p, row.target.device, backward_on(row.target), result.checkpoints);
    EXPECT_FALSE(close("ssd_backward", mutation.term, row.dtype, gradients.*mutation.gradient,
                       expected.truth_gradients.*mutation.gradient,
                       expected.yardstick_gradients.*mutation.gradient, test::kGradientSlack));
  }
}

INSTANTIATE_TEST_SUITE_P(Base, SsdMutation,
                         testing::ValuesIn(rows({with("limited",
                                                      [](Case& c) { c.limit_low = 0.05; })})),
                         test::row_name<Case>);

using SsdIdentity = test::TargetTest;

// Steps [begin, end) of a tensor (B, L, ...), forwards or backwards.
std::vector<double> steps(const Tensor& tensor, std::int64_t begin, std::int64_t end,
                          bool backwards = false) {
  const std::vector<double> all = tensor.values();
  const std::int64_t batch = tensor.shape().sizes[0], length = tensor.shape().sizes[1];
  const std::int64_t inner =
      static_cast<std::int64_t>(all.size()) / std::max<std::int64_t>(1, batch * length);
  std::vector<double> some;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t t = backwards ? end - 1 - (i - begin) : i;
      const auto first = all.begin() + (b * length + t) * inner;
      some.insert(some.end(), first, first + inner);
    }
  }
  return some;
}

Data cut(const Data& p, Device device, std::int64_t begin, std::int64_t end,
         bool backwards = false) {
  Data part = p;
  for (Tensor Data::* tensor : {&Data::x, &Data::dt, &Data::B, &Data::C, &Data::z, &Data::dout}) {
    std::vector<std::int64_t> sizes = (p.*tensor).shape().sizes;
    sizes[1] = end - begin;
    part.*tensor = Tensor::from_values((p.*tensor).dtype(), device, {sizes},
                                       steps(p.*tensor, begin, end, backwards));
  }
  return part;
}

void expect_near(const char* what, const std::vector<double>& a, const std::vector<double>& b) {
  ASSERT_EQ(a.size(), b.size()) << what;
  EXPECT_LT(test::nmse(a, b), 1e-11) << what;
}

// A sequence cut in two, the second part starting from the first's last state, is the whole
// sequence; the gradients agree too when the second part's gradient of its initial state enters the
// first.
TEST_P(SsdIdentity, SplitWithCarriedStateIsTheWhole) {
  const Target& target = GetParam();
  constexpr std::int64_t kLength = 300, kCut = 131;
  const Data whole =
      make(with("", [](Case& c) { c.length = kLength; }), DType::f32).to(DType::f32, target.device);
  const Forward all = run_forward(whole, target.device, forward_on(target));
  const Backward all_gradients =
      run_backward(whole, target.device, backward_on(target), all.checkpoints);

  Data first = cut(whole, target.device, 0, kCut);
  Data second = cut(whole, target.device, kCut, kLength);
  const Forward first_result = run_forward(first, target.device, forward_on(target));
  second.initial = first_result.last_states;
  const Forward second_result = run_forward(second, target.device, forward_on(target));
  expect_near("out, first part", first_result.out.values(), steps(all.out, 0, kCut));
  expect_near("out, second part", second_result.out.values(), steps(all.out, kCut, kLength));
  expect_near("last_states", second_result.last_states.values(), all.last_states.values());

  const Backward second_gradients =
      run_backward(second, target.device, backward_on(target), second_result.checkpoints);
  first.dlast = second_gradients.dinitial;
  const Backward first_gradients =
      run_backward(first, target.device, backward_on(target), first_result.checkpoints);
  expect_near("dx, first part", first_gradients.dx.values(), steps(all_gradients.dx, 0, kCut));
  expect_near("ddt, second part", second_gradients.ddt.values(),
              steps(all_gradients.ddt, kCut, kLength));
  expect_near("dB, first part", first_gradients.dB.values(), steps(all_gradients.dB, 0, kCut));
  expect_near("dinitial_states", first_gradients.dinitial.values(),
              all_gradients.dinitial.values());
  std::vector<double> dA = first_gradients.dA.values();
  const std::vector<double> second_dA = second_gradients.dA.values();
  for (std::size_t i = 0; i < dA.size(); ++i) {
    dA[i] += second_dA[i];
  }
  expect_near("dA", dA, all_gradients.dA.values());
}

TEST_P(SsdIdentity, ReverseIsFlipScanFlip) {
  const Target& target = GetParam();
  for (const std::int64_t length : {150, 600}) {
    Data p = make(with("", [&](Case& c) { c.length = length; }), DType::f32)
                 .to(DType::f32, target.device);
    const Data mirrored = cut(p, target.device, 0, length, true);
    const Forward expected = run_forward(mirrored, target.device, forward_on(target));
    const Backward expected_gradients =
        run_backward(mirrored, target.device, backward_on(target), expected.checkpoints);
    p.reverse = true;
    const Forward result = run_forward(p, target.device, forward_on(target));
    const Backward gradients =
        run_backward(p, target.device, backward_on(target), result.checkpoints);
    expect_near("out", result.out.values(), steps(expected.out, 0, length, true));
    expect_near("last_states", result.last_states.values(), expected.last_states.values());
    for (Tensor Backward::* gradient :
         {&Backward::dx, &Backward::ddt, &Backward::dB, &Backward::dC, &Backward::dz}) {
      expect_near("gradient", (gradients.*gradient).values(),
                  steps(expected_gradients.*gradient, 0, length, true));
    }
    for (Tensor Backward::* gradient :
         {&Backward::dA, &Backward::dD, &Backward::dbias, &Backward::dinitial}) {
      expect_near("gradient", (gradients.*gradient).values(),
                  (expected_gradients.*gradient).values());
    }
  }
}

// Every sequence of a packed row is what a call of its own gives: outputs, gradients, its row of
// last_states; the sums are those of all calls.
TEST_P(SsdIdentity, PackedIsSeparate) {
  const Target& target = GetParam();
  constexpr std::int64_t kLength = 600;
  for (const bool reverse : {false, true}) {
    const Data packed = make(with("",
                                  [&](Case& c) {
                                    c.batch = 1;
                                    c.length = kLength;
                                    c.packing = Packing::numbered;
                                    c.reverse = reverse;
                                  }),
                             DType::f32)
                            .to(DType::f32, target.device);
    const Forward all = run_forward(packed, target.device, forward_on(target));
    const Backward all_gradients =
        run_backward(packed, target.device, backward_on(target), all.checkpoints);
    const std::vector<double> indices = packed.seq_idx.values();
    const auto state_row = [&](const Tensor& states, std::int64_t index) {
      const std::vector<double> values = states.values();
      const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(values.size()) / packed.sequences;
      return std::vector<double>(values.begin() + index * size,
                                 values.begin() + (index + 1) * size);
    };
    Shape one_state = {packed.initial.shape().sizes};
    one_state.sizes[0] = 1;
    std::vector<double> dA(all_gradients.dA.values().size());
    for (std::int64_t begin = 0, end; begin < kLength; begin = end) {
      end = begin + 1;
      while (end < kLength &&
             indices[static_cast<std::size_t>(end)] == indices[static_cast<std::size_t>(begin)]) {
        ++end;
      }
      SCOPED_TRACE(testing::Message() << "steps " << begin << " to " << end);
      const std::int64_t index =
          static_cast<std::int64_t>(indices[static_cast<std::size_t>(begin)]);
      Data one = cut(packed, target.device, begin, end);
      one.seq_idx = one.initial = one.dlast = Tensor();
      one.sequences = 0;
      if (index >= 0) {
        one.initial = Tensor::from_values(DType::f32, target.device, one_state,
                                          state_row(packed.initial, index));
        one.dlast = Tensor::from_values(DType::f32, target.device, one_state,
                                        state_row(packed.dlast, index));
      }
      const Forward result = run_forward(one, target.device, forward_on(target));
      const Backward gradients =
          run_backward(one, target.device, backward_on(target), result.checkpoints);
      expect_near("out", steps(all.out, begin, end), result.out.values());
      for (Tensor Backward::* gradient :
           {&Backward::dx, &Backward::ddt, &Backward::dB, &Backward::dC, &Backward::dz}) {
        expect_near("gradient", steps(all_gradients.*gradient, begin, end),
                    (gradients.*gradient).values());
      }
      if (index >= 0) {
        expect_near("last_states", state_row(all.last_states, index), result.last_states.values());
        expect_near("dinitial_states", state_row(all_gradients.dinitial, index),
                    gradients.dinitial.values());
      }
      for (std::size_t i = 0; i < dA.size(); ++i) {
        dA[i] += gradients.dA.values()[i];
      }
    }
    expect_near("dA", dA, all_gradients.dA.values());
    const auto last = static_cast<std::int64_t>(packed.sequences) - 1;  // it has no step
    EXPECT_EQ(state_row(all.last_states, last), state_row(packed.initial, last));
    EXPECT_EQ(state_row(all_gradients.dinitial, last), state_row(packed.dlast, last));
  }
}

// A NaN in one sequence stays there.
TEST_P(SsdIdentity, SequencesDoNotSeeEachOther) {
  const Target& target = GetParam();
  Data p = make(with("",
                     [](Case& c) {
                       c.batch = 1;
                       c.packing = Packing::numbered;
                     }),
                DType::f32);
  const std::vector<double> indices = p.seq_idx.values();
  std::vector<double> x = p.x.values();
  constexpr std::size_t kBad = 100;
  const std::size_t row = x.size() / indices.size();
  std::fill_n(x.begin() + static_cast<std::ptrdiff_t>(kBad * row), row,
              std::numeric_limits<double>::quiet_NaN());
  p.x = Tensor::from_values(DType::f32, test::kCpu, p.x.shape(), x);
  p = p.to(DType::f32, target.device);
  const Forward result = run_forward(p, target.device, forward_on(target));
  const std::vector<double> out = result.out.values();
  const std::vector<double> dx =
      run_backward(p, target.device, backward_on(target), result.checkpoints).dx.values();
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::size_t t = i / row;
    const bool same = indices[t] == indices[kBad];
    EXPECT_TRUE(std::isnan(out[i]) || !(same && t >= kBad)) << "step " << t;
    EXPECT_FALSE(std::isnan(out[i]) && !same) << "step " << t;
    EXPECT_FALSE(std::isnan(dx[i]) && !same) << "step " << t;
  }
}

// Calls over nothing leave the state they began with, and gradients of zero.
TEST_P(SsdIdentity, EmptySizes) {
  const Target& target = GetParam();
  const std::function<void(Case&)> nothings[] = {
      [](Case& c) { c.length = 0; }, [](Case& c) { c.batch = 0; }, [](Case& c) { c.heads = 0; }};
  for (const auto& nothing : nothings) {
    const Data p = make(with("", nothing), DType::f32).to(DType::f32, target.device);
    // Through the public interface: that is where empty calls are told apart.
    const Forward result = run_forward(p, target.device, &forward);
    EXPECT_EQ(result.last_states.values(), p.initial.values());
    const Backward gradients = run_backward(p, target.device, &backward, result.checkpoints);
    EXPECT_EQ(gradients.dinitial.values(), p.dlast.values());
    for (const Tensor* sums :
         {&gradients.dA, &gradients.dB, &gradients.dC, &gradients.dD, &gradients.dbias}) {
      for (const double value : sums->values()) {
        EXPECT_EQ(value, 0.0);
      }
    }
  }
}

// A call that will have no backward stores no checkpoints and computes the same.
TEST_P(SsdIdentity, CheckpointsAreOptional) {
  const Target& target = GetParam();
  const Data p =
      make(with("", [](Case& c) { c.length = 300; }), DType::f32).to(DType::f32, target.device);
  const Forward with_them = run_forward(p, target.device, forward_on(target));
  const Forward without = run_forward(p, target.device, forward_on(target), false);
  EXPECT_EQ(without.out.bytes(), with_them.out.bytes());
  EXPECT_EQ(without.last_states.bytes(), with_them.last_states.bytes());
}

INSTANTIATE_TEST_SUITE_P(Identity, SsdIdentity, testing::ValuesIn(test::kTargets),
                         test::target_name);

// ---- the CPU's own promises ----

TEST(SsdCpu, ResultsDoNotDependOnTheThreads) {
  const Data p = make(with("",
                           [](Case& c) {
                             c.length = 700;
                             c.heads = 24;
                           }),
                      DType::f32);
  std::vector<std::vector<unsigned char>> first;
  for (const int threads : {1, 2, 3, 7}) {
    set_num_threads(threads);
    const Forward result = run_forward(p, test::kCpu, &forward);
    const Backward gradients = run_backward(p, test::kCpu, &backward, result.checkpoints);
    std::vector<std::vector<unsigned char>> bytes;
    for (const Tensor* tensor : {&result.out, &result.last_states, &gradients.dx, &gradients.dA,
                                 &gradients.dB, &gradients.dC, &gradients.dD, &gradients.dbias}) {
      bytes.push_back(tensor->bytes());
    }
    if (first.empty()) {
      first = bytes;
    }
    EXPECT_EQ(bytes, first) << threads << " threads";
  }
  set_num_threads(0);
}

// A NaN in dt reaches every later output of its head and no other head.
TEST(SsdCpu, PropagatesNaN) {
  for (const Target& target : test::kTargets) {
    if (target.device.is_cuda() || !test::unavailable(target).empty()) {
      continue;
    }
    const Case problem = with("", [](Case& c) { c.batch = 1; });
    Data p = make(problem, DType::f32);
    std::vector<double> dt = p.dt.values();
    constexpr std::int64_t kHead = 3, kStep = 70;
    dt[static_cast<std::size_t>(kStep * problem.heads + kHead)] =
        std::numeric_limits<double>::quiet_NaN();
    p.dt = Tensor::from_values(DType::f32, test::kCpu, p.dt.shape(), dt);
    const std::vector<double> out = run_forward(p, test::kCpu, forward_on(target)).out.values();
    for (std::size_t i = 0; i < out.size(); ++i) {
      const std::int64_t row = static_cast<std::int64_t>(i) / problem.headdim;
      const std::int64_t t = row / problem.heads, h = row % problem.heads;
      EXPECT_EQ(std::isnan(out[i]), h == kHead && t >= kStep)
          << target.name << " head " << h << " step " << t;
    }
  }
}

TEST(SsdCpu, Float64RunsTheOracle) {
  const Data p = make(star().front(), DType::f64);
  const Expected expected(p);
  const Forward result = run_forward(p, test::kCpu, &forward);
  EXPECT_EQ(result.out.values(), expected.truth.out.values());
  const Backward gradients = run_backward(p, test::kCpu, &backward, result.checkpoints);
  EXPECT_EQ(gradients.dA.values(), expected.truth_gradients.dA.values());
}

// ---- the oracle ----

// One head of two channels and one state. dt = ln 2 and A = -1 halve the state at every step.
Data by_hand() {
  const double ln2 = std::log(2.0);
  Data p;
  p.dtype = p.dt_dtype = DType::f64;
  const auto tensor = [](std::vector<std::int64_t> sizes, const std::vector<double>& values) {
    return Tensor::from_values(DType::f64, test::kCpu, {std::move(sizes)}, values);
  };
  p.x = tensor({1, 3, 1, 2}, {1, 10, 2, 20, 3, 30});
  p.dt = tensor({1, 3, 1}, {ln2, ln2, ln2});
  p.A = tensor({1}, {-1});
  p.B = tensor({1, 3, 1, 1}, {1 / ln2, 1 / ln2, 1 / ln2});
  p.C = tensor({1, 3, 1, 1}, {1, 2, 4});
  p.D = tensor({1}, {10});
  p.initial = tensor({1, 1, 2, 1}, {8, 80});
  p.dout = tensor({1, 3, 1, 2}, {1, 0, 1, 0, 1, 0});
  p.dlast = tensor({1, 1, 2, 1}, {16, 0});
  return p;
}

// Channel 0 has x = 1, 2, 3 and S[-1] = 8, with dt B = 1:
// S = 4 + 1 = 5, 2.5 + 2 = 4.5, 2.25 + 3 = 5.25; C = 1, 2, 4 and D = 10 give y = 15, 29, 51.
// Channel 1 is ten times that.
TEST(SsdOracle, ForwardByHand) {
  Data p = by_hand();
  const Forward result = run_forward(p, test::kCpu, &reference::forward<double>);
  const std::vector<double> y = {15, 29, 51};
  for (std::size_t t = 0; t < y.size(); ++t) {
    EXPECT_NEAR(result.out.values()[2 * t], y[t], 1e-13);
    EXPECT_NEAR(result.out.values()[2 * t + 1], 10 * y[t], 1e-12);
  }
  EXPECT_NEAR(result.last_states.values()[0], 5.25, 1e-14);
  EXPECT_NEAR(result.last_states.values()[1], 52.5, 1e-13);
  EXPECT_EQ(result.checkpoints.values(), p.initial.values());

  // From the last step to the first: S = 4 + 3 = 7, 3.5 + 2 = 5.5, 2.75 + 1 = 3.75.
  p.reverse = true;
  const Forward reversed = run_forward(p, test::kCpu, &reference::forward<double>);
  const std::vector<double> y_reversed = {13.75, 31, 58};
  for (std::size_t t = 0; t < y.size(); ++t) {
    EXPECT_NEAR(reversed.out.values()[2 * t], y_reversed[t], 1e-13);
  }
  EXPECT_NEAR(reversed.last_states.values()[0], 3.75, 1e-14);
  p.reverse = false;

  // z = 0 closes the gate. softplus(0) = ln 2, and limits of ln 2 make any dt the same.
  const auto tensor = [](std::vector<std::int64_t> sizes, const std::vector<double>& values) {
    return Tensor::from_values(DType::f64, test::kCpu, {std::move(sizes)}, values);
  };
  p.z = tensor({1, 3, 1, 2}, {0, 0, 0, 40, 40, 40});
  p.dt = tensor({1, 3, 1}, {-1, -1, -1});
  p.bias = tensor({1}, {1});
  p.softplus = true;
  const std::vector<double> gated =
      run_forward(p, test::kCpu, &reference::forward<double>).out.values();
  EXPECT_EQ(gated[0], 0);
  EXPECT_EQ(gated[2], 0);
  EXPECT_NEAR(gated[3], 290 * 40.0, 1e-9);
  EXPECT_NEAR(gated[4], 51 * 40.0, 1e-10);
  p.z = Tensor();
  p.dt = tensor({1, 3, 1}, {-5, 0, 7});
  p.limit_low = p.limit_high = std::log(2.0);
  const std::vector<double> limited =
      run_forward(p, test::kCpu, &reference::forward<double>).out.values();
  for (std::size_t t = 0; t < y.size(); ++t) {
    EXPECT_NEAR(limited[2 * t], y[t], 1e-13);
  }

  // Two sequences in the row, the second from zero: S = 5; 2, 1 + 3 = 4.
  p.seq_idx = Tensor::from_values(DType::i32, test::kCpu, {{1, 3}}, {7, 9, 9});
  const std::vector<double> packed =
      run_forward(p, test::kCpu, &reference::forward<double>).out.values();
  EXPECT_NEAR(packed[0], 15, 1e-13);
  EXPECT_NEAR(packed[2], 2 * 2 + 20, 1e-13);
  EXPECT_NEAR(packed[4], 4 * 4 + 30, 1e-13);
}

// The same numbers backwards, with dout = 1 on channel 0 and dlast_states = 16 there:
// q = C + carry: q[2] = 4 + 16 = 20, q[1] = 2 + 10 = 12, q[0] = 1 + 6 = 7, and 3.5 leaves to S[-1].
TEST(SsdOracle, BackwardByHand) {
  const double ln2 = std::log(2.0);
  const Data p = by_hand();
  const Backward gradients = run_backward(p, test::kCpu, &reference::backward<double>, Tensor());
  const double q[] = {7, 12, 20};
  const double S[] = {5, 4.5, 5.25};
  const double decayed[] = {4, 2.5, 2.25};  // exp(dt A) S[t-1]
  const double x[] = {1, 2, 3};
  double dA = 0;
  for (std::size_t t = 0; t < 3; ++t) {
    EXPECT_NEAR(gradients.dx.values()[2 * t], 10 + q[t], 1e-12);  // D g + dt q B
    EXPECT_EQ(gradients.dx.values()[2 * t + 1], 0);
    EXPECT_NEAR(gradients.ddt.values()[t], q[t] * x[t] / ln2 - q[t] * decayed[t], 1e-12);
    EXPECT_NEAR(gradients.dB.values()[t], q[t] * ln2 * x[t], 1e-12);
    EXPECT_NEAR(gradients.dC.values()[t], S[t], 1e-12);
    dA += q[t] * ln2 * decayed[t];
  }
  EXPECT_NEAR(gradients.dA.values()[0], dA, 1e-12);
  EXPECT_NEAR(gradients.dD.values()[0], 6, 1e-12);
  EXPECT_NEAR(gradients.dinitial.values()[0], 3.5, 1e-12);
  EXPECT_EQ(gradients.dinitial.values()[1], 0);
}

// L = sum dout out + sum dlast_states last_states, in float64.
double loss(const Data& p) {
  const Forward result = run_forward(p, test::kCpu, &reference::forward<double>);
  double sum = 0;
  const std::vector<double> out = result.out.values(), dout = p.dout.values();
  for (std::size_t i = 0; i < out.size(); ++i) {
    sum += out[i] * dout[i];
  }
  const std::vector<double> last = result.last_states.values(), dlast = p.dlast.values();
  for (std::size_t i = 0; i < dlast.size(); ++i) {
    sum += last[i] * dlast[i];
  }
  return sum;
}

TEST(SsdOracle, BackwardMatchesFiniteDifferences) {
  for (const Packing packing : {Packing::none, Packing::numbered}) {
    for (const bool softplus : {false, true}) {
      const Data p = make(with("",
                               [&](Case& c) {
                                 c.batch = packing == Packing::none ? 2 : 1;
                                 c.packing = packing;
                                 c.headdim = 3;
                                 c.states = 2;
                                 c.length = 5;
                                 c.skip = softplus ? Skip::per_head : Skip::per_channel;
                                 c.softplus = softplus;
                                 c.reverse = softplus;
                                 c.dt_low = softplus ? -1.0 : 3.01;  // above the bias
                                 c.dt_high = softplus ? 1.0 : 3.3;
                                 c.limit_low = softplus ? 0.1 : 0.4;
                                 c.limit_high = softplus ? 0.3 : 1.5;
                               }),
                          DType::f64);
      const Backward gradients =
          run_backward(p, test::kCpu, &reference::backward<double>, Tensor());
      struct Pair {
        const char* name;
        Tensor Data::* input;
        Tensor Backward::* gradient;
      };
      const Pair pairs[] = {{"x", &Data::x, &Backward::dx},
                            {"dt", &Data::dt, &Backward::ddt},
                            {"A", &Data::A, &Backward::dA},
                            {"B", &Data::B, &Backward::dB},
                            {"C", &Data::C, &Backward::dC},
                            {"D", &Data::D, &Backward::dD},
                            {"z", &Data::z, &Backward::dz},
                            {"dt_bias", &Data::bias, &Backward::dbias},
                            {"initial_states", &Data::initial, &Backward::dinitial}};
      int clamped = 0;
      for (const double ddt : gradients.ddt.values()) {
        clamped += ddt == 0;
      }
      EXPECT_GT(clamped, 0);
      for (const Pair& pair : pairs) {
        const std::vector<double> values = (p.*pair.input).values();
        const std::vector<double> analytic = (gradients.*pair.gradient).values();
        ASSERT_EQ(values.size(), analytic.size()) << pair.name;
        for (std::size_t i = 0; i < values.size(); ++i) {
          constexpr double kStep = 1e-6;
          double side[2];
          for (int s = 0; s < 2; ++s) {
            std::vector<double> moved = values;
            moved[i] += s == 0 ? -kStep : kStep;
            Data q = p;
            q.*pair.input =
                Tensor::from_values(DType::f64, test::kCpu, (p.*pair.input).shape(), moved);
            side[s] = loss(q);
          }
          EXPECT_NEAR(analytic[i], (side[1] - side[0]) / (2 * kStep),
                      1e-7 * (1 + std::fabs(analytic[i])))
              << pair.name << " " << i;
        }
      }
    }
  }
}

// ---- bad input ----

std::string forward_error(const Data& p, const std::function<void(ForwardParams&)>& change) {
  std::string message;
  const Forward result = run_forward(p, test::kCpu, [&](const ForwardParams& good) {
    ForwardParams params = good;
    change(params);
    try {
      forward(params);
    } catch (const Error& error) {
      message = error.what();
    }
  });
  for (const Tensor* output : {&result.out, &result.last_states, &result.checkpoints}) {
    for (const double value : output->values()) {
      EXPECT_TRUE(std::isnan(value)) << "memory was touched before the error";
    }
  }
  return message;
}

TEST(SsdErrors, BadInputNamesTheArgument) {
  const Data p = make(star().front(), DType::f32);
  const std::pair<std::function<void(Inputs&)>, const char*> bad[] = {
      {[](Inputs& in) { in.x.dim = 3; }, "x must have shape (batch, length, heads, headdim)"},
      {[](Inputs& in) { in.B.dim = 3; }, "B must have shape (batch, length, groups, d_state)"},
      {[](Inputs& in) { in.x.dtype = DType::i32; }, "x must be float32, float16"},
      {[](Inputs& in) { in.x.size[3] = 0; }, "x must have at least one element per head"},
      {[](Inputs& in) { in.B.size[3] = 0; }, "B must have at least one state"},
      {[](Inputs& in) { in.B.size[2] = 4; }, "cannot be divided into the 4 groups of B"},
      {[](Inputs& in) { in.B.size[2] = 0; }, "cannot be divided into the 0 groups of B"},
      {[](Inputs& in) { in.B.size[1] = 149; }, "B must have shape (2, 150, 2, 24)"},
      {[](Inputs& in) { in.C.size[2] = 1; }, "C must have shape (2, 150, 2, 24)"},
      {[](Inputs& in) { in.C.dtype = DType::f16; }, "C must be float32"},
      {[](Inputs& in) { in.dt.size[2] = 7; }, "dt must have shape (2, 150, 6)"},
      {[](Inputs& in) { in.dt.dtype = DType::f16; }, "dt must be float32 like x, or float32"},
      {[](Inputs& in) { in.dt = TensorView(); }, "dt is missing"},
      {[](Inputs& in) { in.A.size[0] = 3; }, "A must have shape (6)"},
      {[](Inputs& in) { in.A.dtype = DType::bf16; }, "A must be float32"},
      {[](Inputs& in) { in.D.size[0] = 7; }, "D must have shape (6)"},
      {[](Inputs& in) {
         in.D.dim = 2;
         in.D.size[1] = 3;
       },
       "D must have shape (6, 20)"},
      {[](Inputs& in) { in.z.size[0] = 1; }, "z must have shape (2, 150, 6, 20)"},
      {[](Inputs& in) { in.dt_bias.dtype = DType::f64; }, "dt_bias must be float32"},
      {[](Inputs& in) { in.initial_states.size[3] = 8; },
       "initial_states must have shape (2, 6, 20, 24)"},
      {[](Inputs& in) { in.sequences = 2; }, "with sequences, x must have batch 1"},
      {[](Inputs& in) { in.sequences = -1; }, "sequences must be 0 or their number"},
      {[](Inputs& in) { in.dt_min = 2, in.dt_max = 1; }, "dt_limit must be (smallest, largest)"},
      {[](Inputs& in) { in.dt_min = std::nan(""); }, "dt_limit must be (smallest, largest)"},
      {[](Inputs& in) { in.z.device = test::kCuda; }, "z must be on cpu"},
      {[](Inputs& in) { in.B.data = nullptr; }, "B has no memory"},
      {[](Inputs& in) { in.x.stride[1] = -1; }, "x has a negative stride"},
      {[](Inputs& in) { in.x.stride[0] = std::int64_t{1} << 61; }, "x is larger than 64-bit"},
      {[](Inputs& in) { in.seq_idx = TensorView(in.x.data, DType::i64, {2, 150}); },
       "seq_idx must be int32"},
  };
  for (const auto& row : bad) {
    const std::string message =
        forward_error(p, [&](ForwardParams& params) { row.first(params.in); });
    EXPECT_NE(message.find(row.second), std::string::npos)
        << row.second << ": \"" << message << "\"";
    EXPECT_EQ(message.find("ssd_forward: "), 0u) << message;
  }
}

TEST(SsdErrors, BadOutputNamesTheArgument) {
  const Data p = make(star().front(), DType::f32);
  const std::pair<std::function<void(ForwardParams&)>, const char*> bad[] = {
      {[](ForwardParams& q) { q.out.dtype = DType::f16; }, "out must be float32"},
      {[](ForwardParams& q) { q.out.stride[1] = 0; },
       "out is written, so its elements may not share memory"},
      {[](ForwardParams& q) { q.last_states = TensorView(); }, "last_states is missing"},
      {[](ForwardParams& q) { q.checkpoints.size[1] = 2; },
       "checkpoints must have shape (2, 1, 6, 20, 24)"},
      {[](ForwardParams& q) { q.checkpoints.stride[0] = 5000; }, "checkpoints must be contiguous"},
  };
  for (const auto& row : bad) {
    const std::string message = forward_error(p, row.first);
    EXPECT_NE(message.find(row.second), std::string::npos)
        << row.second << ": \"" << message << "\"";
  }
}

TEST(SsdErrors, BadGradientNamesTheArgument) {
  const Data p = make(star().front(), DType::f32);
  const std::pair<std::function<void(BackwardParams&)>, const char*> bad[] = {
      {[](BackwardParams& q) { q.dout.size[2] = 3; }, "dout must have shape (2, 150, 6, 20)"},
      {[](BackwardParams& q) { q.dlast_states.dtype = DType::f16; },
       "dlast_states must be float32"},
      {[](BackwardParams& q) { q.checkpoints = TensorView(); }, "checkpoints is missing"},
      {[](BackwardParams& q) { q.ddt.dtype = DType::f16; }, "ddt must be float32"},
      {[](BackwardParams& q) { q.dB.stride[0] = 50000; }, "dB must be contiguous"},
      {[](BackwardParams& q) { q.dC.size[3] = 1; }, "dC must have shape (2, 150, 2, 24)"},
      {[](BackwardParams& q) { q.dz = TensorView(); }, "dz must be given exactly when z is"},
      {[](BackwardParams& q) { q.in.D = TensorView(); }, "dD must be given exactly when D is"},
  };
  const Tensor checkpoints = run_forward(p, test::kCpu, &reference::forward<float>).checkpoints;
  for (const auto& row : bad) {
    std::string message;
    const Backward result = run_backward(
        p, test::kCpu,
        [&](const BackwardParams& good) {
          BackwardParams params = good;
          row.first(params);
          try {
            backward(params);
          } catch (const Error& error) {
            message = error.what();
          }
        },
        checkpoints);
    EXPECT_EQ(message.find(std::string("ssd_backward: ") + row.second), 0u)
        << row.second << ": \"" << message << "\"";
    for (const double value : result.dx.values()) {
      EXPECT_TRUE(std::isnan(value)) << "memory was touched before the error";
    }
  }
}

// ---- the choice of a CUDA kernel, which needs no GPU ----

mamba_native::cuda::DeviceInfo device_with(int shared_memory) {
  mamba_native::cuda::DeviceInfo device;
  device.multiprocessors = 132;
  device.major = 9;
  device.shared_memory_per_block = shared_memory;
  return device;
}

constexpr int kTuring = 64 * 1024, kAda = 99 * 1024, kHopper = 227 * 1024;

std::string forward_refusal(std::int64_t d_state, DType dtype, int shared_memory, int forced) {
  try {
    choose_forward(d_state, dtype, device_with(shared_memory), forced);
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

TEST(SsdPlan, TheSmallestTilesThatHoldTheStatesRun) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const int shared_memory : {kAda, kHopper}) {
      const mamba_native::cuda::DeviceInfo device = device_with(shared_memory);
      for (const std::int64_t d_state : {1, 16, 64, 128, 129, 256}) {
        const int expected = d_state <= 128 ? 0 : 2;
        EXPECT_EQ(choose_forward(d_state, dtype, device), expected) << d_state;
        EXPECT_EQ(choose_backward(d_state, dtype, device), expected) << d_state;
      }
    }
  }
}

TEST(SsdPlan, TuringRunsTilesThatFit) {
  const mamba_native::cuda::DeviceInfo turing = device_with(kTuring);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const int forward_row =
        dtype == DType::f32 ? 0 : 1;  // it needs 65,360 bytes, Turing has 65,536
    for (const std::int64_t d_state : {1, 64, 128}) {
      EXPECT_EQ(choose_forward(d_state, dtype, turing), forward_row);
      EXPECT_EQ(choose_backward(d_state, dtype, turing), 1);
    }
    EXPECT_EQ(choose_forward(256, dtype, turing), 2);
    try {
      choose_backward(256, dtype, turing);
      ADD_FAILURE() << "backward's tiles of 256 states do not fit";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("bytes of shared memory, the device has 65536"),
                std::string::npos)
          << error.what();
    }
  }
}

TEST(SsdPlan, AForcedRowRunsOrSaysWhyNot) {
  EXPECT_EQ(choose_forward(64, DType::bf16, device_with(kHopper), 2), 2);
  EXPECT_NE(forward_refusal(129, DType::bf16, kHopper, 0).find("it holds 128 states at most"),
            std::string::npos);
  EXPECT_NE(forward_refusal(128, DType::bf16, kTuring, 0).find("bytes of shared memory"),
            std::string::npos);
}

TEST(SsdPlan, MoreStatesThanAnyRowHoldsAreRefused) {
  EXPECT_NE(forward_refusal(257, DType::f32, kHopper, -1).find("no kernel takes d_state 257"),
            std::string::npos);
}

// Mamba-2 2.7B's heads in bfloat16.
Inputs inputs_of(std::int64_t batch, std::int64_t length) {
  Inputs in;
  in.x = TensorView(nullptr, DType::bf16, {batch, length, 80, 64}, test::kCuda);
  in.B = TensorView(nullptr, DType::bf16, {batch, length, 1, 128}, test::kCuda);
  return in;
}

BackwardPlan plan_of(std::int64_t batch, std::int64_t length, int shared_memory = kHopper) {
  BackwardParams params;
  params.in = inputs_of(batch, length);
  return plan_backward(params, device_with(shared_memory));
}

TEST(SsdPlan, ForwardCutsTimeWhereThereAreFewHeads) {
  const mamba_native::cuda::DeviceInfo device = device_with(kHopper);
  const ForwardPlan one = plan_forward(inputs_of(1, 32768), device);
  EXPECT_EQ(one.segments, 3);  // 240 CTAs, two for each of 132 multiprocessors
  EXPECT_EQ(one.segment % kCheckpointInterval, 0);
  EXPECT_GE(one.segment * one.segments, 32768);
  EXPECT_EQ(one.size, 2 * 80 * (64 * 128 + 1));
  const ForwardPlan eight = plan_forward(inputs_of(8, 2048), device);
  EXPECT_EQ(eight.segments, 1);
  EXPECT_EQ(eight.segment, 2048);
  EXPECT_EQ(eight.size, 0);
  EXPECT_EQ(plan_forward(inputs_of(1, 700), device).segments, 1);
}

TEST(SsdPlan, ForwardHoldsTwoChunksWhereTwoCtasHaveRoomForThem) {
  EXPECT_EQ(plan_forward(inputs_of(1, 2048), device_with(kHopper)).stages, 2);
  EXPECT_EQ(plan_forward(inputs_of(1, 2048), device_with(163 * 1024)).stages, 1);
  EXPECT_EQ(plan_forward(inputs_of(1, 2048), device_with(kAda)).stages, 1);
}

TEST(SsdPlan, BackwardSharesHeadsWhereThereAreFewChunks) {
  EXPECT_EQ(plan_of(1, 2048).shares, 4);  // 128 CTAs for 132 multiprocessors
  EXPECT_EQ(plan_of(1, 64).shares, 27);   // three heads each; the most is 32
  EXPECT_EQ(plan_of(64, 2048).shares, 1);
}

TEST(SsdPlan, BackwardHoldsTwoHeadsWhereTheyFit) {
  EXPECT_EQ(plan_of(1, 2048, kHopper).stages, 2);
  EXPECT_EQ(plan_of(1, 2048, kAda).stages, 1);
}

TEST(SsdPlan, BackwardsWorkspaceIsBoundedByAStretch) {
  const BackwardPlan short_plan = plan_of(1, 8192), long_plan = plan_of(1, 65536);
  EXPECT_EQ(short_plan.stretch % kCheckpointInterval, 0);
  EXPECT_EQ(short_plan.stretch, long_plan.stretch);
  EXPECT_LE(2 * (long_plan.leaving - long_plan.entering) * 4, kStretchBytes);
  EXPECT_EQ(plan_of(1, 100).stretch, 100);
}

TEST(SsdErrors, Float64OnAGpuIsRefusedByName) {
  const Data p = make(star().front(), DType::f64);
  const std::string message =
      forward_error(p, [](ForwardParams& params) { params.in.x.device = test::kCuda; });
  EXPECT_NE(message.find("x is float64, which only the CPU takes"), std::string::npos) << message;
}

}  // namespace
}  // namespace mamba_native::ssd
