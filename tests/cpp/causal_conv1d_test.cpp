// The convolution on every device and instruction set, against the oracle; the oracle itself
// against numbers worked out by hand and finite differences.
#include "causal_conv1d/causal_conv1d.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "causal_conv1d/cpu.h"
#include "causal_conv1d/plan.h"
#include "causal_conv1d/reference.h"
#include "core/error.h"
#include "core/parallel_for.h"
#include "support/compare.h"
#include "support/device_memory.h"
#include "support/targets.h"
#include "support/tensor.h"

namespace mamba_native::causal_conv1d {
namespace {

using test::Shape;
using test::Target;
using test::Tensor;
using Values = std::vector<double>;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// ---- what is computed ----

enum class Layout {
  channel_first,
  channel_first_slice,  // of more channels
  channel_last,
  channel_last_slice,       // of more channels, still aligned
  channel_last_misaligned,  // from an odd channel on, odd rows
  every_other_step,         // neither channels nor steps are neighbours
  expanded,                 // one channel repeated: stride 0
};

struct Case {
  std::string name;
  std::int64_t batch = 2;
  std::int64_t channels = 19;
  std::int64_t length = 61;
  std::int64_t width = 4;
  Layout layout = Layout::channel_first;
  bool bias = true;
  bool silu = true;
  bool initial = false;            // initial_states and the gradient of final_states
  bool packed = false;             // seq_idx, with padding that holds NaN
  bool open_end = false;           // packed, and the last sequence goes to the end
  DType weight = DType::f32;       // float64 if x is
  bool weight_transposed = false;  // strides (1, D)
  bool dout_expanded = false;      // every stride 0
  bool ordered = false;            // dweight and dbias in a fixed order
};

Case with(const std::string& name, const std::function<void(Case&)>& change) {
  Case row;
  row.name = name;
  change(row);
  return row;
}

// The base row, then rows that change one thing.
std::vector<Case> star() {
  std::vector<Case> rows = {
      with("base", [](Case&) {}),
      with("width_2", [](Case& c) { c.width = 2; }),
      with("width_3", [](Case& c) { c.width = 3; }),
      with("no_bias", [](Case& c) { c.bias = false; }),
      with("no_silu", [](Case& c) { c.silu = false; }),
      with("one_channel", [](Case& c) { c.channels = 1; }),
      with("batch_1", [](Case& c) { c.batch = 1; }),
      with("batch_beyond_the_grid",
           [](Case& c) {
             c.batch = 65537;
             c.channels = 2;
             c.length = 3;
           }),
      with("channel_last_batch_beyond_the_grid",
           [](Case& c) {
             c.batch = 65537;
             c.channels = 2;
             c.length = 3;
             c.layout = Layout::channel_last;
           }),
      with("weight_f16", [](Case& c) { c.weight = DType::f16; }),
      with("weight_bf16", [](Case& c) { c.weight = DType::bf16; }),
      with("weight_transposed", [](Case& c) { c.weight_transposed = true; }),
      with("dout_expanded", [](Case& c) { c.dout_expanded = true; }),
      with("channel_first_slice", [](Case& c) { c.layout = Layout::channel_first_slice; }),
      with("every_other_step", [](Case& c) { c.layout = Layout::every_other_step; }),
      with("expanded", [](Case& c) { c.layout = Layout::expanded; }),
      with("channel_last_weight_f16",
           [](Case& c) {
             c.layout = Layout::channel_last;
             c.channels = 32;
             c.weight = DType::f16;
           }),
      with("channel_last_weight_bf16",
           [](Case& c) {
             c.layout = Layout::channel_last;
             c.channels = 32;
             c.weight = DType::bf16;
           }),
      with("channel_last_dout_expanded",
           [](Case& c) {
             c.layout = Layout::channel_last;
             c.dout_expanded = true;
           }),
  };
  // Around the tiles of the kernels: vectors of 4 to 16, blocks of 512 and 1024 steps.
  for (const std::int64_t length : {1, 2, 3, 4, 8, 9, 16, 64, 511, 512, 513, 1024, 1029, 2300}) {
    rows.push_back(with("length_" + std::to_string(length), [&](Case& c) {
      c.length = length;
      c.channels = length < 500 ? 19 : 3;
    }));
  }
  for (const std::int64_t length : {4, 5, 64, 65, 256, 257, 700}) {
    rows.push_back(with("channel_last_length_" + std::to_string(length), [&](Case& c) {
      c.layout = Layout::channel_last;
      c.length = length;
      c.channels = 24;
    }));
  }
  for (const std::int64_t channels : {1, 8, 128, 129, 264}) {
    rows.push_back(with("channel_last_channels_" + std::to_string(channels), [&](Case& c) {
      c.layout = Layout::channel_last;
      c.channels = channels;
    }));
  }
  for (const bool last : {false, true}) {
    const std::string prefix = last ? "channel_last_" : "";
    const Layout layout = last ? Layout::channel_last : Layout::channel_first;
    for (const std::int64_t width : {5, 6, 7, 8}) {
      rows.push_back(with(prefix + "width_" + std::to_string(width), [&](Case& c) {
        c.layout = layout;
        c.channels = 40;
        c.width = width;
      }));
    }
    for (const std::int64_t width : {2, 3, 4, 5, 6, 7, 8}) {
      const std::string suffix = "_width_" + std::to_string(width);
      rows.push_back(with(prefix + "initial" + suffix, [&](Case& c) {
        c.layout = layout;
        c.initial = true;
        c.width = width;
      }));
      rows.push_back(with(prefix + "packed" + suffix, [&](Case& c) {
        c.layout = layout;
        c.packed = true;
        c.width = width;
        c.length = 83;
      }));
      for (const bool open_end : {false, true}) {
        rows.push_back(
            with(prefix + "packed_initial" + (open_end ? "_open_end" : "") + suffix, [&](Case& c) {
              c.layout = layout;
              c.packed = true;
              c.initial = true;
              c.open_end = open_end;
              c.batch = 5;  // one of which begins with padding
              c.width = width;
              c.length = 83;
            }));
      }
    }
    for (const std::int64_t width : {4, 8}) {
      const std::string suffix = "_width_" + std::to_string(width);
      for (const std::int64_t length : {1, 2, 3, 5}) {
        rows.push_back(with(
            prefix + "packed_initial" + suffix + "_length_" + std::to_string(length), [&](Case& c) {
              c.layout = layout;
              c.packed = true;
              c.initial = true;
              c.open_end = true;
              c.batch = 9;
              c.width = width;
              c.length = length;
            }));
      }
      rows.push_back(with(prefix + "ordered_sums" + suffix, [&](Case& c) {
        c.layout = layout;
        c.ordered = true;
        c.width = width;
        c.batch = 5;
        c.length = 700;
      }));
      rows.push_back(with(prefix + "ordered_sums_short" + suffix, [&](Case& c) {
        c.layout = layout;
        c.ordered = true;
        c.bias = false;
        c.width = width;
        c.batch = 300;
        c.length = 2;
      }));
      rows.push_back(with(prefix + "weight_transposed" + suffix, [&](Case& c) {
        c.layout = layout;
        c.weight_transposed = true;
        c.weight = DType::bf16;
        c.width = width;
      }));
    }
    for (const std::int64_t length : {1, 2, 6, 7, 8, 600}) {
      rows.push_back(
          with(prefix + "initial_width_8_length_" + std::to_string(length), [&](Case& c) {
            c.layout = layout;
            c.initial = true;
            c.width = 8;
            c.length = length;
            c.channels = 5;
          }));
    }
    rows.push_back(with(prefix + "packed_initial_without_silu", [&](Case& c) {
      c.layout = layout;
      c.packed = true;
      c.initial = true;
      c.silu = false;
    }));
    rows.push_back(with(prefix + "packed_initial_width_8_across_tiles", [&](Case& c) {
      c.layout = layout;
      c.packed = true;
      c.initial = true;
      c.open_end = true;
      c.width = 8;
      c.length = 1100;
      c.channels = 3;
    }));
    rows.push_back(with(prefix + "initial_without_silu", [&](Case& c) {
      c.layout = layout;
      c.initial = true;
      c.silu = false;
    }));
    rows.push_back(with(prefix + "packed_without_silu", [&](Case& c) {
      c.layout = layout;
      c.packed = true;
      c.silu = false;
    }));
    rows.push_back(with(prefix + "packed_across_tiles", [&](Case& c) {
      c.layout = layout;
      c.packed = true;
      c.length = 1100;
      c.channels = 3;
    }));
    for (const std::int64_t length : {1, 2, 3, 600}) {
      rows.push_back(with(prefix + "initial_length_" + std::to_string(length), [&](Case& c) {
        c.layout = layout;
        c.initial = true;
        c.length = length;
        c.channels = 5;
      }));
    }
  }
  for (const auto& [name, layout] : {std::pair{"slice", Layout::channel_last_slice},
                                     std::pair{"misaligned", Layout::channel_last_misaligned}}) {
    const Layout of_row = layout;
    rows.push_back(with(std::string("channel_last_") + name, [&](Case& c) {
      c.layout = of_row;
      c.channels = 40;
    }));
    for (const std::int64_t width : {4, 6}) {
      rows.push_back(
          with(std::string("channel_last_initial_") + name + "_width_" + std::to_string(width),
               [&](Case& c) {
                 c.layout = of_row;
                 c.channels = 40;
                 c.initial = true;
                 c.width = width;
               }));
    }
  }
  return rows;
}

// (B, D, L) in the row's layout; a written tensor is not expanded.
Shape shape_of(const Case& c, std::int64_t length, bool written = false) {
  const std::int64_t D = c.channels, L = length;
  const std::vector<std::int64_t> sizes = {c.batch, D, L};
  switch (c.layout) {
    case Layout::channel_first:
      break;
    case Layout::channel_first_slice:
      return {sizes, {(D + 5) * L, L, 1}, 3 * L};
    case Layout::channel_last:
      return {sizes, {D * L, 1, D}};
    case Layout::channel_last_slice:
      return {sizes, {(D + 24) * L, 1, D + 24}, 8};
    case Layout::channel_last_misaligned:
      return {sizes, {(D + 3) * L, 1, D + 3}, 1};
    case Layout::every_other_step:
      return {sizes, {2 * D * L, 2 * L, 2}};
    case Layout::expanded:
      if (!written) {
        return {sizes, {L, 0, 1}};
      }
      break;
  }
  return {sizes};
}

// Sequences of many lengths, one of a single token, padding between and behind them; a number that
// comes back later is another sequence as far as taps can see.
Values packed_indices(std::int64_t batch, std::int64_t length, bool open_end) {
  Values indices;
  const int lengths[] = {1, 4, 2, 9, 3, 17, 1, 1, 30};
  for (std::int64_t b = 0; b < batch; ++b) {
    std::size_t i = static_cast<std::size_t>(b);
    int left = 0;
    double index = 0;
    for (std::int64_t t = 0; t < length; ++t) {
      if (left == 0) {
        left = lengths[i % 9];
        index = i % 4 == 3 ? -1.0 - static_cast<double>(i % 3) : static_cast<double>(i % 5);
        ++i;
      }
      indices.push_back(t + 5 >= length && !open_end ? -1.0 : index);
      --left;
    }
  }
  return indices;
}

struct Problem {
  Case row;
  DType dtype = DType::f32;
  Tensor x, weight, bias, seq_idx, initial, dout, dfinal;

