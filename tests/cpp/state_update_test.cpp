// The state update on every device and instruction set, against the oracle; the oracle itself
// against numbers worked out by hand and against the selective scan.
#include "state_update/state_update.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/math.h"
#include "core/parallel_for.h"
#include "selective_scan/selective_scan.h"
#include "state_update/cpu.h"
#include "state_update/plan.h"
#include "state_update/reference.h"
#include "support/compare.h"
#include "support/device_memory.h"
#include "support/targets.h"
#include "support/tensor.h"

namespace mamba_native::state_update {
namespace {

using test::Shape;
using test::Target;
using test::Tensor;

// ---- what is computed, and by whom ----

struct Case {
  std::string name;
  std::int64_t batch = 3;
  std::int64_t heads = 2;
  std::int64_t headdim = 70;  // a full block of rows and a ragged one
  std::int64_t groups = 1;
  std::int64_t states = 16;
  bool tied = false;  // A, dt, dt_bias and D with stride 0, as Mamba-2 expands them
  bool skip = true;   // D
  bool gate = true;   // z
  bool bias = true;
  bool softplus = true;
  bool strided = false;           // every tensor a window of a larger one, steps 2 apart
  bool misaligned = false;        // contiguous, from an odd element on
  bool state_f32 = false;         // whatever the dtype of the rest
  bool parameters_alike = false;  // A, D and dt_bias in the dtype of the rest, not float32
  bool logarithm = false;         // A holds log(-A)
  double dt_min = -std::numeric_limits<double>::infinity();
  double dt_max = std::numeric_limits<double>::infinity();
  DType index = DType::f32;  // i32 or i64: gathered, with padding
  double dt_low = -2.0;
  double dt_high = 1.0;
};

Case with(const std::string& name, const std::function<void(Case&)>& change) {
  Case row;
  row.name = name;
  change(row);
  return row;
}

// Both limits hold for some rows, and neither for others.
void limit(Case& c) {
  c.dt_min = 0.1;
  c.dt_max = 0.4;
}

// The base row, then rows that change one thing.
std::vector<Case> star() {
  std::vector<Case> rows = {
      with("base", [](Case&) {}),
      with("batch_1", [](Case& c) { c.batch = 1; }),
      with("one_row", [](Case& c) { c.headdim = 1; }),
      with("rows_64", [](Case& c) { c.headdim = 64; }),
      with("rows_1536_mamba1",
           [](Case& c) {
             c.heads = 1;
             c.headdim = 1536;
           }),
      with("many_heads", [](Case& c) { c.heads = 33; }),
      with("two_groups", [](Case& c) { c.groups = 2; }),
      with("no_D", [](Case& c) { c.skip = false; }),
      with("no_z", [](Case& c) { c.gate = false; }),
      with("no_bias", [](Case& c) { c.bias = false; }),
      with("no_softplus",
           [](Case& c) {
             c.softplus = false;
             c.dt_low = 0.001;
             c.dt_high = 0.1;
             c.bias = false;
           }),
      with("nothing_optional", [](Case& c) { c.skip = c.gate = c.bias = false; }),
      with("softplus_threshold",
           [](Case& c) {
             c.dt_low = 17.0;
             c.dt_high = 25.0;
           }),
      with("strided", [](Case& c) { c.strided = true; }),
      with("misaligned", [](Case& c) { c.misaligned = true; }),
      with("state_f32", [](Case& c) { c.state_f32 = true; }),
      with("parameters_alike", [](Case& c) { c.parameters_alike = true; }),
      with("logarithm", [](Case& c) { c.logarithm = true; }),
      with("logarithm_alike", [](Case& c) { c.logarithm = c.parameters_alike = true; }),
      with("logarithm_strided", [](Case& c) { c.logarithm = c.strided = true; }),
      with("logarithm_states_5",
           [](Case& c) {
             c.logarithm = true;
             c.states = 5;
           }),
      with("tied_logarithm",
           [](Case& c) {
             c.logarithm = c.tied = true;
             c.states = 128;
           }),
      with("limits", limit),
      with("limits_strided",
           [](Case& c) {
             limit(c);
             c.strided = true;
           }),
      with("limits_no_softplus",
           [](Case& c) {
             limit(c);
             c.softplus = c.bias = false;
           }),
      with("tied_limits",
           [](Case& c) {
             limit(c);
             c.tied = true;
             c.states = 128;
           }),
      with("indices_i32", [](Case& c) { c.index = DType::i32; }),
      with("indices_i64", [](Case& c) { c.index = DType::i64; }),
      with("tied_indices",
           [](Case& c) {
             c.tied = true;
             c.states = 128;
             c.index = DType::i32;
           }),
      with("tied_strided",
           [](Case& c) {
             c.tied = true;
             c.strided = true;
             c.states = 64;
           }),
      with("tied_mamba2",
           [](Case& c) {
             c.tied = true;
             c.heads = 8;
             c.headdim = 64;
             c.states = 128;
             c.groups = 2;
           }),
  };
  for (const std::int64_t states : {1, 8, 24, 32, 64, 96, 128, 256, 300, 512}) {
    for (const bool tied : {false, true}) {
      rows.push_back(
          with((tied ? "tied_states_" : "states_") + std::to_string(states), [&](Case& c) {
            c.states = states;
            c.tied = tied;
          }));
    }
  }
  return rows;
}

// A tensor's shape in the layout of the row. `tied_from`: dimensions from this one on have stride
// 0.
Shape shape_of(const Case& c, std::vector<std::int64_t> sizes, std::size_t tied_from = 9) {
  Shape shape{sizes};
  shape.offset = c.misaligned ? 1 : c.strided ? 3 : 0;
  std::int64_t step = c.strided ? 2 : 1;
  shape.strides.resize(sizes.size());
  for (std::size_t i = sizes.size(); i-- > 0;) {
    const bool expanded = c.tied && i >= tied_from;
    shape.strides[i] = expanded ? 0 : step;
    step *= expanded ? 1 : sizes[i] + (c.strided ? 1 : 0);
  }
  return shape;
}

struct Problem {
  DType dtype = DType::f32;
  bool softplus = false;
  Tensor state, x, dt, A, B, C, D, z, bias, indices;
  bool logarithm = false;
  double dt_min = -std::numeric_limits<double>::infinity();
  double dt_max = std::numeric_limits<double>::infinity();