  // A copy, in float64 or as it is.
  Problem to(bool exact, Device device) const {
    const auto copy = [&](const Tensor& tensor) {
      return tensor.to(exact ? DType::f64 : tensor.dtype(), device);
    };
    return {row,         exact ? DType::f64 : dtype,     copy(x),       copy(weight),
            copy(bias),  seq_idx.to(DType::i32, device), copy(initial), copy(dout),
            copy(dfinal)};
  }
};

Problem make(const Case& c, DType dtype, unsigned seed = 1) {
  std::mt19937 random(seed);
  const auto uniform = [&](DType type, const Shape& shape) {
    return Tensor::uniform(random, type, test::kCpu, shape, -1.5, 1.5);
  };
  const DType weight_dtype = dtype == DType::f64 ? dtype : c.weight;
  Problem p;
  p.row = c;
  p.dtype = dtype;
  p.x = uniform(dtype, shape_of(c, c.length));
  Shape weight{{c.channels, c.width}};
  if (c.weight_transposed) {
    weight.strides = {1, c.channels};
  }
  p.weight = uniform(weight_dtype, weight);
  if (c.bias) {
    p.bias = uniform(weight_dtype, {{c.channels}});
  }
  Shape dout = shape_of(c, c.length);
  if (c.dout_expanded) {
    dout = {dout.sizes, {0, 0, 0}};
  }
  p.dout = uniform(dtype, dout);
  if (c.initial) {
    p.initial = uniform(dtype, shape_of(c, c.width - 1));
  }
  if (c.initial || c.packed) {
    p.dfinal = uniform(dtype, shape_of(c, c.width - 1));
  }
  if (c.packed) {
    const Values indices = packed_indices(c.batch, c.length, c.open_end);
    p.seq_idx = Tensor::from_values(DType::i32, test::kCpu, {{c.batch, c.length}}, indices);
    for (Tensor* tensor : {&p.x, &p.dout}) {
      Values values = tensor->values();
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::size_t L = static_cast<std::size_t>(c.length);
        const std::size_t D = static_cast<std::size_t>(c.channels);
        if (indices[i / (D * L) * L + i % L] < 0) {
          values[i] = kNaN;
        }
      }
      *tensor = Tensor::from_values(dtype, test::kCpu, tensor->shape(), values);
    }
    // States that belong to no sequence: NaN as well.
    Values initial = p.initial.values(), dfinal = p.dfinal.values();
    const std::int64_t states = c.width - 1;
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(dfinal.size()); ++i) {
      const std::int64_t row = i / (c.channels * states) * c.length;
      const std::int64_t column = std::max<std::int64_t>(c.length - states + i % states, 0);
      const double first = indices[static_cast<std::size_t>(row)];
      const double last = indices[static_cast<std::size_t>(row + c.length - 1)];
      if (c.initial && first < 0) {
        initial[static_cast<std::size_t>(i)] = kNaN;
      }
      if (last < 0 || indices[static_cast<std::size_t>(row + column)] != last) {
        dfinal[static_cast<std::size_t>(i)] = kNaN;
      }
    }
    if (c.initial) {
      p.initial = Tensor::from_values(dtype, test::kCpu, p.initial.shape(), initial);
    }
    p.dfinal = Tensor::from_values(dtype, test::kCpu, p.dfinal.shape(), dfinal);
  }
  return p;
}

// ---- and by whom ----

struct Kernels {
  std::function<void(const ForwardParams&)> forward;
  std::function<void(const BackwardParams&)> backward;
  std::function<void(const UpdateParams&)> update;
};

template <class Scalar>
Kernels reference_kernels() {
  return {&reference::forward<Scalar>, &reference::backward<Scalar>, &reference::update<Scalar>};
}

const Kernels kPublic = {&forward, &backward, &update};

Kernels kernels_of(const Target& target) {
  return {test::on<ForwardParams>(target, &forward, &cpu::forward),
          test::on<BackwardParams>(target, &backward, &cpu::backward),
          test::on<UpdateParams>(target, &update, &cpu::update)};
}

struct Result {
  Tensor out, final_states, dx, dweight, dbias, dinitial;
};

Inputs inputs_of(const Problem& p) {
  Inputs in;
  in.x = p.x.view();
  in.weight = p.weight.view();
  in.bias = p.bias.view();
  in.seq_idx = p.seq_idx.view();
  in.initial_states = p.initial.view();
  in.silu = p.row.silu;
  return in;
}

void run_forward(const Problem& p, Device device, const Kernels& kernels, Result& result) {
  const Case& c = p.row;
  result.out = Tensor(p.dtype, device, shape_of(c, c.length, true));
  result.final_states = Tensor(p.dtype, device, shape_of(c, c.width - 1, true));
  ForwardParams params;
  params.in = inputs_of(p);
  params.out = result.out.view();
  params.final_states = result.final_states.view();
  kernels.forward(params);
}

void run_backward(const Problem& p, Device device, const Kernels& kernels, Result& result) {
  const Case& c = p.row;
  const DType sum = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  result.dx = Tensor(p.dtype, device, shape_of(c, c.length, true));
  result.dweight = Tensor(sum, device, {{c.channels, c.width}});
  if (p.bias.present()) {
    result.dbias = Tensor(sum, device, {{c.channels}});
  }
  if (p.initial.present()) {
    result.dinitial = Tensor(p.dtype, device, shape_of(c, c.width - 1, true));
  }
  BackwardParams params;
  params.in = inputs_of(p);
  params.dout = p.dout.view();
  params.dfinal_states = p.dfinal.view();
  params.dx = result.dx.view();
  params.dweight = result.dweight.view();
  params.dbias = result.dbias.view();
  params.dinitial_states = result.dinitial.view();
  Tensor workspace;
  if (c.ordered) {
    workspace = Tensor(DType::f32, device, {{workspace_rows(params.in), c.channels, c.width + 1}});
    params.workspace = workspace.view();
  }
  kernels.backward(params);
}

Result run(const Problem& problem, bool exact, Device device, const Kernels& kernels) {
  const Problem p = problem.to(exact, device);
  Result result;
  run_forward(p, device, kernels, result);
  run_backward(p, device, kernels, result);
  return result;
}