  // A copy, in float64 or as it is.
  Problem to(bool exact, Device device) const {
    const auto copy = [&](const Tensor& tensor) {
      return tensor.to(exact ? DType::f64 : tensor.dtype(), device);
    };
    return {exact ? DType::f64 : dtype,
            softplus,
            copy(state),
            copy(x),
            copy(dt),
            copy(A),
            copy(B),
            copy(C),
            copy(D),
            copy(z),
            copy(bias),
            indices.to(indices.dtype(), device),
            logarithm,
            dt_min,
            dt_max};
  }
};

Problem make(const Case& c, DType dtype, unsigned seed = 1) {
  std::mt19937 random(seed);
  const std::int64_t B = c.batch, H = c.heads, P = c.headdim, N = c.states, G = c.groups;
  const DType parameter = c.parameters_alike ? dtype : DType::f32;
  const bool gathered = c.index != DType::f32;
  const auto uniform = [&](DType type, const Shape& shape, double low, double high) {
    return Tensor::uniform(random, type, test::kCpu, shape, low, high);
  };
  Problem p;
  p.dtype = dtype;
  p.softplus = c.softplus;
  p.logarithm = c.logarithm;
  p.dt_min = c.dt_min;
  p.dt_max = c.dt_max;
  p.state = uniform(c.state_f32 ? DType::f32 : dtype,
                    shape_of(c, {gathered ? 2 * B + 1 : B, H, P, N}), -1, 1);
  p.x = uniform(dtype, shape_of(c, {B, H, P}), -1, 1);
  p.dt = uniform(dtype, shape_of(c, {B, H, P}, 2), c.dt_low, c.dt_high);
  p.A =
      uniform(parameter, shape_of(c, {H, P, N}, 1), c.logarithm ? -1 : -8, c.logarithm ? 2 : -0.5);
  p.B = uniform(dtype, shape_of(c, {B, G, N}), -1, 1);
  p.C = uniform(dtype, shape_of(c, {B, G, N}), -1, 1);
  if (c.skip) {
    p.D = uniform(parameter, shape_of(c, {H, P}, 1), -1, 1);
  }
  if (c.gate) {
    p.z = uniform(dtype, shape_of(c, {B, H, P}), -2, 2);
  }
  if (c.bias) {
    p.bias = uniform(parameter, shape_of(c, {H, P}, 1), -2, 0);
  }
  if (gathered) {
    std::vector<double> entries;
    for (std::int64_t b = 0; b < B; ++b) {
      entries.push_back(b == 1 ? -7.0 : static_cast<double>(2 * (B - b)));
    }
    p.indices = Tensor::from_values(c.index, test::kCpu, {{B}, {c.strided ? 2 : 1}}, entries);
  }
  return p;
}

using RunStep = std::function<void(const Params&)>;

struct Result {
  Tensor state, out;
};

Params params_of(const Problem& p) {
  Params params;
  params.state = p.state.view();
  params.x = p.x.view();
  params.dt = p.dt.view();
  params.A = p.A.view();
  params.B = p.B.view();
  params.C = p.C.view();
  params.D = p.D.view();
  params.z = p.z.view();
  params.dt_bias = p.bias.view();
  params.state_batch_indices = p.indices.view();
  params.dt_softplus = p.softplus;
  params.A_is_log = p.logarithm;
  params.dt_min = p.dt_min;
  params.dt_max = p.dt_max;
  return params;
}

// `p` is used up: its state is the result's.
Result run_step(const Problem& p, Device device, const RunStep& run) {
  Result result{p.state, Tensor(p.x.dtype(), device, p.x.shape())};
  Params params = params_of(p);
  params.out = result.out.view();
  run(params);
  return result;
}

struct Expected {
  explicit Expected(const Problem& p)
      : truth(run_step(p.to(true, test::kCpu), test::kCpu, &reference::update<double>)),
        yardstick(run_step(p.to(false, test::kCpu), test::kCpu, &reference::update<float>)) {}
  Result truth, yardstick;
};

testing::AssertionResult close(const char* output, DType dtype, const Tensor& got,
                               const Tensor& truth, const Tensor& yardstick) {
  return test::is_close("selective_state_update", dtype, output, got.dtype(), got.values(),
                        truth.values(), yardstick.values(), test::kForwardSlack);
}

bool is_close(const Result& got, const Expected& expected, DType dtype) {
  return close("out", dtype, got.out, expected.truth.out, expected.yardstick.out) &&
         close("state", dtype, got.state, expected.truth.state, expected.yardstick.state);
}

// ---- every implementation on every row ----

RunStep update_on(const Target& target) { return test::on<Params>(target, &update, &cpu::update); }

using StateUpdate = test::RowTest<Case>;

TEST_P(StateUpdate, MatchesTheOracle) {
  const auto& [target, dtype, problem] = GetParam();
  const Problem p = make(problem, dtype);
  const Expected expected(p);
  const Result got = run_step(p.to(false, target.device), target.device, update_on(target));
  EXPECT_TRUE(close("out", dtype, got.out, expected.truth.out, expected.yardstick.out));
  EXPECT_TRUE(close("state", dtype, got.state, expected.truth.state, expected.yardstick.state));
}

INSTANTIATE_TEST_SUITE_P(Star, StateUpdate, testing::ValuesIn(test::rows(star())),
                         test::row_name<Case>);

using StateUpdateTarget = test::TargetTest;

// Each input in turn in another dtype than the rest.
TEST_P(StateUpdateTarget, EveryTensorHasItsOwnDtype) {
  const Target& target = GetParam();
  Tensor Problem::* const inputs[] = {&Problem::state, &Problem::x, &Problem::dt,
                                      &Problem::A,     &Problem::B, &Problem::C,
                                      &Problem::D,     &Problem::z, &Problem::bias};
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const DType other : {DType::f32, DType::f16, DType::bf16}) {
      if (!test::unavailable(dtype).empty() || !test::unavailable(other).empty()) {
        continue;
      }
      for (Tensor Problem::* input : inputs) {
        Problem p = make(with("mixed", [](Case& c) { c.parameters_alike = true; }), dtype);
        p.*input = (p.*input).to(other, test::kCpu);
        const Expected expected(p);
        const Result got = run_step(p.to(false, target.device), target.device, update_on(target));
        EXPECT_TRUE(close("out", p.x.dtype(), got.out, expected.truth.out, expected.yardstick.out));
        EXPECT_TRUE(close("state", p.state.dtype(), got.state, expected.truth.state,
                          expected.yardstick.state));
      }
    }
  }
}

// Each input in turn with stride 0 in each of its dimensions, as expand() makes it.
TEST_P(StateUpdateTarget, EveryInputMayBeExpanded) {
  const Target& target = GetParam();
  TensorView Params::* const inputs[] = {&Params::x, &Params::dt, &Params::A, &Params::B,
                                         &Params::C, &Params::D,  &Params::z, &Params::dt_bias};
  const Problem p = make(with("expanded", [](Case& c) { c.groups = 2; }), DType::f32);
  for (TensorView Params::* input : inputs) {
    for (int mask = 1; mask < 1 << (params_of(p).*input).dim; ++mask) {
      const auto expanded = [&](const RunStep& run) {
        return [&, run](const Params& params) {
          Params changed = params;
          for (int dim = 0; dim < (changed.*input).dim; ++dim) {
            (changed.*input).stride[dim] *= (mask >> dim) % 2 == 0 ? 1 : 0;
          }
          run(changed);
        };
      };
      const Result got =
          run_step(p.to(false, target.device), target.device, expanded(update_on(target)));
      const Result truth =
          run_step(p.to(true, test::kCpu), test::kCpu, expanded(&reference::update<double>));
      const Result yardstick =
          run_step(p.to(false, test::kCpu), test::kCpu, expanded(&reference::update<float>));
      EXPECT_TRUE(close("out", DType::f32, got.out, truth.out, yardstick.out));
      EXPECT_TRUE(close("state", DType::f32, got.state, truth.state, yardstick.state));
    }
  }
}