struct Expected {
  explicit Expected(const Problem& p)
      : truth(run(p, true, test::kCpu, reference_kernels<double>())),
        yardstick(run(p, false, test::kCpu, reference_kernels<float>())) {}
  Result truth, yardstick;
};

testing::AssertionResult close(const char* op, const char* output, DType dtype, const Tensor& got,
                               const Tensor& truth, const Tensor& yardstick, double slack) {
  if (!truth.present()) {
    return testing::AssertionSuccess();
  }
  return test::is_close(op, dtype, output, got.dtype(), got.values(), truth.values(),
                        yardstick.values(), slack);
}

// Every output of both directions that is not as close as it must be.
testing::AssertionResult all_close(const Result& got, const Expected& expected, DType dtype) {
  constexpr char kForward[] = "causal_conv1d_forward";
  constexpr char kBackward[] = "causal_conv1d_backward";
  const Result& truth = expected.truth;
  const Result& yardstick = expected.yardstick;
  const double sum_slack = got.dweight.device().is_cuda()
                               ? test::kGradientSlack * test::kAtomicSlack
                               : test::kGradientSlack;
  testing::AssertionResult results[] = {
      close(kForward, "out", dtype, got.out, truth.out, yardstick.out, test::kForwardSlack),
      close(kBackward, "dx", dtype, got.dx, truth.dx, yardstick.dx, test::kGradientSlack),
      close(kBackward, "dweight", dtype, got.dweight, truth.dweight, yardstick.dweight, sum_slack),
      close(kBackward, "dbias", dtype, got.dbias, truth.dbias, yardstick.dbias, sum_slack),
      close(kBackward, "dinitial_states", dtype, got.dinitial, truth.dinitial, yardstick.dinitial,
            test::kGradientSlack),
  };
  testing::AssertionResult all = testing::AssertionSuccess();
  for (const testing::AssertionResult& result : results) {
    if (!result) {
      all = (all ? testing::AssertionFailure() : all) << result.message() << "\n";
    }
  }
  return all;
}

// A row's weight may be of another dtype.
template <class Case>
class WeightedRowTest : public test::RowTest<Case> {
 protected:
  void SetUp() override {
    test::RowTest<Case>::SetUp();
    test::require({test::unavailable(this->GetParam().problem.weight)});
  }
};

using CausalConv1d = WeightedRowTest<Case>;

TEST_P(CausalConv1d, MatchesTheOracle) {
  const auto& [target, dtype, row] = GetParam();
  const Problem p = make(row, dtype);
  const Expected expected(p);
  const Result got = run(p, false, target.device, kernels_of(target));
  EXPECT_TRUE(all_close(got, expected, dtype));
  EXPECT_EQ(got.final_states.values(), expected.truth.final_states.values());
}

INSTANTIATE_TEST_SUITE_P(Star, CausalConv1d, testing::ValuesIn(test::rows(star())),
                         test::row_name<Case>);

class CausalConv1dTarget : public test::TargetTest {
 protected:
  Device device() const { return GetParam().device; }
  Kernels kernels() const { return kernels_of(GetParam()); }
};

// An implementation that forgot a term must not pass: each is dropped here in turn, on its side
// only.
TEST_P(CausalConv1dTarget, NoticesADroppedTerm) {
  const struct {
    const char* term;
    bool packed;
    std::function<void(Inputs&, BackwardParams&)> drop;
  } mutations[] = {
      {"oldest tap", false, [](Inputs& in, BackwardParams&) { in.weight.stride[1] = 0; }},
      {"silu", false, [](Inputs& in, BackwardParams&) { in.silu = false; }},
      {"bias", false, [](Inputs& in, BackwardParams&) { in.bias.stride[0] = 0; }},
      {"initial_states", false,
       [](Inputs& in, BackwardParams&) { in.initial_states.stride[2] = 0; }},
      {"dfinal_states", false, [](Inputs&, BackwardParams& p) { p.dfinal_states = TensorView(); }},
      {"seq_idx", true, [](Inputs& in, BackwardParams&) { in.seq_idx.stride[1] = 0; }},
  };
  for (const Layout layout : {Layout::channel_first, Layout::channel_last}) {
    for (const bool packed : {false, true}) {
      const Problem p = make(with("mutation",
                                  [&](Case& c) {
                                    c.layout = layout;
                                    c.initial = !packed;
                                    c.packed = packed;
                                  }),
                             DType::f32);
      const Expected expected(p);
      const Kernels kernels = this->kernels();
      EXPECT_TRUE(all_close(run(p, false, device(), kernels), expected, DType::f32));
      for (const auto& mutation : mutations) {
        if (mutation.packed != packed) {
          continue;
        }
        const Kernels mutated = {[&](const ForwardParams& params) {
                                   ForwardParams changed = params;
                                   BackwardParams unused;
                                   mutation.drop(changed.in, unused);
                                   kernels.forward(changed);
                                 },
                                 [&](const BackwardParams& params) {
                                   BackwardParams changed = params;
                                   mutation.drop(changed.in, changed);
                                   kernels.backward(changed);
                                 },
                                 kernels.update};
        EXPECT_FALSE(all_close(run(p, false, device(), mutated), expected, DType::f32))
            << mutation.term;
      }
    }
  }
}

TEST_P(CausalConv1dTarget, SplitWithCarriedStatesIsTheWhole) {
  for (const Layout layout : {Layout::channel_first, Layout::channel_last}) {
    const Problem p = make(with("split",
                                [&](Case& c) {
                                  c.layout = layout;
                                  c.initial = true;
                                }),
                           DType::f32)
                          .to(false, device());
    Result whole, parts;
    run_forward(p, device(), kernels(), whole);
    parts.out = Tensor(DType::f32, device(), whole.out.shape());
    Tensor carried = p.initial;
    std::int64_t begin = 0;
    for (const std::int64_t end : {1, 3, 40, 61}) {
      ForwardParams params;
      params.in = inputs_of(p);
      params.out = parts.out.view();
      for (TensorView* view : {&params.in.x, &params.out}) {
        view->data = view->as<float>() + begin * view->stride[2];
        view->size[2] = end - begin;
      }
      params.in.initial_states = carried.view();
      const Tensor next(DType::f32, device(), carried.shape());
      params.final_states = next.view();
      kernels().forward(params);
      carried = next;
      begin = end;
    }
    EXPECT_EQ(carried.values(), whole.final_states.values());
    const Values expected = whole.out.values();
    const Values got = parts.out.values();
    for (std::size_t i = 0; i < expected.size(); ++i) {
      ASSERT_NEAR(got[i], expected[i], 1e-6) << i;
    }
  }
}

TEST_P(CausalConv1dTarget, PackedIsEverySequenceByItself) {
  for (const Layout layout : {Layout::channel_first, Layout::channel_last}) {
    const Problem p = make(with("packed",
                                [&](Case& c) {
                                  c.layout = layout;
                                  c.packed = true;
                                  c.batch = 1;
                                  c.length = 83;
                                }),
                           DType::f32)
                          .to(false, device());
    Result packed, alone;
    run_forward(p, device(), kernels(), packed);
    run_backward(p, device(), kernels(), packed);
    const Values indices = p.seq_idx.values();
    Values dweight(static_cast<std::size_t>(p.row.channels * p.row.width), 0.0);
    alone.out = Tensor(DType::f32, device(), packed.out.shape());
    alone.dx = Tensor(DType::f32, device(), packed.out.shape());
    for (std::size_t begin = 0; begin < indices.size();) {
      std::size_t end = begin;
      while (end < indices.size() && indices[end] == indices[begin]) {
        ++end;
      }
      if (indices[begin] >= 0) {
        const auto cut = [&](TensorView view) {
          view.data = view.as<float>() + static_cast<std::int64_t>(begin) * view.stride[2];
          view.size[2] = static_cast<std::int64_t>(end - begin);
          return view;
        };
        const Tensor part(DType::f32, device(), {{p.row.channels, p.row.width}});
        const Tensor dbias(DType::f32, device(), {{p.row.channels}});
        ForwardParams forward_params;
        forward_params.in = inputs_of(p);
        forward_params.in.seq_idx = TensorView();
        forward_params.in.x = cut(p.x.view());
        forward_params.out = cut(alone.out.view());
        kernels().forward(forward_params);
        BackwardParams backward_params;
        backward_params.in = forward_params.in;
        backward_params.dout = cut(p.dout.view());
        backward_params.dx = cut(alone.dx.view());
        backward_params.dweight = part.view();
        backward_params.dbias = dbias.view();
        kernels().backward(backward_params);
        const Values values = part.values();
        for (std::size_t i = 0; i < values.size(); ++i) {
          dweight[i] += values[i];
        }
      }
      begin = end;
    }
    const Values packed_out = packed.out.values(), packed_dx = packed.dx.values();
    const Values alone_out = alone.out.values(), alone_dx = alone.dx.values();
    for (std::size_t i = 0; i < packed_out.size(); ++i) {
      if (indices[i % indices.size()] < 0) {
        ASSERT_EQ(packed_out[i], 0.0) << i;
        ASSERT_EQ(packed_dx[i], 0.0) << i;
      } else {
        ASSERT_NEAR(packed_out[i], alone_out[i], 1e-6) << i;
        ASSERT_NEAR(packed_dx[i], alone_dx[i], 4e-6) << i;
      }
    }
    const Values packed_dweight = packed.dweight.values();
    for (std::size_t i = 0; i < dweight.size(); ++i) {
      ASSERT_NEAR(packed_dweight[i], dweight[i], 1e-4) << i;
    }
  }
}