// An implementation that forgot a term must not pass: each is dropped here in turn, on its side
// only.
TEST_P(StateUpdateTarget, NoticesADroppedTerm) {
  const Target& target = GetParam();
  const struct {
    const char* term;
    std::function<void(Params&)> drop;
  } mutations[] = {
      {"D", [](Params& p) { p.D = TensorView(); }},
      {"z", [](Params& p) { p.z = TensorView(); }},
      {"dt_bias", [](Params& p) { p.dt_bias = TensorView(); }},
      {"softplus", [](Params& p) { p.dt_softplus = false; }},
      {"B", [](Params& p) { p.B = p.C; }},
      {"C", [](Params& p) { p.C = p.B; }},
      {"x", [](Params& p) { p.x = p.z; }},
      {"A", [](Params& p) { p.A.stride[0] = 0; }},
      {"A_is_log", [](Params& p) { p.A_is_log = false; }},
      {"dt_min", [](Params& p) { p.dt_min = -1; }},
      {"dt_max", [](Params& p) { p.dt_max = 9; }},
  };
  for (const bool tied : {false, true}) {
    const Problem p = make(with("mutation",
                                [&](Case& c) {
                                  limit(c);
                                  c.logarithm = true;
                                  c.tied = tied;
                                  c.states = 64;
                                }),
                           DType::f32);
    const Expected expected(p);
    const RunStep run = update_on(target);
    EXPECT_TRUE(
        is_close(run_step(p.to(false, target.device), target.device, run), expected, DType::f32));
    for (const auto& mutation : mutations) {
      const Result got =
          run_step(p.to(false, target.device), target.device, [&](const Params& params) {
            Params changed = params;
            mutation.drop(changed);
            run(changed);
          });
      EXPECT_FALSE(is_close(got, expected, DType::f32)) << mutation.term;
    }
  }
}

TEST_P(StateUpdateTarget, PaddingGivesZerosAndTouchesNoState) {
  const Target& target = GetParam();
  for (const std::int64_t states : {5, 64}) {
    Case c = with("padding", [&](Case& row) { row.states = states; });
    Problem p = make(c, DType::f32);
    p.indices = Tensor::from_values(DType::i64, test::kCpu, {{3}}, {-1, -1, -100});
    p = p.to(false, target.device);
    const std::vector<unsigned char> before = p.state.bytes();
    const Result got = run_step(p, target.device, update_on(target));
    EXPECT_EQ(got.state.bytes(), before);
    for (const double value : got.out.values()) {
      ASSERT_EQ(value, 0.0);
    }
  }
}

TEST_P(StateUpdateTarget, EmptySizes) {
  const Target& target = GetParam();
  for (const auto& change : {std::function<void(Case&)>([](Case& c) { c.batch = 0; }),
                             std::function<void(Case&)>([](Case& c) { c.heads = 0; }),
                             std::function<void(Case&)>([](Case& c) { c.headdim = 0; })}) {
    const Problem p = make(with("empty", change), DType::f32).to(false, target.device);
    EXPECT_EQ(run_step(p, target.device, &update).out.values().size(), 0u);
  }
}

// Every tensor that changes with the token, as steps of one buffer; padding among the entries.
TEST_P(StateUpdateTarget, TokensAtOnceAreCallsOneByOne) {
  const Target& target = GetParam();
  constexpr std::int64_t kTokens = 3;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    if (!test::unavailable(dtype).empty()) {
      continue;
    }
    for (const bool tied : {false, true}) {
      Case one = with("one", [&](Case& c) {
        c.groups = 2;
        c.states = 64;
        c.tied = tied;
        c.index = DType::i32;
      });
      Case many = one;
      many.batch = kTokens * one.batch;  // token after token, cut below
      Problem p = make(many, dtype);
      const Problem parameters = make(one, dtype);
      p.state = parameters.state;
      p.indices = parameters.indices;
      p = p.to(false, target.device);
      const Tensor alone = p.state.to(p.state.dtype(), target.device);
      const Tensor out(dtype, target.device, {{many.batch, one.heads, one.headdim}});
      const Tensor out_alone(dtype, target.device, {{many.batch, one.heads, one.headdim}});
      const auto cut = [&](TensorView view, std::int64_t token) {
        view.data = static_cast<char*>(view.data) +
                    token * one.batch * view.stride[0] * size_of(view.dtype);
        view.size[0] = one.batch;
        return view;
      };
      const auto sequence = [&](const TensorView& view) {
        TensorView all = cut(view, 0);
        all.dim = 4;
        for (int i = 3; i > 1; --i) {
          all.size[i] = view.size[i - 1];
          all.stride[i] = view.stride[i - 1];
        }
        all.size[1] = kTokens;
        all.stride[1] = one.batch * view.stride[0];
        return all;
      };
      TensorView Params::* const changing[] = {&Params::x, &Params::dt, &Params::B,
                                               &Params::C, &Params::z,  &Params::out};
      Params together = params_of(p);
      together.out = out.view();
      for (TensorView Params::* tensor : changing) {
        together.*tensor = sequence(together.*tensor);
      }
      update(together);
      for (std::int64_t token = 0; token < kTokens; ++token) {
        Params single = params_of(p);
        single.state = alone.view();
        single.out = out_alone.view();
        for (TensorView Params::* tensor : changing) {
          single.*tensor = cut(single.*tensor, token);
        }
        update(single);
      }
      EXPECT_EQ(out.bytes(), out_alone.bytes());
      EXPECT_EQ(p.state.bytes(), alone.bytes());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, StateUpdateTarget, testing::ValuesIn(test::kTargets),
                         test::target_name);

TEST(StateUpdateCuda, AnEntryBeyondTheStateShowsAndIsNotTouched) {
  const std::string reason = test::cuda_unavailable();
  if (!reason.empty()) {
    GTEST_SKIP() << reason;
  }
  for (const std::int64_t states : {5, 64}) {
    Problem p = make(with("beyond", [&](Case& c) { c.states = states; }), DType::f32);
    p.indices = Tensor::from_values(DType::i32, test::kCpu, {{3}}, {3, 1000, 2000000000});
    p = p.to(false, test::kCuda);
    const std::vector<unsigned char> before = p.state.bytes();
    const Result got = run_step(p, test::kCuda, &update);
    EXPECT_EQ(got.state.bytes(), before);
    for (const double value : got.out.values()) {
      ASSERT_TRUE(std::isnan(value));
    }
  }
}

// The last of so many entries lies beyond 2^31 elements.
TEST(StateUpdateCudaLarge, EntriesBeyondTwoToThe31) {
  const std::string reason = test::cuda_unavailable();
  if (!reason.empty()) {
    GTEST_SKIP() << reason;
  }
  for (const std::int64_t states : {65, 64}) {  // the strided kernel and one with vectors
    const Problem p = make(with("large",
                                [&](Case& c) {
                                  c.batch = 1;
                                  c.heads = 16;
                                  c.headdim = 64;
                                  c.states = states;
                                }),
                           DType::f32);
    const Expected expected(p);
    const Problem there = p.to(false, test::kCuda);
    const std::vector<unsigned char> entry = p.state.bytes();
    const std::int64_t entries =
        (std::int64_t{1} << 31) * 4 / static_cast<std::int64_t>(entry.size()) + 2;
    const std::size_t offset = entry.size() * static_cast<std::size_t>(entries - 1);
    char* const memory = static_cast<char*>(test::device_allocate(offset + entry.size()));
    test::copy_to_device(memory + offset, entry.data(), entry.size());
    const Tensor index =
        Tensor::from_values(DType::i64, test::kCuda, {{1}}, {static_cast<double>(entries - 1)});
    const Tensor out(DType::f32, test::kCuda, there.x.shape());
    Params params = params_of(there);
    params.state.data = memory;
    params.state.size[0] = entries;
    params.state_batch_indices = index.view();
    params.out = out.view();
    update(params);
    std::vector<unsigned char> updated(entry.size());
    test::copy_from_device(updated.data(), memory + offset, updated.size());
    test::device_release(memory);
    std::vector<double> state;
    for (std::size_t i = 0; i < updated.size(); i += 4) {
      state.push_back(load_double(updated.data() + i, DType::f32, 0));
    }
    EXPECT_TRUE(close("out", DType::f32, out, expected.truth.out, expected.yardstick.out));
    EXPECT_LE(test::nmse(state, expected.truth.state.values()), 1e-11);
  }
}

TEST(StateUpdateCpu, ResultsDoNotDependOnTheThreads) {
  const Problem p = make(with("threads",
                              [](Case& c) {
                                c.batch = 8;
                                c.headdim = 640;
                                c.states = 64;
                              }),
                         DType::f32);
  set_num_threads(1);
  const Result one = run_step(p.to(false, test::kCpu), test::kCpu, &update);
  set_num_threads(3);
  const Result three = run_step(p.to(false, test::kCpu), test::kCpu, &update);
  set_num_threads(0);
  EXPECT_EQ(one.out.bytes(), three.out.bytes());
  EXPECT_EQ(one.state.bytes(), three.state.bytes());
}

TEST(StateUpdateCpu, Float64RunsTheOracle) {
  const Problem p = make(with("f64", [](Case&) {}), DType::f32).to(true, test::kCpu);
  const Result truth = run_step(p.to(true, test::kCpu), test::kCpu, &reference::update<double>);
  const Result got = run_step(p, test::kCpu, &update);
  EXPECT_EQ(got.out.bytes(), truth.out.bytes());
  EXPECT_EQ(got.state.bytes(), truth.state.bytes());
}

// ---- the oracle ----

// Two states, worked out by hand: delta = log 2, so that A = -1 and -2 decay by 1/2 and 1/4.
TEST(StateUpdateOracle, ByHand) {
  const auto tensor = [](Shape shape, const std::vector<double>& values) {
    return Tensor::from_values(DType::f64, test::kCpu, shape, values);
  };
  const double delta = std::log(2.0);
  Problem p;
  p.state = tensor({{1, 1, 1, 2}}, {4, 8});
  p.x = tensor({{1, 1, 1}}, {3});
  p.dt = tensor({{1, 1, 1}}, {delta - 1});
  p.bias = tensor({{1, 1}}, {1});
  p.A = tensor({{1, 1, 2}}, {-1, -2});
  p.B = tensor({{1, 1, 2}}, {1, -1});
  p.C = tensor({{1, 1, 2}}, {10, 100});
  p.D = tensor({{1, 1}}, {5});
  const double first = 2 + 3 * delta;
  const double second = 2 - 3 * delta;
  const Result got = run_step(p, test::kCpu, &update);
  EXPECT_NEAR(got.state.values()[0], first, 1e-14);
  EXPECT_NEAR(got.state.values()[1], second, 1e-14);
  EXPECT_NEAR(got.out.values()[0], 10 * first + 100 * second + 15, 1e-12);

  // A gate of silu(0) = 0, and softplus(0) = log 2.
  p.state = tensor({{1, 1, 1, 2}}, {4, 8});
  p.dt = tensor({{1, 1, 1}}, {-1});
  p.z = tensor({{1, 1, 1}}, {0});
  p.softplus = true;
  const Result gated = run_step(p, test::kCpu, &update);
  EXPECT_NEAR(gated.state.values()[0], first, 1e-14);
  EXPECT_EQ(gated.out.values()[0], 0.0);
}

// The output comes from the state before it is rounded: 1 + 2^-9 is no bfloat16.
TEST(StateUpdateOracle, OutputUsesTheUnroundedState) {
  Problem p;
  p.state = Tensor::from_values(DType::bf16, test::kCpu, {{1, 1, 1, 1}}, {1});
  const auto tensor = [](Shape shape, double value) {
    return Tensor::from_values(DType::f32, test::kCpu, shape, {value});
  };
  p.x = tensor({{1, 1, 1}}, std::ldexp(1.0, -9));
  p.dt = tensor({{1, 1, 1}}, 1);
  p.A = tensor({{1, 1, 1}}, 0);
  p.B = tensor({{1, 1, 1}}, 1);
  p.C = tensor({{1, 1, 1}}, 1);
  for (const Target& target : test::kTargets) {
    if (test::unavailable(target).empty() && test::unavailable(DType::bf16).empty()) {
      const Result got = run_step(p.to(false, target.device), target.device, update_on(target));
      EXPECT_EQ(got.out.values()[0], 1 + std::ldexp(1.0, -9)) << target.name;
      EXPECT_EQ(got.state.values()[0], 1.0) << target.name;
    }
  }
}

// Step by step = the selective scan, in float64.
TEST(StateUpdateIdentity, StepsAreTheSelectiveScan) {
  const std::int64_t batch = 2, channels = 6, groups = 2, states = 5, length = 9;
  std::mt19937 random(3);
  const auto uniform = [&](Shape shape, double low, double high) {
    return Tensor::uniform(random, DType::f64, test::kCpu, shape, low, high);
  };
  const auto like = [](Shape shape) { return Tensor(DType::f64, test::kCpu, shape); };
  const Tensor u = uniform({{batch, channels, length}}, -1, 1);
  const Tensor delta = uniform({{batch, channels, length}}, -1, 1);
  const Tensor z = uniform({{batch, channels, length}}, -2, 2);
  const Tensor A = uniform({{channels, states}}, -4, -0.5);
  const Tensor B = uniform({{batch, groups, states, length}}, -1, 1);
  const Tensor C = uniform({{batch, groups, states, length}}, -1, 1);
  const Tensor D = uniform({{channels}}, -1, 1);
  const Tensor bias = uniform({{channels}}, -1, 1);
  const Tensor initial = uniform({{batch, channels, states}}, -1, 1);
  const Tensor out = like({{batch, channels, length}});
  const Tensor last = like({{batch, channels, states}});
  const Tensor checkpoints = like({{batch, channels, 1, states}});
  selective_scan::ForwardParams scan;
  scan.in.u = u.view();
  scan.in.delta = delta.view();
  scan.in.A = A.view();
  scan.in.B = B.view();
  scan.in.C = C.view();
  scan.in.D = D.view();
  scan.in.z = z.view();
  scan.in.delta_bias = bias.view();
  scan.in.initial_state = initial.view();
  scan.in.delta_softplus = true;
  scan.out = out.view();
  scan.last_state = last.view();
  scan.checkpoints = checkpoints.view();
  selective_scan::forward(scan);

  // Heads are the groups of channels; step t is a view of the sequences at t.
  const std::int64_t rows = channels / groups;
  const auto view = [](const TensorView& of, std::vector<std::int64_t> sizes,
                       std::vector<std::int64_t> strides, std::int64_t offset) {
    TensorView step = of;
    step.data = static_cast<double*>(of.data) + offset;
    step.dim = static_cast<int>(sizes.size());
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      step.size[i] = sizes[i];
      step.stride[i] = strides[i];
    }
    return step;
  };
  const Tensor state = initial.to(DType::f64, test::kCpu);
  const Tensor steps = like({{batch, channels, length}});
  Params step;
  step.state = view(state.view(), {batch, groups, rows, states},
                    {channels * states, rows * states, states, 1}, 0);
  step.A = view(A.view(), {groups, rows, states}, {rows * states, states, 1}, 0);
  step.D = view(D.view(), {groups, rows}, {rows, 1}, 0);
  step.dt_bias = view(bias.view(), {groups, rows}, {rows, 1}, 0);
  step.dt_softplus = true;
  for (std::int64_t t = 0; t < length; ++t) {
    const auto at = [&](const Tensor& sequence) {
      return view(sequence.view(), {batch, groups, rows},
                  {channels * length, rows * length, length}, t);
    };
    const auto projection = [&](const Tensor& sequence) {
      return view(sequence.view(), {batch, groups, states},
                  {groups * states * length, states * length, length}, t);
    };
    step.x = at(u);
    step.dt = at(delta);
    step.z = at(z);
    step.out = at(steps);
    step.B = projection(B);
    step.C = projection(C);
    update(step);
  }
  EXPECT_LE(test::nmse(steps.values(), out.values()), 1e-28);
  EXPECT_LE(test::nmse(state.values(), last.values()), 1e-28);
}