TEST_P(CausalConv1dTarget, EmptySizes) {
  for (const Layout layout : {Layout::channel_first, Layout::channel_last}) {
    const Kernels& kernels = kPublic;
    const Problem empty_batch = make(with("empty",
                                          [&](Case& c) {
                                            c.layout = layout;
                                            c.batch = 0;
                                          }),
                                     DType::f32);
    Result result = run(empty_batch, false, device(), kernels);
    EXPECT_EQ(result.out.values().size(), 0u);
    EXPECT_EQ(result.dweight.values(), Values(19 * 4, 0.0));
    EXPECT_EQ(result.dbias.values(), Values(19, 0.0));

    const Problem no_channels = make(with("empty",
                                          [&](Case& c) {
                                            c.layout = layout;
                                            c.channels = 0;
                                          }),
                                     DType::f32);
    EXPECT_EQ(run(no_channels, false, device(), kernels).out.values().size(), 0u);

    const Problem no_steps = make(with("empty",
                                       [&](Case& c) {
                                         c.layout = layout;
                                         c.length = 0;
                                         c.initial = true;
                                       }),
                                  DType::f32);
    result = run(no_steps, false, device(), kernels);
    EXPECT_EQ(result.final_states.values(), no_steps.initial.values());
    EXPECT_EQ(result.dinitial.values(), no_steps.dfinal.values());
    EXPECT_EQ(result.dweight.values(), Values(19 * 4, 0.0));

    const Problem nothing_at_all = make(with("empty",
                                             [&](Case& c) {
                                               c.layout = layout;
                                               c.length = 0;
                                             }),
                                        DType::f32);
    result = run(nothing_at_all, false, device(), kernels);
    EXPECT_EQ(result.final_states.values(), Values(2 * 19 * 3, 0.0));

    Problem packed = make(with("empty",
                               [&](Case& c) {
                                 c.layout = layout;
                                 c.length = 0;
                                 c.initial = true;
                                 c.width = 6;
                               }),
                          DType::f32);
    packed.seq_idx = Tensor(DType::i32, test::kCpu, {{packed.row.batch, 0}});
    result = run(packed, false, device(), kernels);
    EXPECT_EQ(result.final_states.values(), packed.initial.values());
    EXPECT_EQ(result.dinitial.values(), packed.dfinal.values());
    EXPECT_EQ(result.dweight.values(), Values(19 * 6, 0.0));

    Problem ordered = empty_batch;
    ordered.row.ordered = true;
    result = run(ordered, false, device(), kernels);
    EXPECT_EQ(result.dweight.values(), Values(19 * 4, 0.0));
    EXPECT_EQ(result.dbias.values(), Values(19, 0.0));
  }
}

// A packed row in pieces, each cut inside a sequence: what the states carry over is all that the
// next piece needs.
TEST_P(CausalConv1dTarget, PackedSplitWithCarriedStatesIsTheWhole) {
  for (const Layout layout : {Layout::channel_first, Layout::channel_last}) {
    for (const std::int64_t width : {4, 8}) {
      Problem host = make(with("packed_split",
                               [&](Case& c) {
                                 c.layout = layout;
                                 c.initial = true;
                                 c.width = width;
                                 c.length = 40;
                               }),
                          DType::f32);
      Values indices;
      for (int i = 0; i < 2 * 40; ++i) {
        const int t = i % 40;
        indices.push_back(t < 6 ? 0 : t < 20 ? 1 : t < 22 ? -1 : 2);
      }
      host.seq_idx = Tensor::from_values(DType::i32, test::kCpu, {{2, 40}}, indices);
      const Problem p = host.to(false, device());
      Result whole, parts;
      run_forward(p, device(), kernels(), whole);
      parts.out = Tensor(DType::f32, device(), whole.out.shape());
      Tensor carried = p.initial;
      std::int64_t begin = 0;
      for (const std::int64_t end : {1, 3, 8, 9, 17, 25, 40}) {
        ForwardParams params;
        params.in = inputs_of(p);
        params.out = parts.out.view();
        for (TensorView* view : {&params.in.x, &params.out}) {
          view->data = view->as<float>() + begin * view->stride[2];
          view->size[2] = end - begin;
        }
        params.in.seq_idx.data = params.in.seq_idx.as<std::int32_t>() + begin;
        params.in.seq_idx.size[1] = end - begin;
        params.in.initial_states = carried.view();
        const Tensor next(DType::f32, device(), carried.shape());
        params.final_states = next.view();
        kernels().forward(params);
        carried = next;
        begin = end;
      }
      EXPECT_EQ(carried.values(), whole.final_states.values());
      const Values expected = whole.out.values();
      const Values got = parts.out.values();
      for (std::size_t i = 0; i < expected.size(); ++i) {
        ASSERT_NEAR(got[i], expected[i], 1e-6) << i;
      }
    }
  }
}

TEST_P(CausalConv1dTarget, OrderedSumsAreTheSameBitsInEveryRun) {
  for (const Layout layout : {Layout::channel_first, Layout::channel_last}) {
    for (const std::int64_t width : {4, 6}) {
      const Problem p = make(with("ordered",
                                  [&](Case& c) {
                                    c.layout = layout;
                                    c.width = width;
                                    c.ordered = true;
                                    c.batch = 37;
                                    c.channels = 40;
                                    c.length = 1300;
                                  }),
                             DType::f32)
                            .to(false, device());
      Result first;
      run_backward(p, device(), kernels(), first);
      for (int i = 0; i < 5; ++i) {
        Result again;
        run_backward(p, device(), kernels(), again);
        EXPECT_EQ(again.dweight.bytes(), first.dweight.bytes());
        EXPECT_EQ(again.dbias.bytes(), first.dbias.bytes());
        EXPECT_EQ(again.dx.bytes(), first.dx.bytes());
      }
    }
  }
}

TEST_P(CausalConv1dTarget, ResultsDoNotDependOnThreads) {
  if (device().is_cuda()) {
    GTEST_SKIP() << "about the CPU's threads";
  }
  for (const Layout layout : {Layout::channel_first, Layout::channel_last}) {
    const Problem p = make(with("threads",
                                [&](Case& c) {
                                  c.layout = layout;
                                  c.channels = 300;
                                  c.length = 600;
                                }),
                           DType::f32);
    set_num_threads(1);
    const Result one = run(p, false, device(), kernels());
    set_num_threads(3);
    const Result three = run(p, false, device(), kernels());
    set_num_threads(0);
    EXPECT_EQ(one.out.bytes(), three.out.bytes());
    EXPECT_EQ(one.dx.bytes(), three.dx.bytes());
    EXPECT_EQ(one.dweight.bytes(), three.dweight.bytes());
  }
}

// ---- update ----

struct DecodeCase {
  std::string name;
  std::int64_t batch = 3;
  std::int64_t channels = 85;  // enough values for a mean square error to mean something
  std::int64_t tokens = 1;
  std::int64_t width = 4;
  std::int64_t state_len = 6;
  bool bias = true;
  bool silu = true;
  bool circular = false;
  bool gathered = false;      // rows of a pool, one of them padding
  bool channel_last = false;  // conv_state, and x of several tokens
  DType weight = DType::f32;
};

DecodeCase decode_with(const std::string& name, const std::function<void(DecodeCase&)>& change) {
  DecodeCase row;
  row.name = name;
  change(row);
  return row;
}