// ---- errors ----

TEST(StateUpdateErrors, BadInputNamesTheArgumentAndTouchesNothing) {
  const Case c = with("errors", [](Case& row) {
    row.heads = 4;
    row.groups = 2;
    row.index = DType::i64;
  });
  const struct {
    const char* message;
    std::function<void(Params&)> spoil;
  } rows[] = {
      {"state must have shape", [](Params& p) { p.state.dim = 3; }},
      {"state must have shape", [](Params& p) { p.state.size[2] += 1; }},
      {"state must have at least one", [](Params& p) { p.state.size[3] = 0; }},
      {"state must be", [](Params& p) { p.state.dtype = DType::i32; }},
      {"state is written", [](Params& p) { p.state.stride[3] = 0; }},
      {"x must have shape", [](Params& p) { p.x.dim = 2; }},
      {"dt must have shape", [](Params& p) { p.dt.size[0] -= 1; }},
      {"dt must have shape", [](Params& p) { p.dt.dim = 4; }},
      {"dt must have shape", [](Params& p) { p.dt = TensorView(); }},
      {"dt must be on cpu", [](Params& p) { p.dt.device = test::kCuda; }},
      {"A must have shape", [](Params& p) { p.A.size[0] += 1; }},
      {"A must be float64 exactly when x is", [](Params& p) { p.A.dtype = DType::f64; }},
      {"B must have shape", [](Params& p) { p.B.size[2] -= 1; }},
      {"B must have shape", [](Params& p) { p.B.dim = 4; }},
      {"C must have shape", [](Params& p) { p.C.size[1] -= 1; }},
      {"multiple of the groups",
       [](Params& p) {
         p.B.size[1] = 3;
         p.C.size[1] = 3;
       }},
      {"D must have shape", [](Params& p) { p.D.size[1] -= 1; }},
      {"z must have shape", [](Params& p) { p.z.size[2] += 1; }},
      {"dt_bias must have shape", [](Params& p) { p.dt_bias.dim = 1; }},
      {"dt_limit must be (smallest, largest), got (2, 1)",
       [](Params& p) {
         p.dt_min = 2;
         p.dt_max = 1;
       }},
      {"dt_limit must be", [](Params& p) { p.dt_min = std::nan(""); }},
      {"out must be float32", [](Params& p) { p.out.dtype = DType::f16; }},
      {"out must have shape", [](Params& p) { p.out = TensorView(); }},
      {"out is written", [](Params& p) { p.out.stride[0] = 0; }},
      {"state_batch_indices must be int32 or int64",
       [](Params& p) { p.state_batch_indices.dtype = DType::f32; }},
      {"state_batch_indices must have shape", [](Params& p) { p.state_batch_indices.size[0] = 2; }},
      {"state_batch_indices[0] is 6, but state has 5 entries",
       [](Params& p) { p.state.size[0] = 5; }},
  };
  for (const auto& row : rows) {
    const Problem p = make(c, DType::f32);
    const Tensor out(DType::f32, test::kCpu, p.x.shape());
    const std::vector<unsigned char> state_before = p.state.bytes();
    const std::vector<unsigned char> out_before = out.bytes();
    Params params = params_of(p);
    params.out = out.view();
    row.spoil(params);
    try {
      update(params);
      ADD_FAILURE() << "accepted: " << row.message;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(row.message), std::string::npos) << error.what();
    }
    EXPECT_EQ(p.state.bytes(), state_before) << row.message;
    EXPECT_EQ(out.bytes(), out_before) << row.message;
  }
}