std::vector<DecodeCase> decode_star() {
  std::vector<DecodeCase> rows = {
      decode_with("base", [](DecodeCase&) {}),
      decode_with("width_2", [](DecodeCase& c) { c.width = 2; }),
      decode_with("width_3", [](DecodeCase& c) { c.width = 3; }),
      decode_with("no_bias", [](DecodeCase& c) { c.bias = false; }),
      decode_with("no_silu", [](DecodeCase& c) { c.silu = false; }),
      decode_with("many_channels", [](DecodeCase& c) { c.channels = 300; }),
      decode_with("batch_beyond_the_grid",
                  [](DecodeCase& c) {
                    c.batch = 65537;
                    c.channels = 1;
                  }),
      decode_with("channel_last", [](DecodeCase& c) { c.channel_last = true; }),
      decode_with("weight_f16", [](DecodeCase& c) { c.weight = DType::f16; }),
      decode_with("weight_bf16", [](DecodeCase& c) { c.weight = DType::bf16; }),
      decode_with("width_8_weight_bf16",
                  [](DecodeCase& c) {
                    c.width = 8;
                    c.state_len = 7;
                    c.weight = DType::bf16;
                  }),
  };
  for (const std::int64_t width : {5, 6, 7, 8}) {
    for (const bool circular : {false, true}) {
      for (const std::int64_t tokens : {1, 3, 20}) {  // of which a row of the buffer holds 11
        rows.push_back(decode_with(std::string(circular ? "circular_gathered" : "linear") +
                                       "_width_" + std::to_string(width) + "_tokens_" +
                                       std::to_string(tokens),
                                   [&](DecodeCase& c) {
                                     c.circular = circular;
                                     c.gathered = circular;
                                     c.width = width;
                                     c.tokens = tokens;
                                     c.state_len = tokens == 1 ? width - 1 : 11;
                                   }));
      }
    }
  }
  for (const bool circular : {false, true}) {
    for (const bool gathered : {false, true}) {
      for (const std::int64_t tokens : {1, 2, 5, 9}) {
        for (const std::int64_t state_len : {3, 4, 7}) {
          rows.push_back(decode_with(
              std::string(circular ? "circular" : "linear") + (gathered ? "_gathered" : "") +
                  "_tokens_" + std::to_string(tokens) + "_state_" + std::to_string(state_len),
              [&](DecodeCase& c) {
                c.circular = circular;
                c.gathered = gathered;
                c.tokens = tokens;
                c.state_len = state_len;
                c.channel_last = gathered;
              }));
        }
      }
    }
  }
  return rows;
}

struct DecodeProblem {
  DecodeCase row;
  DType dtype = DType::f32;
  Tensor x, state, weight, bias, seqlens, indices;

  DecodeProblem to(bool exact, Device device) const {
    const auto copy = [&](const Tensor& tensor) {
      return tensor.to(exact ? DType::f64 : tensor.dtype(), device);
    };
    return {row,
            exact ? DType::f64 : dtype,
            copy(x),
            copy(state),
            copy(weight),
            copy(bias),
            seqlens.to(DType::i32, device),
            indices.to(DType::i32, device)};
  }
};

DecodeProblem make(const DecodeCase& c, DType dtype) {
  std::mt19937 random(7);
  const auto uniform = [&](DType type, const Shape& shape) {
    return Tensor::uniform(random, type, test::kCpu, shape, -1.5, 1.5);
  };
  const std::int64_t entries = c.gathered ? 2 * c.batch + 1 : c.batch;
  const std::int64_t B = c.batch, D = c.channels, S = c.tokens, N = c.state_len;
  DecodeProblem p;
  p.row = c;
  p.dtype = dtype;
  p.x = uniform(dtype, c.channel_last ? Shape{{B, D, S}, {D * S, 1, D}} : Shape{{B, D, S}});
  p.state = uniform(dtype, c.channel_last ? Shape{{entries, D, N}, {(D + 4) * N, 1, D + 4}, 3}
                                          : Shape{{entries, D, N}});
  p.weight = uniform(c.weight, {{D, c.width}});
  if (c.bias) {
    p.bias = uniform(c.weight, {{D}});
  }
  if (c.circular) {
    Values seqlens;
    for (std::int64_t b = 0; b < B; ++b) {
      seqlens.push_back(b == 0 ? 0.0 : b == 1 ? 2.0 : 2147483640.0);
    }
    p.seqlens = Tensor::from_values(DType::i32, test::kCpu, {{B}}, seqlens);
  }
  if (c.gathered) {
    Values indices;
    for (std::int64_t b = 0; b < B; ++b) {
      indices.push_back(b == 1 ? -4.0 : static_cast<double>(2 * (B - b)));
    }
    p.indices = Tensor::from_values(DType::i32, test::kCpu, {{B}}, indices);
  }
  return p;
}

UpdateParams params_of(const DecodeProblem& p, const Tensor& out) {
  UpdateParams params;
  params.x = p.x.view();
  params.conv_state = p.state.view();
  params.weight = p.weight.view();
  params.bias = p.bias.view();
  params.cache_seqlens = p.seqlens.view();
  params.conv_state_indices = p.indices.view();
  params.out = out.view();
  params.silu = p.row.silu;
  return params;
}

// `p` is used up: its state is changed.
Tensor run_update(const DecodeProblem& p, Device device, const Kernels& kernels) {
  const Tensor out(p.dtype, device, p.x.shape());
  kernels.update(params_of(p, out));
  return out;
}

using CausalConv1dUpdate = WeightedRowTest<DecodeCase>;

TEST_P(CausalConv1dUpdate, MatchesTheOracle) {
  const auto& [target, dtype, row] = GetParam();
  const DecodeProblem p = make(row, dtype);
  const DecodeProblem exact = p.to(true, test::kCpu);
  const DecodeProblem rounded = p.to(false, test::kCpu);
  const DecodeProblem tested = p.to(false, target.device);
  const Tensor truth = run_update(exact, test::kCpu, reference_kernels<double>());
  const Tensor yardstick = run_update(rounded, test::kCpu, reference_kernels<float>());
  const Tensor got = run_update(tested, target.device, kernels_of(target));
  EXPECT_TRUE(
      close("causal_conv1d_update", "out", dtype, got, truth, yardstick, test::kForwardSlack));
  EXPECT_EQ(tested.state.bytes(), rounded.state.bytes()) << "state";
  if (row.gathered) {  // sequence 1 is padding
    const Values out = got.values();
    const std::size_t size = static_cast<std::size_t>(row.channels * row.tokens);
    EXPECT_EQ(Values(out.begin() + size, out.begin() + 2 * size), Values(size, 0.0));
  }
}

INSTANTIATE_TEST_SUITE_P(Star, CausalConv1dUpdate, testing::ValuesIn(test::rows(decode_star())),
                         test::row_name<DecodeCase>);

TEST_P(CausalConv1dTarget, StepByStepIsTheWhole) {
  for (const bool circular : {false, true}) {
    const Problem p =
        make(with("steps", [](Case& c) { c.length = 13; }), DType::f32).to(false, device());
    Result whole;
    run_forward(p, device(), kernels(), whole);
    const std::int64_t B = p.row.batch, D = p.row.channels, L = p.row.length;
    const Values expected = whole.out.values();
    const std::size_t states = static_cast<std::size_t>(B * D * 5);
    const Tensor state =
        Tensor::from_values(DType::f32, device(), {{B, D, 5}}, Values(states, 0.0));
    for (std::int64_t t = 0; t < L; ++t) {
      const Tensor out(DType::f32, device(), {{B, D, 1}});
      const Tensor seqlens = Tensor::from_values(
          DType::i32, device(), {{B}}, Values(static_cast<std::size_t>(B), static_cast<double>(t)));
      UpdateParams params;
      params.x = p.x.view();
      params.x.data = params.x.as<float>() + t * params.x.stride[2];
      params.x.size[2] = 1;
      params.conv_state = state.view();
      params.weight = p.weight.view();
      params.bias = p.bias.view();
      params.cache_seqlens = circular ? seqlens.view() : TensorView();
      params.out = out.view();
      params.silu = p.row.silu;
      kernels().update(params);
      const Values got = out.values();
      for (std::int64_t i = 0; i < B * D; ++i) {
        ASSERT_NEAR(got[static_cast<std::size_t>(i)], expected[static_cast<std::size_t>(i * L + t)],
                    1e-6)
            << t;
      }
    }
  }
}

// ---- states of packed sequences ----

TEST_P(CausalConv1dTarget, VarlenStatesAreTheLastTokens) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const DType index : {DType::i32, DType::i64}) {
      if (!test::unavailable(dtype).empty()) {
        continue;
      }
      // Tokens 1 to 7 of channel 0, ten times as much of channel 1: lengths 2, 0, 4, 1.
      Values tokens;
      for (int t = 1; t <= 7; ++t) {
        tokens.push_back(t);
        tokens.push_back(10 * t);
      }
      const Tensor x = Tensor::from_values(dtype, device(), {{7, 2}, {5, 2}, 1}, tokens);
      const Tensor cu_seqlens = Tensor::from_values(index, device(), {{5}}, {0, 2, 2, 6, 7});
      const Tensor states(dtype, device(), {{4, 2, 3}, {6, 1, 2}});
      VarlenStatesParams params;
      params.x = x.view();
      params.cu_seqlens = cu_seqlens.view();
      params.states = states.view();
      varlen_states(params);
      const Values expected = {0, 1, 2, 0,  10, 20,  //
                               0, 0, 0, 0,  0,  0,   //
                               4, 5, 6, 40, 50, 60,  //
                               0, 0, 7, 0,  0,  70};
      EXPECT_EQ(states.values(), expected);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Every, CausalConv1dTarget, testing::ValuesIn(test::kTargets),
                         test::target_name);

// ---- the oracle ----

Tensor tensor(std::vector<std::int64_t> sizes, const Values& values) {
  return Tensor::from_values(DType::f64, test::kCpu, {std::move(sizes)}, values);
}

TEST(CausalConv1dOracle, ForwardByHand) {
  // Width 2 with a column before the sequence: p = 0.5 + 10 x[t-1] + x[t].
  const Tensor x = tensor({1, 1, 3}, {1, 2, 3});
  const Tensor weight = tensor({1, 2}, {10, 1});
  const Tensor bias = tensor({1}, {0.5});
  const Tensor initial = tensor({1, 1, 1}, {4});
  const Tensor out(DType::f64, test::kCpu, {{1, 1, 3}});
  const Tensor final_states(DType::f64, test::kCpu, {{1, 1, 1}});
  ForwardParams params;
  params.in.x = x.view();
  params.in.weight = weight.view();
  params.in.bias = bias.view();
  params.in.initial_states = initial.view();
  params.out = out.view();
  params.final_states = final_states.view();
  forward(params);
  EXPECT_EQ(out.values(), (Values{41.5, 12.5, 23.5}));
  EXPECT_EQ(final_states.values(), Values{3});

  params.in.silu = true;
  forward(params);
  EXPECT_DOUBLE_EQ(out.values()[1], 12.5 / (1 + std::exp(-12.5)));
}

TEST(CausalConv1dOracle, SeqIdxByHand) {
  // Width 3, weights 100, 10, 1; sequences 0 0 | 1 | padding | 0: the last 0 does not see the
  // first.
  const Tensor x = tensor({1, 1, 5}, {1, 2, 3, 4, 5});
  const Tensor weight = tensor({1, 3}, {100, 10, 1});
  const Tensor seq_idx = Tensor::from_values(DType::i32, test::kCpu, {{1, 5}}, {0, 0, 1, -1, 0});
  const Tensor out(DType::f64, test::kCpu, {{1, 1, 5}});
  ForwardParams params;
  params.in.x = x.view();
  params.in.weight = weight.view();
  params.in.seq_idx = seq_idx.view();
  params.out = out.view();
  forward(params);
  EXPECT_EQ(out.values(), (Values{1, 12, 3, 0, 5}));

  // dx[t] collects weight of the outputs that saw t: dout = 1 everywhere.
  const Tensor dout = tensor({1, 1, 5}, {1, 1, 1, 1, 1});
  const Tensor dx(DType::f64, test::kCpu, {{1, 1, 5}});
  const Tensor dweight(DType::f64, test::kCpu, {{1, 3}});
  BackwardParams gradients;
  gradients.in = params.in;
  gradients.dout = dout.view();
  gradients.dx = dx.view();
  gradients.dweight = dweight.view();
  backward(gradients);
  EXPECT_EQ(dx.values(), (Values{11, 1, 1, 0, 1}));
  EXPECT_EQ(dweight.values(), (Values{0, 1, 11}));
}

TEST(CausalConv1dOracle, SeqIdxWithStatesByHand) {
  // Width 3, weights 100, 10, 1; columns 7 and 8 before sequences 0 0 | 1, of which they are the
  // first.
  const Tensor initial = tensor({1, 1, 2}, {7, 8});
  const Tensor x = tensor({1, 1, 3}, {1, 2, 3});
  const Tensor weight = tensor({1, 3}, {100, 10, 1});
  const Tensor seq_idx = Tensor::from_values(DType::i32, test::kCpu, {{1, 3}}, {0, 0, 1});
  const Tensor out(DType::f64, test::kCpu, {{1, 1, 3}});
  const Tensor final_states(DType::f64, test::kCpu, {{1, 1, 2}});
  ForwardParams params;
  params.in.x = x.view();
  params.in.weight = weight.view();
  params.in.seq_idx = seq_idx.view();
  params.in.initial_states = initial.view();
  params.out = out.view();
  params.final_states = final_states.view();
  forward(params);
  EXPECT_EQ(out.values(), (Values{781, 812, 3}));
  EXPECT_EQ(final_states.values(), (Values{0, 3}));  // the next step of sequence 1 sees no 2

  // dout = 1: column 7 is seen by output 0, column 8 by outputs 0 and 1.
  const Tensor dout = tensor({1, 1, 3}, {1, 1, 1});
  const Tensor dfinal = tensor({1, 1, 2}, {1000, 2000});
  const Tensor dx(DType::f64, test::kCpu, {{1, 1, 3}});
  const Tensor dinitial(DType::f64, test::kCpu, {{1, 1, 2}});
  const Tensor dweight(DType::f64, test::kCpu, {{1, 3}});
  BackwardParams gradients;
  gradients.in = params.in;
  gradients.dout = dout.view();
  gradients.dfinal_states = dfinal.view();
  gradients.dx = dx.view();
  gradients.dweight = dweight.view();
  gradients.dinitial_states = dinitial.view();
  backward(gradients);
  EXPECT_EQ(dx.values(), (Values{11, 1, 2001}));
  EXPECT_EQ(dinitial.values(), (Values{100, 110}));
  EXPECT_EQ(dweight.values(), (Values{15, 9, 6}));

  // One step of sequence 0: of the columns before it the newer one stays.
  params.in.x.size[2] = params.in.seq_idx.size[1] = params.out.size[2] = 1;
  forward(params);
  EXPECT_EQ(final_states.values(), (Values{8, 1}));

  // Behind padding nothing is left.
  const Tensor padding = Tensor::from_values(DType::i32, test::kCpu, {{1, 1}}, {-1});
  params.in.seq_idx = padding.view();
  forward(params);
  EXPECT_EQ(final_states.values(), (Values{0, 0}));
}

TEST(CausalConv1dOracle, UpdateByHand) {
  const Tensor weight = tensor({1, 2}, {10, 1});
  const Tensor out(DType::f64, test::kCpu, {{1, 1, 2}});
  const Tensor x = tensor({1, 1, 2}, {4, 5});
  UpdateParams params;
  params.x = x.view();
  params.weight = weight.view();
  params.out = out.view();

  const Tensor linear = tensor({1, 1, 3}, {1, 2, 3});
  params.conv_state = linear.view();
  update(params);
  EXPECT_EQ(out.values(), (Values{34, 45}));
  EXPECT_EQ(linear.values(), (Values{3, 4, 5}));

  // Slot of token 0 is 5 mod 3 = 2; the column before it is slot 1; token 1 wraps to slot 0.
  const Tensor circular = tensor({1, 1, 3}, {1, 2, 3});
  const Tensor seqlens = Tensor::from_values(DType::i32, test::kCpu, {{1}}, {5});
  params.conv_state = circular.view();
  params.cache_seqlens = seqlens.view();
  update(params);
  EXPECT_EQ(out.values(), (Values{24, 45}));
  EXPECT_EQ(circular.values(), (Values{5, 2, 4}));
}

// sum(out dout) + sum(final_states dfinal): the number that backward differentiates.
double objective(const Problem& p) {
  Result result;
  run_forward(p, test::kCpu, kPublic, result);
  double sum = 0;
  const Values out = result.out.values(), dout = p.dout.values();
  for (std::size_t i = 0; i < out.size(); ++i) {
    sum += out[i] == 0 ? 0 : out[i] * dout[i];  // padding's dout is NaN
  }
  const Values final_states = result.final_states.values(), dfinal = p.dfinal.values();
  for (std::size_t i = 0; i < dfinal.size(); ++i) {
    sum += final_states[i] == 0 ? 0 : final_states[i] * dfinal[i];
  }
  return sum;
}