// ---- the plan ----

Params planned(DType dtype, std::int64_t batch, std::int64_t heads, std::int64_t headdim,
               std::int64_t states, bool tied) {
  alignas(16) static char memory[16];
  Params p;
  p.state = TensorView(memory, dtype, {batch, heads, headdim, states});
  p.x = TensorView(memory, dtype, {batch, heads, headdim});
  p.dt = p.x;
  p.A = TensorView(memory, DType::f32, {heads, headdim, states});
  if (tied) {
    p.dt.stride[2] = 0;
    p.A.stride[1] = p.A.stride[2] = 0;
  }
  return p;
}

TEST(StateUpdatePlan, ChoosesTheRowThatTheTableNames) {
  mamba_native::cuda::DeviceInfo device;
  device.multiprocessors = 132;
  const auto config = [&](const Params& p) {
    return cuda::kConfigs[cuda::choose(p, device).config];
  };
  const cuda::Config mamba2 = config(planned(DType::bf16, 64, 80, 64, 128, true));
  EXPECT_TRUE(mamba2.tied);
  EXPECT_EQ(mamba2.lanes, 16);
  const cuda::Config mamba1 = config(planned(DType::bf16, 1, 1, 1536, 16, false));
  EXPECT_FALSE(mamba1.tied);
  EXPECT_EQ(mamba1.lanes, 2);
  EXPECT_EQ(config(planned(DType::f32, 1, 1, 1536, 16, false)).lanes, 4);
  EXPECT_EQ(config(planned(DType::f32, 1, 8, 64, 1024, true)).lanes, 32);
  EXPECT_TRUE(config(planned(DType::bf16, 1, 8, 64, 16, true)).tied) << "though lanes idle";
  EXPECT_EQ(config(planned(DType::f32, 1, 8, 64, 13, true)).lanes, 0) << "13 is no whole vector";
  Params strided = planned(DType::bf16, 64, 80, 64, 128, true);
  strided.state.stride[3] = 2;
  EXPECT_EQ(config(strided).lanes, 0);
  Params misaligned = planned(DType::bf16, 64, 80, 64, 128, true);
  misaligned.state.data = static_cast<char*>(misaligned.state.data) + 2;
  EXPECT_EQ(config(misaligned).lanes, 0);
  EXPECT_EQ(cuda::choose(planned(DType::bf16, 64, 80, 64, 128, true), device).warps, 4);
  EXPECT_EQ(cuda::choose(planned(DType::bf16, 1, 1, 1536, 16, false), device).warps, 1);
}

}  // namespace
}  // namespace mamba_native::state_update