TEST(CausalConv1dOracle, BackwardIsTheFiniteDifference) {
  const Case cases[] = {
      with("silu", [](Case&) {}),
      with("linear", [](Case& c) { c.silu = false; }),
      with("width_2", [](Case& c) { c.width = 2; }),
      with("states", [](Case& c) { c.initial = true; }),
      with("states_longer_than_the_sequence",
           [](Case& c) {
             c.initial = true;
             c.length = 2;
           }),
      with("packed",
           [](Case& c) {
             c.packed = true;
             c.length = 30;
           }),
      with("packed_with_states",
           [](Case& c) {
             c.packed = true;
             c.open_end = true;
             c.initial = true;
             c.length = 30;
           }),
      with("packed_with_states_longer_than_the_sequence",
           [](Case& c) {
             c.packed = true;
             c.open_end = true;
             c.initial = true;
             c.width = 7;
             c.length = 5;
           }),
  };
  for (Case c : cases) {
    c.batch = 2;
    c.channels = 2;
    c.length = std::min<std::int64_t>(c.length, c.packed ? 30 : 9);
    const Problem p = make(c, DType::f64);
    Result result;
    run_backward(p, test::kCpu, kPublic, result);
    const struct {
      const char* name;
      Tensor Problem::* input;
      const Tensor* gradient;
    } pairs[] = {{"x", &Problem::x, &result.dx},
                 {"weight", &Problem::weight, &result.dweight},
                 {"bias", &Problem::bias, &result.dbias},
                 {"initial_states", &Problem::initial, &result.dinitial}};
    for (const auto& pair : pairs) {
      if (!pair.gradient->present()) {
        continue;
      }
      const Values gradient = pair.gradient->values();
      for (std::size_t i = 0; i < gradient.size(); ++i) {
        constexpr double kStep = 1e-6;
        double difference = 0;
        for (const double sign : {1.0, -1.0}) {
          Problem moved = p;
          Values values = (p.*pair.input).values();
          values[i] += sign * kStep;
          moved.*pair.input =
              Tensor::from_values(DType::f64, test::kCpu, (p.*pair.input).shape(), values);
          difference += sign * objective(moved);
        }
        ASSERT_NEAR(gradient[i], difference / (2 * kStep), 2e-8 * (1 + std::fabs(gradient[i])))
            << c.name << " " << pair.name << " " << i;
      }
    }
  }
}

// ---- the plan ----

TEST(CausalConv1dPlan, EveryElementHasAThread) {
  const mamba_native::cuda::DeviceInfo device{132, 9, 0, 232448};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const bool last : {false, true}) {
      for (const std::int64_t B : {1, 3, 70000}) {
        for (const std::int64_t D : {1, 7, 64, 5120}) {
          for (const std::int64_t L : {0, 1, 5, 129, 2048, 1000000}) {
            Inputs in;
            in.x = TensorView(nullptr, dtype, {B, D, L});
            if (last) {
              in.x.stride[1] = 1;
              in.x.stride[2] = D;
            }
            for (int row = 0; row < cuda::kForwardConfigCount + cuda::kBackwardConfigCount; ++row) {
              const bool forward_row = row < cuda::kForwardConfigCount;
              const int i = forward_row ? row : row - cuda::kForwardConfigCount;
              const cuda::Config& config =
                  forward_row ? cuda::kForwardConfigs[i] : cuda::kBackwardConfigs[i];
              const cuda::Plan plan = forward_row ? cuda::choose_forward(in, device, i)
                                                  : cuda::choose_backward(in, device, false, i);
              const bool along_time = config.axis == cuda::Axis::time;
              const std::int64_t items = config.items(size_of(dtype));
              const std::int64_t channel_blocks = plan.blocks / plan.segments;
              const std::int64_t steps =
                  plan.segments * plan.steps * (along_time ? plan.lanes * items : plan.groups);
              const std::int64_t channels =
                  channel_blocks * (along_time ? plan.groups : plan.lanes * items);
              ASSERT_GE(steps, L);
              ASSERT_GE(channels, D);
              ASSERT_LE(plan.lanes * plan.groups, cuda::kMaxThreads);
              ASSERT_LE(plan.lanes, along_time && forward_row ? cuda::kMaxThreads : 32);
              ASSERT_EQ(plan.lanes & (plan.lanes - 1), 0) << "lanes of a warp sum in pairs";
              ASSERT_EQ(plan.blocks % plan.segments, 0);
              ASSERT_LE(plan.batches, 65535);
              ASSERT_GE(plan.batches, 1);
            }
          }
        }
      }
    }
  }
}

// Ordered sums must not cost more memory than the tensors.
TEST(CausalConv1dPlan, TheWorkspaceIsSmallerThanX) {
  const mamba_native::cuda::DeviceInfo device{132, 9, 0, 232448};
  for (const bool last : {false, true}) {
    for (const std::int64_t W : {2, 4, 8}) {
      for (const std::int64_t B : {1, 3, 200, 70000}) {
        for (const std::int64_t D : {8, 5120}) {
          for (const std::int64_t L : {0, 1, 5, 60, 129, 2048, 1000000}) {
            Inputs in;
            in.x = TensorView(nullptr, DType::bf16, {B, D, L});
            in.weight = TensorView(nullptr, DType::bf16, {D, W});
            if (last) {
              in.x.stride[1] = 1;
              in.x.stride[2] = D;
            }
            const cuda::Plan plan = cuda::choose_backward(in, device, true);
            const std::int64_t rows = plan.segments * plan.batches;
            ASSERT_GE(rows, 1);
            ASSERT_TRUE(rows == 1 || rows * (W + 1) * 4 <= B * L * 2) << B << " " << D << " " << L;
          }
        }
      }
    }
  }
}

TEST(CausalConv1dPlan, LayoutAndAlignmentChooseTheRow) {
  const mamba_native::cuda::DeviceInfo device{132, 9, 0, 232448};
  Inputs in;
  in.x = TensorView(nullptr, DType::f32, {2, 64, 128});
  for (const std::int64_t width : {2, 3, 4}) {
    in.weight = TensorView(nullptr, DType::f32, {64, width});
    EXPECT_EQ(cuda::kForwardConfigs[cuda::choose_forward(in, device).config].axis,
              cuda::Axis::time);
  }
  in.x.stride[1] = 1;
  in.x.stride[2] = 64;
  const cuda::Config wide = cuda::kForwardConfigs[cuda::choose_forward(in, device).config];
  EXPECT_EQ(wide.axis, cuda::Axis::channels);
  EXPECT_EQ(wide.items_of_4_bytes, 4);
  in.x.stride[2] = 66;  // rows on multiples of 8 bytes
  const cuda::Config narrow = cuda::kForwardConfigs[cuda::choose_forward(in, device).config];
  EXPECT_EQ(narrow.axis, cuda::Axis::channels);
  EXPECT_EQ(narrow.items_of_4_bytes, 2);
  EXPECT_EQ(cuda::kBackwardConfigs[cuda::choose_backward(in, device, false).config].axis,
            cuda::Axis::channels);
  for (const std::int64_t width : {2, 3, 5, 8}) {
    in.weight.size[1] = width;
    EXPECT_TRUE(cuda::kForwardConfigs[cuda::choose_forward(in, device).config].any_width);
    EXPECT_TRUE(cuda::kBackwardConfigs[cuda::choose_backward(in, device, false).config].any_width);
  }
  EXPECT_THROW(cuda::choose_forward(in, device, cuda::kForwardConfigCount), Error);
}

#if MAMBA_WITH_CUDA
// Rows that the rules would not choose for a layout must compute the same.
TEST(CausalConv1dPlan, EveryRowIsRightForEveryLayoutOnCuda) {
  const std::string reason = test::cuda_unavailable();
  if (!reason.empty()) {
    GTEST_SKIP() << reason;
  }
  const mamba_native::cuda::DeviceInfo& device = mamba_native::cuda::device_info(0);
  for (const Layout layout : {Layout::channel_first, Layout::channel_last,
                              Layout::channel_last_slice, Layout::channel_last_misaligned}) {
    for (const bool packed : {false, true}) {
      const Problem p = make(with("rows",
                                  [&](Case& c) {
                                    c.layout = layout;
                                    c.packed = packed;
                                    c.initial = true;
                                    c.open_end = true;
                                    c.channels = 72;
                                    c.length = 333;
                                  }),
                             DType::f32);
      const Expected expected(p);
      for (int row = 0; row < cuda::kForwardConfigCount || row < cuda::kBackwardConfigCount;
           ++row) {
        const int forward_row = std::min(row, cuda::kForwardConfigCount - 1);
        const int backward_row = std::min(row, cuda::kBackwardConfigCount - 1);
        const Kernels kernels = {
            [&](const ForwardParams& params) {
              cuda::forward<float>(params, cuda::choose_forward(params.in, device, forward_row));
            },
            [&](const BackwardParams& params) {
              cuda::backward<float>(params,
                                    cuda::choose_backward(params.in, device, false, backward_row));
            },
            kPublic.update};
        EXPECT_TRUE(all_close(run(p, false, test::kCuda, kernels), expected, DType::f32))
            << cuda::describe(cuda::kForwardConfigs[forward_row]) << " / "
            << cuda::describe(cuda::kBackwardConfigs[backward_row]);
      }
    }
  }
}
#endif

// ---- what is refused ----

template <class Params>
void expect_refused(const std::string& what, void (*op)(const Params&), const Params& params,
                    const Tensor& untouched) {
  const std::vector<unsigned char> before = untouched.bytes();
  try {
    op(params);
    FAIL() << "accepted, expected: " << what;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
  }
  EXPECT_EQ(untouched.bytes(), before) << what;
}

TEST(CausalConv1d, RefusesWhatItCannotDo) {
  Case c = with("refused", [](Case& row) { row.initial = true; });
  const Problem p = make(c, DType::f32);
  const Tensor out(DType::f32, test::kCpu, shape_of(c, c.length));
  const Tensor final_states(DType::f32, test::kCpu, shape_of(c, c.width - 1));
  const Tensor seq_idx =
      Tensor::from_values(DType::i32, test::kCpu, {{c.batch, c.length}},
                          Values(static_cast<std::size_t>(c.batch * c.length), 0.0));
  ForwardParams good;
  good.in = inputs_of(p);
  good.out = out.view();
  good.final_states = final_states.view();
  const struct {
    const char* message;
    std::function<void(ForwardParams&)> spoil;
  } cases[] = {
      {"x must have shape", [](ForwardParams& q) { q.in.x.dim = 2; }},
      {"x must be float32", [](ForwardParams& q) { q.in.x.dtype = DType::i32; }},
      {"width between 2 and 8", [](ForwardParams& q) { q.in.weight.size[1] = 9; }},
      {"width between 2 and 8", [](ForwardParams& q) { q.in.weight.size[1] = 1; }},
      {"weight must have shape", [](ForwardParams& q) { q.in.weight.size[0] = 18; }},
      {"weight must be float64 exactly", [](ForwardParams& q) { q.in.weight.dtype = DType::f64; }},
      {"weight must be on cpu", [](ForwardParams& q) { q.in.weight.device = test::kCuda; }},
      {"bias must have shape", [](ForwardParams& q) { q.in.bias.size[0] = 1; }},
      {"bias must be float32", [](ForwardParams& q) { q.in.bias.dtype = DType::bf16; }},
      {"seq_idx must be int32",
       [&](ForwardParams& q) {
         q.in.seq_idx = seq_idx.view();
         q.in.seq_idx.dtype = DType::i64;
       }},
      {"seq_idx must have shape",
       [&](ForwardParams& q) {
         q.in.seq_idx = seq_idx.view();
         q.in.seq_idx.size[1] = 3;
       }},
      {"initial_states must have shape", [](ForwardParams& q) { q.in.initial_states.size[2] = 4; }},
      {"initial_states must be float32",
       [](ForwardParams& q) { q.in.initial_states.dtype = DType::bf16; }},
      {"out must have shape", [](ForwardParams& q) { q.out.size[2] = 60; }},
      {"out must be float32", [](ForwardParams& q) { q.out.dtype = DType::f16; }},
      {"out is written", [](ForwardParams& q) { q.out.stride[0] = 0; }},
      {"final_states must have shape", [](ForwardParams& q) { q.final_states.size[2] = 2; }},
  };
  for (const auto& bad : cases) {
    ForwardParams params = good;
    bad.spoil(params);
    expect_refused(bad.message, &forward, params, out);
  }
}

TEST(CausalConv1d, BackwardRefusesWhatItCannotDo) {
  const Case c = with("refused", [](Case& row) { row.initial = true; });
  const Problem p = make(c, DType::f32);
  const Tensor dx(DType::f32, test::kCpu, shape_of(c, c.length));
  const Tensor dweight(DType::f32, test::kCpu, {{c.channels, c.width}});
  const Tensor dbias(DType::f32, test::kCpu, {{c.channels}});
  const Tensor dinitial(DType::f32, test::kCpu, shape_of(c, c.width - 1));
  BackwardParams good;
  good.in = inputs_of(p);
  good.dout = p.dout.view();
  good.dfinal_states = p.dfinal.view();
  good.dx = dx.view();
  good.dweight = dweight.view();
  good.dbias = dbias.view();
  good.dinitial_states = dinitial.view();
  const struct {
    const char* message;
    std::function<void(BackwardParams&)> spoil;
  } cases[] = {
      {"dout must have shape", [](BackwardParams& q) { q.dout.size[2] = 1; }},
      {"dout must be float32", [](BackwardParams& q) { q.dout.dtype = DType::bf16; }},
      {"dx is written", [](BackwardParams& q) { q.dx.stride[1] = 0; }},
      {"dweight must have shape", [](BackwardParams& q) { q.dweight.size[1] = 3; }},
      {"dweight must be float32", [](BackwardParams& q) { q.dweight.dtype = DType::bf16; }},
      {"dweight must be contiguous", [](BackwardParams& q) { q.dweight.stride[0] = 8; }},
      {"dbias must be given exactly", [](BackwardParams& q) { q.dbias = TensorView(); }},
      {"dfinal_states must have shape", [](BackwardParams& q) { q.dfinal_states.size[2] = 1; }},
      {"dinitial_states must be given exactly",
       [](BackwardParams& q) { q.dinitial_states = TensorView(); }},
      {"workspace must have shape",
       [](BackwardParams& q) { q.workspace = TensorView(nullptr, DType::f32, {3, 19, 5}); }},
      {"workspace must be float32",
       [](BackwardParams& q) { q.workspace = TensorView(nullptr, DType::f64, {0, 19, 5}); }},
  };
  for (const auto& bad : cases) {
    BackwardParams params = good;
    bad.spoil(params);
    expect_refused(bad.message, &backward, params, dx);
  }
}

TEST(CausalConv1d, UpdateRefusesWhatItCannotDo) {
  const DecodeProblem p = make(decode_with("refused",
                                           [](DecodeCase& c) {
                                             c.circular = true;
                                             c.gathered = true;
                                           }),
                               DType::f32);
  const Tensor out(DType::f32, test::kCpu, p.x.shape());
  const Tensor beyond = Tensor::from_values(DType::i32, test::kCpu, {{3}}, {0, 7, 1});
  const Tensor negative = Tensor::from_values(DType::i32, test::kCpu, {{3}}, {0, -1, 1});
  const UpdateParams good = params_of(p, out);
  const struct {
    const char* message;
    std::function<void(UpdateParams&)> spoil;
  } cases[] = {
      {"conv_state must hold at least 3 columns",
       [](UpdateParams& q) { q.conv_state.size[2] = 2; }},
      {"conv_state must have shape", [](UpdateParams& q) { q.conv_state.size[1] = 84; }},
      {"conv_state must have shape", [](UpdateParams& q) { q.conv_state_indices = TensorView(); }},
      {"conv_state must be float32", [](UpdateParams& q) { q.conv_state.dtype = DType::bf16; }},
      {"conv_state is written", [](UpdateParams& q) { q.conv_state.stride[0] = 0; }},
      {"conv_state_indices[1] is 7",
       [&](UpdateParams& q) { q.conv_state_indices = beyond.view(); }},
      {"cache_seqlens[1] must not be negative",
       [&](UpdateParams& q) { q.cache_seqlens = negative.view(); }},
      {"cache_seqlens must have shape", [](UpdateParams& q) { q.cache_seqlens.size[0] = 2; }},
      {"conv_state_indices must be int32",
       [](UpdateParams& q) { q.conv_state_indices.dtype = DType::i64; }},
      {"out must have shape", [](UpdateParams& q) { q.out.size[0] = 2; }},
  };
  for (const auto& bad : cases) {
    UpdateParams params = good;
    bad.spoil(params);
    expect_refused(bad.message, &update, params, p.state);
  }
}

TEST(CausalConv1d, VarlenStatesRefusesWhatItCannotDo) {
  const Tensor x = tensor({4, 1}, {1, 2, 3, 4});
  const Tensor states(DType::f64, test::kCpu, {{2, 1, 3}});
  const auto boundaries = [](const Values& values) {
    return Tensor::from_values(DType::i32, test::kCpu, {{static_cast<std::int64_t>(values.size())}},
                               values);
  };
  const struct {
    const char* message;
    Tensor cu_seqlens;
  } cases[] = {{"must rise", boundaries({0, 3, 2})},
               {"must rise", boundaries({-1, 1, 4})},
               {"must rise", boundaries({0, 1, 5})},
               {"states must have shape", boundaries({0, 4})},
               {"int32 or int64", tensor({3}, {0, 1, 4})}};
  for (const auto& bad : cases) {
    VarlenStatesParams params;
    params.x = x.view();
    params.cu_seqlens = bad.cu_seqlens.view();
    params.states = states.view();
    expect_refused(bad.message, &varlen_states, params, states);
  }
}

TEST(CausalConv1d, RefusesFloat64OnCuda) {
  ForwardParams params;
  params.in.x = TensorView(nullptr, DType::f64, {1, 1, 1}, test::kCuda);
  EXPECT_THROW(forward(params), Error);
}

}  // namespace
}  // namespace mamba_native::causal_conv1d
