// The gated norm on every device and instruction set, against the oracle; the oracle itself against
// numbers worked out by hand and against finite differences.
#include "gated_norm/gated_norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <functional>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/parallel_for.h"
#include "gated_norm/cpu.h"
#include "gated_norm/plan.h"
#include "gated_norm/reference.h"
#include "support/compare.h"
#include "support/device_memory.h"
#include "support/targets.h"
#include "support/tensor.h"

namespace mamba_native::gated_norm {
namespace {

using test::Shape;
using test::Target;
using test::Tensor;

// ---- what is computed, and by whom ----

struct Case {
  std::string name;
  std::int64_t rows = 37;
  std::int64_t groups = 2;
  std::int64_t group_size = 128;
  bool rms = true;
  bool bias = false;
  bool gate = true;  // z
  bool norm_first = true;
  bool again = false;         // backward computes y once more
  bool z_f32 = false;         // else in x's dtype
  bool weight_alike = false;  // weight in x's dtype, not float32
  bool bias_alike = false;
  bool strided = false;      // rows and features farther apart
  bool misaligned = false;   // from an odd element on
  bool expanded_dy = false;  // as y.sum().backward() makes it
  bool expanded_z = false;   // one row for all
  double offset = 0.0;       // of x: a mean far from zero
  double spread = 2.0;       // of x around offset
  double eps = 1e-5;

  std::int64_t features() const { return groups * group_size; }
};

Case with(const std::string& name, const std::function<void(Case&)>& change) {
  Case row;
  row.name = name;
  change(row);
  return row;
}

// The base row, then rows that change one thing; each before and after the gate, and as LayerNorm.
std::vector<Case> star() {
  const std::vector<Case> changes = {
      with("base", [](Case&) {}),
      with("no_gate", [](Case& c) { c.gate = false; }),
      with("bias", [](Case& c) { c.bias = true; }),
      with("output_again",
           [](Case& c) {
             c.again = true;
             c.bias = true;
           }),
      with("output_again_without_gate",
           [](Case& c) {
             c.again = true;
             c.gate = false;
           }),
      with("one_group", [](Case& c) { c.groups = 1; }),
      with("one_row", [](Case& c) { c.rows = 1; }),
      with("rows_1000", [](Case& c) { c.rows = 1000; }),
      with("z_float32", [](Case& c) { c.z_f32 = true; }),
      with("weight_alike",
           [](Case& c) {
             c.weight_alike = true;
             c.bias = true;
           }),
      with("bias_alike", [](Case& c) { c.bias = c.bias_alike = true; }),
      with("strided", [](Case& c) { c.strided = c.bias = c.again = true; }),
      with("misaligned", [](Case& c) { c.misaligned = c.bias = c.again = true; }),
      with("expanded_dy", [](Case& c) { c.expanded_dy = true; }),
      with("expanded_z", [](Case& c) { c.expanded_z = true; }),
      with("far_mean", [](Case& c) { c.offset = 5.0; }),
      // rstd above 300: what stands beside a group in a vector must not grow with it.
      with("small_values",
           [](Case& c) {
             c.rows = 2100;
             c.group_size = 31;
             c.spread = c.offset = 0.002;
           }),
  };
  std::vector<Case> rows;
  const auto add = [&](Case c) {
    for (const bool norm_first : {true, false}) {
      if (!c.gate && !norm_first) {
        continue;
      }
      for (const bool rms : {true, false}) {
        if (c.group_size == 1 && !norm_first && !rms) {
          continue;  // u - mean(u): nothing but the rounding of what was stored
        }
        Case row = c;
        row.norm_first = norm_first;
        row.rms = rms;
        row.name +=
            std::string(norm_first ? "_norm_first" : "_gate_first") + (rms ? "_rms" : "_layer");
        rows.push_back(row);
      }
    }
  };
  for (const Case& change : changes) {
    add(change);
  }
  const struct {
    std::int64_t groups;
    std::int64_t size;
  } sizes[] = {{7, 1},    {3, 2},    {5, 3},    {2, 8},    {3, 31},   {32, 64},  {2, 100},
               {8, 128},  {3, 132},  {4, 512},  {1, 768},  {3, 1000}, {1, 2560}, {1, 3001},
               {1, 5120}, {2, 5124}, {1, 8192}, {1, 8196}, {1, 20000}};
  for (const auto& size : sizes) {
    add(with("groups_" + std::to_string(size.groups) + "_of_" + std::to_string(size.size),
             [&](Case& c) {
               c.groups = size.groups;
               c.group_size = size.size;
               c.bias = true;
               c.rows = size.size > 1000 ? 5 : size.size < 4 ? 300 : 19;
               // Few values lie close together now and then; their rstd magnifies rounding.
               c.eps = size.size < 4 ? 0.5 : 1e-5;
             }));
  }
  return rows;
}

Shape matrix(const Case& c) {
  if (c.strided) {
    return {{c.rows, c.features()}, {3 * c.features() + 5, 3}, 2};
  }
  return {{c.rows, c.features()}, {}, c.misaligned ? 1 : 0};
}

struct Problem {
  Case c;
  DType dtype = DType::f32;  // of x
  Tensor x, weight, bias, z, dy;

  DType sum_dtype() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }

  // A copy, in float64 or as it is.
  Problem to(bool exact, Device device) const {
    const auto copy = [&](const Tensor& tensor) {
      return tensor.to(exact ? DType::f64 : tensor.dtype(), device);
    };
    return {c, exact ? DType::f64 : dtype, copy(x), copy(weight), copy(bias), copy(z), copy(dy)};
  }
};

Problem make(const Case& c, DType dtype, unsigned seed = 1) {
  std::mt19937 random(seed);
  const auto uniform = [&](DType type, const Shape& shape, double low, double high) {
    return Tensor::uniform(random, type, test::kCpu, shape, low, high);
  };
  const auto expanded = [&](std::int64_t step) { return Shape{{c.rows, c.features()}, {0, step}}; };
  Problem p;
  p.c = c;
  p.dtype = dtype;
  p.x = uniform(dtype, matrix(c), c.offset - c.spread, c.offset + c.spread);
  p.weight =
      uniform(c.weight_alike ? dtype : DType::f32, {{c.features()}, {c.strided ? 2 : 1}}, -1, 1);
  p.dy = uniform(dtype, c.expanded_dy ? expanded(0) : matrix(c), -1, 1);
  if (c.bias) {
    p.bias = uniform(c.weight_alike || c.bias_alike ? dtype : DType::f32, {{c.features()}}, -1, 1);
  }
  if (c.gate) {
    p.z = uniform(c.z_f32 ? DType::f32 : dtype, c.expanded_z ? expanded(1) : matrix(c), -3, 3);
  }
  return p;
}

struct Forward {
  Tensor y, mean, rstd;
};

struct Backward {
  Tensor dx, dz, dweight, dbias, y;
};

using RunForward = std::function<void(const ForwardParams&)>;
using RunBackward = std::function<void(const BackwardParams&)>;

ForwardParams params_of(const Problem& p, const Forward& result) {
  ForwardParams params;
  params.x = p.x.view();
  params.weight = p.weight.view();
  params.bias = p.bias.view();
  params.z = p.z.view();
  params.eps = p.c.eps;
  params.group_size = p.c.group_size;
  params.norm_before_gate = p.c.norm_first;
  params.is_rms_norm = p.c.rms;
  params.y = result.y.view();
  params.mean = result.mean.view();
  params.rstd = result.rstd.view();
  return params;
}

Forward outputs_of(const Problem& p, Device device) {
  const Shape statistics = {{p.c.groups, p.c.rows}};
  return {Tensor(p.dtype, device, matrix(p.c)),
          p.c.rms ? Tensor() : Tensor(p.sum_dtype(), device, statistics),
          Tensor(p.sum_dtype(), device, statistics)};
}

Forward run_forward(const Problem& p, Device device, const RunForward& run) {
  const Forward result = outputs_of(p, device);
  run(params_of(p, result));
  return result;
}

struct Gradient {
  Backward result;
  Tensor workspace;
  BackwardParams params;
};

// `saved`: what forward left.
Gradient gradient_of(const Problem& p, const Forward& saved, Device device) {
  const Shape columns = {{p.c.features()}};
  Gradient g;
  g.result.dx = Tensor(p.dtype, device, matrix(p.c));
  g.result.dz = p.c.gate ? Tensor(p.z.dtype(), device, matrix(p.c)) : Tensor();
  g.result.dweight = Tensor(p.sum_dtype(), device, columns);
  g.result.dbias = p.c.bias ? Tensor(p.sum_dtype(), device, columns) : Tensor();
  g.result.y = p.c.again ? Tensor(p.dtype, device, matrix(p.c)) : Tensor();
  g.workspace = Tensor(DType::f32, device,
                       {{workspace_rows(p.c.rows, p.c.groups, device), 2, p.c.features()}});
  g.params.dy = p.dy.view();
  g.params.x = p.x.view();
  g.params.weight = p.weight.view();
  g.params.bias = p.bias.view();
  g.params.z = p.z.view();
  g.params.mean = saved.mean.view();
  g.params.rstd = saved.rstd.view();
  g.params.group_size = p.c.group_size;
  g.params.norm_before_gate = p.c.norm_first;
  g.params.is_rms_norm = p.c.rms;
  g.params.dx = g.result.dx.view();
  g.params.dz = g.result.dz.view();
  g.params.dweight = g.result.dweight.view();
  g.params.dbias = g.result.dbias.view();
  g.params.y = g.result.y.view();
  g.params.workspace = g.workspace.view();
  return g;
}

Backward run_backward(const Problem& p, const Forward& saved, Device device,
                      const RunBackward& run) {
  const Gradient g = gradient_of(p, saved, device);
  run(g.params);
  return g.result;
}

struct Output {
  const char* name;
  const Tensor& got;
  const Tensor& truth;
  const Tensor& yardstick;
};

bool close(const char* op, DType dtype, const std::vector<Output>& outputs, double slack,
           bool expect) {
  bool all = true;
  for (const Output& output : outputs) {
    if (!output.truth.present()) {
      continue;
    }
    const testing::AssertionResult result =
        test::is_close(op, dtype, output.name, output.got.dtype(), output.got.values(),
                       output.truth.values(), output.yardstick.values(), slack);
    if (expect) {
      EXPECT_TRUE(result);
    }
    all = all && result;
  }
  return all;
}

bool forward_close(const Problem& p, const Forward& got, bool expect) {
  const Forward truth =
      run_forward(p.to(true, test::kCpu), test::kCpu, &reference::forward<double>);
  const Forward yard = run_forward(p, test::kCpu, &reference::forward<float>);
  bool all = close("gated_norm_forward", p.dtype,
                   {{"y", got.y, truth.y, yard.y}, {"rstd", got.rstd, truth.rstd, yard.rstd}},
                   test::kForwardSlack, expect);
  if (truth.mean.present() && got.mean.present()) {
    // An error of the mean counts beside the standard deviation: a mean of nearly zero has no
    // digits.
    const std::vector<double> rstd = truth.rstd.values();
    const auto scaled = [&](const Tensor& mean) {
      std::vector<double> values = mean.values();
      for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = values[i] * rstd[i] + 1;
      }
      return values;
    };
    const testing::AssertionResult result =
        test::is_close("gated_norm_forward", p.dtype, "mean", got.mean.dtype(), scaled(got.mean),
                       scaled(truth.mean), scaled(yard.mean), test::kForwardSlack);
    if (expect) {
      EXPECT_TRUE(result);
    }
    all = all && result;
  }
  return all;
}

// What forward leaves; statistics lie row by row where the rows are strided.
Forward saved_on(const Problem& p, Device device) {
  const Forward saved = run_forward(p, test::kCpu, &reference::forward<float>);
  const auto copy = [&](const Tensor& tensor) {
    return tensor.present() && p.c.strided
               ? Tensor::from_values(tensor.dtype(), device,
                                     {{p.c.groups, p.c.rows}, {1, p.c.groups}}, tensor.values())
               : tensor.to(tensor.dtype(), device);
  };
  return {Tensor(), copy(saved.mean), copy(saved.rstd)};
}

// The truth of backward is the gradient at what it is given: the rounded statistics, exactly.
bool backward_close(const Problem& p, const Backward& got, bool expect) {
  const Forward saved = saved_on(p, test::kCpu);
  const auto copy = [](const Tensor& tensor) { return tensor.to(DType::f64, test::kCpu); };
  const Forward exact = {Tensor(), copy(saved.mean), copy(saved.rstd)};
  const Backward truth =
      run_backward(p.to(true, test::kCpu), exact, test::kCpu, &reference::backward<double>);
  const Backward yard = run_backward(p, saved, test::kCpu, &reference::backward<float>);
  return close("gated_norm_backward", p.dtype,
               {{"dx", got.dx, truth.dx, yard.dx},
                {"dz", got.dz, truth.dz, yard.dz},
                {"dweight", got.dweight, truth.dweight, yard.dweight},
                {"dbias", got.dbias, truth.dbias, yard.dbias},
                {"y", got.y, truth.y, yard.y}},
               test::kGradientSlack, expect);
}

// ---- every implementation on every row ----

RunForward forward_on(const Target& target) {
  return test::on<ForwardParams>(target, &forward, &cpu::forward);
}

RunBackward backward_on(const Target& target) {
  return test::on<BackwardParams>(target, &backward, &cpu::backward);
}

using GatedNorm = test::RowTest<Case>;

TEST_P(GatedNorm, ForwardMatchesTheOracle) {
  const auto& [target, dtype, problem] = GetParam();
  const Problem p = make(problem, dtype);
  forward_close(p, run_forward(p.to(false, target.device), target.device, forward_on(target)),
                true);
}

TEST_P(GatedNorm, BackwardMatchesTheOracle) {
  const auto& [target, dtype, problem] = GetParam();
  const Problem p = make(problem, dtype);
  const Backward got = run_backward(p.to(false, target.device), saved_on(p, target.device),
                                    target.device, backward_on(target));
  backward_close(p, got, true);
}

INSTANTIATE_TEST_SUITE_P(Star, GatedNorm, testing::ValuesIn(test::rows(star())),
                         test::row_name<Case>);

using GatedNormTarget = test::TargetTest;

// An implementation that forgot a term must not pass: each is dropped here in turn, on its side
// only.
TEST_P(GatedNormTarget, NoticesADroppedTerm) {
  const Target& target = GetParam();
  for (const bool norm_first : {true, false}) {
    const Problem p = make(with("mutation",
                                [&](Case& c) {
                                  c.rms = false;
                                  c.bias = c.again = true;
                                  c.norm_first = norm_first;
                                  c.offset = 0.5;
                                }),
                           DType::f32);
    const Problem there = p.to(false, target.device);
    const std::function<void(ForwardParams&)> forward_mutations[] = {
        [](ForwardParams& f) { f.bias = TensorView(); },
        [](ForwardParams& f) { f.z = TensorView(); },
        [](ForwardParams& f) { f.z = f.x; },
        [](ForwardParams& f) { f.weight = f.bias; },
        [](ForwardParams& f) { f.eps = 0.1; },
        [](ForwardParams& f) { f.norm_before_gate = !f.norm_before_gate; },
        [](ForwardParams& f) {
          f.is_rms_norm = true;
          f.mean = TensorView();
        },
        [](ForwardParams& f) {
          f.group_size *= 2;
          f.mean.size[0] = f.rstd.size[0] = 1;
        },
    };
    for (std::size_t i = 0; i < std::size(forward_mutations); ++i) {
      const Forward got = run_forward(there, target.device, [&](const ForwardParams& params) {
        ForwardParams changed = params;
        forward_mutations[i](changed);
        forward_on(target)(changed);
      });
      EXPECT_FALSE(forward_close(p, got, false)) << "forward mutation " << i;
    }
    const std::function<void(BackwardParams&)> backward_mutations[] = {
        [](BackwardParams& b) { b.weight = b.bias; },
        [](BackwardParams& b) { b.dy = b.x; },
        [](BackwardParams& b) { b.z = b.x; },
        [](BackwardParams& b) { b.bias = b.weight; },
        [](BackwardParams& b) { b.norm_before_gate = !b.norm_before_gate; },
        [](BackwardParams& b) { b.rstd = b.mean; },
        [](BackwardParams& b) {
          b.is_rms_norm = true;
          b.mean = TensorView();
        },
    };
    for (std::size_t i = 0; i < std::size(backward_mutations); ++i) {
      const Backward got = run_backward(there, saved_on(p, target.device), target.device,
                                        [&](const BackwardParams& params) {
                                          BackwardParams changed = params;
                                          backward_mutations[i](changed);
                                          backward_on(target)(changed);
                                        });
      EXPECT_FALSE(backward_close(p, got, false)) << "backward mutation " << i;
    }
  }
}

TEST_P(GatedNormTarget, EmptyRowsGiveZeroGradients) {
  const Target& target = GetParam();
  const Problem p = make(with("empty",
                              [](Case& c) {
                                c.rows = 0;
                                c.rms = false;
                                c.bias = true;
                              }),
                         DType::f32)
                        .to(false, target.device);
  const Forward result = run_forward(p, target.device, &forward);
  EXPECT_TRUE(result.y.values().empty());
  const Backward gradients = run_backward(p, result, target.device, &backward);
  EXPECT_EQ(gradients.dweight.values(), std::vector<double>(256, 0.0));
  EXPECT_EQ(gradients.dbias.values(), std::vector<double>(256, 0.0));
}

TEST_P(GatedNormTarget, GradientsAreTheSameInEveryRun) {
  const Target& target = GetParam();
  const Problem p = make(with("repeat", [](Case& c) { c.rows = 777; }), DType::f32);
  const Problem there = p.to(false, target.device);
  const Forward saved = saved_on(p, target.device);
  const Backward once = run_backward(there, saved, target.device, backward_on(target));
  for (int repeat = 0; repeat < 3; ++repeat) {
    set_num_threads(repeat + 1);
    const Backward again = run_backward(there, saved, target.device, backward_on(target));
    EXPECT_EQ(again.dweight.bytes(), once.dweight.bytes());
    EXPECT_EQ(again.dx.bytes(), once.dx.bytes());
    EXPECT_EQ(again.dz.bytes(), once.dz.bytes());
  }
  set_num_threads(0);
}

// A gate so far down that exp overflows closes: y and the gradients are zeros, not NaN.
TEST_P(GatedNormTarget, ClosedGatesGiveZeros) {
  const Target& target = GetParam();
  for (const bool norm_first : {true, false}) {
    Problem p = make(with("closed", [&](Case& c) { c.norm_first = norm_first; }), DType::f32);
    p.z = Tensor::from_values(
        DType::f32, test::kCpu, {{p.c.rows, p.c.features()}},
        std::vector<double>(static_cast<std::size_t>(p.c.rows * p.c.features()), -200.0));
    const Problem there = p.to(false, target.device);
    const Forward got = run_forward(there, target.device, forward_on(target));
    const Backward gradients = run_backward(there, got, target.device, backward_on(target));
    for (const Tensor* tensor : {&got.y, &gradients.dx, &gradients.dz}) {
      for (const double value : tensor->values()) {
        ASSERT_NEAR(value, 0.0, 1e-30);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, GatedNormTarget, testing::ValuesIn(test::kTargets),
                         test::target_name);

// Rows that start 2^21 elements apart, so that the last ones lie beyond 2^31 elements.
TEST(GatedNormCudaLarge, RowsBeyondTwoToThe31) {
  const std::string reason = test::cuda_unavailable();
  if (!reason.empty()) {
    GTEST_SKIP() << reason;
  }
  for (const std::int64_t group_size : {128, 127}) {  // whole vectors, and not
    const std::int64_t distance = std::int64_t{1} << 21;
    const Problem p = make(with("large",
                                [&](Case& c) {
                                  c.rows = 1030;
                                  c.group_size = group_size;
                                }),
                           DType::f32);
    const std::int64_t rows = p.c.rows, features = p.c.features();
    const Forward expected =
        run_forward(p.to(true, test::kCpu), test::kCpu, &reference::forward<double>);
    const Backward gradients =
        run_backward(p.to(true, test::kCpu), expected, test::kCpu, &reference::backward<double>);
    const Problem there = p.to(false, test::kCuda);
    char* const memory =
        static_cast<char*>(test::device_allocate(static_cast<std::size_t>(rows * distance) * 4));
    const auto spread = [&](TensorView view) {
      view.data = memory;
      view.stride[0] = distance;
      return view;
    };
    const auto compare_row = [&](const Tensor& truth, std::int64_t row) {
      std::vector<float> got(static_cast<std::size_t>(features));
      test::copy_from_device(got.data(), memory + static_cast<std::size_t>(row * distance) * 4,
                             got.size() * 4);
      const std::vector<double> all = truth.values();
      const std::vector<double> wanted(all.begin() + row * features,
                                       all.begin() + (row + 1) * features);
      EXPECT_LE(test::nmse(std::vector<double>(got.begin(), got.end()), wanted), 1e-11) << row;
    };
    // Outputs go to the spread rows, then backward writes its gradient there.
    const Forward result = outputs_of(there, test::kCuda);
    ForwardParams params = params_of(there, result);
    params.y = spread(params.y);
    forward(params);
    for (const std::int64_t row : {std::int64_t{0}, std::int64_t{1024}, rows - 1}) {
      compare_row(expected.y, row);
    }
    Gradient g = gradient_of(there, result, test::kCuda);
    g.params.dz = spread(g.params.dz);
    backward(g.params);
    for (const std::int64_t row : {std::int64_t{0}, std::int64_t{1024}, rows - 1}) {
      compare_row(gradients.dz, row);
    }
    test::device_release(memory);
  }
}

// ---- the oracle ----

Tensor exactly(Shape shape, const std::vector<double>& values) {
  return Tensor::from_values(DType::f64, test::kCpu, shape, values);
}

// Two groups of two; silu(ln 3) = 3/4 ln 3, silu(0) = 0. RMS of (3, 4) is sqrt(12.5).
TEST(GatedNormOracle, ForwardByHand) {
  Problem p;
  p.dtype = DType::f64;
  p.c = with("hand", [](Case& c) {
    c.rows = 1;
    c.groups = 2;
    c.group_size = 2;
    c.bias = true;
    c.eps = 0;
  });
  p.x = exactly({{1, 4}}, {3, 4, 1, -1});
  p.z = exactly({{1, 4}}, {std::log(3.0), std::log(3.0), 0, std::log(3.0)});
  p.weight = exactly({{4}}, {1, 2, 1, -1});
  p.bias = exactly({{4}}, {0, 0, 10, 0});
  const double gate = 0.75 * std::log(3.0), rstd = 1 / std::sqrt(12.5);
  const auto expect = [](const Forward& got, const std::vector<double>& y,
                         const std::vector<double>& statistics) {
    for (std::size_t i = 0; i < y.size(); ++i) {
      EXPECT_NEAR(got.y.values()[i], y[i], 1e-14);
    }
    for (std::size_t i = 0; i < statistics.size(); ++i) {
      EXPECT_NEAR(got.rstd.values()[i], statistics[i], 1e-14);
    }
  };
  expect(run_forward(p, test::kCpu, &forward), {3 * rstd * gate, 8 * rstd * gate, 0, gate},
         {rstd, 1});
  // The gate first: (3, 4) gate has the same direction, and (0, -gate) an RMS of gate / sqrt(2).
  p.c.norm_first = false;
  expect(run_forward(p, test::kCpu, &forward), {3 * rstd, 8 * rstd, 10, std::sqrt(2.0)},
         {rstd / gate, std::sqrt(2.0) / gate});
  // LayerNorm without gate: of (3, 4) it leaves (-1, 1), and (1, -1) as it is.
  p.c.rms = p.c.gate = false;
  p.z = Tensor();
  const Forward layer = run_forward(p, test::kCpu, &forward);
  expect(layer, {-1, 2, 11, 1}, {2, 1});
  EXPECT_EQ(layer.mean.values(), (std::vector<double>{3.5, 0}));
}

// RMS, x = (3, 4), rstd = 1 / sqrt(12.5), w = 1, dv = dy gate with dy = (1, 0):
// du = (1 - 9/25, -12/25) rstd gate;  dz = dy xhat silu'(z), silu'(0) = 1/2 and silu(0) = 0.
TEST(GatedNormOracle, BackwardByHand) {
  Problem p;
  p.dtype = DType::f64;
  p.c = with("hand", [](Case& c) {
    c.rows = 1;
    c.groups = 1;
    c.group_size = 2;
    c.bias = true;
  });
  const double rstd = 1 / std::sqrt(12.5), gate = 0.75 * std::log(3.0);
  p.x = exactly({{1, 2}}, {3, 4});
  p.z = exactly({{1, 2}}, {std::log(3.0), std::log(3.0)});
  p.weight = exactly({{2}}, {1, 1});
  p.bias = exactly({{2}}, {0, 0});
  p.dy = exactly({{1, 2}}, {1, 0});
  Forward saved;
  saved.rstd = exactly({{1, 1}}, {rstd});
  const Backward got = run_backward(p, saved, test::kCpu, &backward);
  EXPECT_NEAR(got.dx.values()[0], 16.0 / 25 * rstd * gate, 1e-15);
  EXPECT_NEAR(got.dx.values()[1], -12.0 / 25 * rstd * gate, 1e-15);
  EXPECT_NEAR(got.dweight.values()[0], 3 * rstd * gate, 1e-15);
  EXPECT_EQ(got.dweight.values()[1], 0.0);
  EXPECT_NEAR(got.dbias.values()[0], gate, 1e-15);
  EXPECT_NEAR(got.dz.values()[0], 3 * rstd * 0.75 * (1 + std::log(3.0) / 4), 1e-15);
  EXPECT_EQ(got.dz.values()[1], 0.0);
}

// d/dt of sum(dy y) along one element at a time.
TEST(GatedNormOracle, BackwardMatchesFiniteDifferences) {
  for (const bool rms : {true, false}) {
    for (const int gate : {0, 1, 2}) {
      Problem p = make(with("differences",
                            [&](Case& c) {
                              c.rows = 3;
                              c.group_size = 5;
                              c.rms = rms;
                              c.bias = true;
                              c.gate = gate > 0;
                              c.norm_first = gate == 1;
                            }),
                       DType::f32)
                      .to(true, test::kCpu);
      const auto loss = [&] {
        const std::vector<double> y = run_forward(p, test::kCpu, &forward).y.values(),
                                  dy = p.dy.values();
        double sum = 0;
        for (std::size_t i = 0; i < y.size(); ++i) {
          sum += y[i] * dy[i];
        }
        return sum;
      };
      const Backward got =
          run_backward(p, run_forward(p, test::kCpu, &forward), test::kCpu, &backward);
      const struct {
        const Tensor& input;
        const Tensor& gradient;
      } pairs[] = {{p.x, got.dx}, {p.weight, got.dweight}, {p.bias, got.dbias}, {p.z, got.dz}};
      for (const auto& pair : pairs) {
        const std::vector<double> gradient = pair.gradient.values();
        double* const input = pair.input.present() ? pair.input.view().as<double>() : nullptr;
        for (std::size_t i = 0; i < gradient.size(); ++i) {
          constexpr double kStep = 1e-5;
          const double there = input[i];
          input[i] = there + kStep;
          const double above = loss();
          input[i] = there - kStep;
          const double below = loss();
          input[i] = there;
          EXPECT_NEAR((above - below) / (2 * kStep), gradient[i], 1e-7);
        }
      }
    }
  }
}

// ---- errors ----

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

TEST(GatedNormErrors, BadForwardNamesTheArgumentAndTouchesNothing) {
  const Problem p = make(with("errors",
                              [](Case& c) {
                                c.rms = false;
                                c.bias = true;
                              }),
                         DType::f32);
  const struct {
    const char* message;
    std::function<void(ForwardParams&)> spoil;
  } rows[] = {
      {"x must have shape (rows, features)", [](ForwardParams& f) { f.x.dim = 1; }},
      {"at least one feature", [](ForwardParams& f) { f.x.size[1] = 0; }},
      {"x must be", [](ForwardParams& f) { f.x.dtype = DType::i32; }},
      {"x has no memory", [](ForwardParams& f) { f.x.data = nullptr; }},
      {"group_size must divide the 256 features of x, got 0",
       [](ForwardParams& f) { f.group_size = 0; }},
      {"group_size must divide", [](ForwardParams& f) { f.group_size = -128; }},
      {"group_size must divide", [](ForwardParams& f) { f.group_size = 100; }},
      {"group_size must divide", [](ForwardParams& f) { f.group_size = 512; }},
      {"weight must have shape", [](ForwardParams& f) { f.weight.size[0] = 5; }},
      {"weight must have shape", [](ForwardParams& f) { f.weight = TensorView(); }},
      {"weight must be on cpu", [](ForwardParams& f) { f.weight.device = test::kCuda; }},
      {"weight must be float64 exactly", [](ForwardParams& f) { f.weight.dtype = DType::f64; }},
      {"bias must be", [](ForwardParams& f) { f.bias.dtype = DType::i64; }},
      {"z must have shape", [](ForwardParams& f) { f.z.size[0] -= 1; }},
      {"z must be", [](ForwardParams& f) { f.z.dtype = DType::i32; }},
      {"y must be float32", [](ForwardParams& f) { f.y.dtype = DType::bf16; }},
      {"y is written", [](ForwardParams& f) { f.y.stride[0] = 0; }},
      {"mean belongs to LayerNorm", [](ForwardParams& f) { f.mean = TensorView(); }},
      {"mean belongs to LayerNorm", [](ForwardParams& f) { f.is_rms_norm = true; }},
      {"mean must be contiguous", [](ForwardParams& f) { f.mean.stride[1] = 2; }},
      {"rstd", [](ForwardParams& f) { f.rstd = TensorView(); }},
      {"rstd must have shape", [](ForwardParams& f) { f.rstd.size[0] = 1; }},
      {"rstd must be float32", [](ForwardParams& f) { f.rstd.dtype = DType::bf16; }},
  };
  for (const auto& row : rows) {
    const Forward out = outputs_of(p, test::kCpu);
    const std::vector<unsigned char> before = out.y.bytes();
    ForwardParams params = params_of(p, out);
    row.spoil(params);
    const std::string message = error_of([&] { forward(params); });
    EXPECT_NE(message.find(row.message), std::string::npos) << row.message << ": " << message;
    EXPECT_EQ(out.y.bytes(), before) << row.message;
  }
}

TEST(GatedNormErrors, BadBackwardNamesTheArgumentAndTouchesNothing) {
  const Problem p = make(with("errors",
                              [](Case& c) {
                                c.rms = false;
                                c.bias = c.again = true;
                              }),
                         DType::bf16);
  const Forward saved = saved_on(p, test::kCpu);
  const struct {
    const char* message;
    std::function<void(BackwardParams&)> spoil;
  } rows[] = {
      {"x must have shape (rows, features)", [](BackwardParams& b) { b.x.dim = 3; }},
      {"group_size must divide", [](BackwardParams& b) { b.group_size = 3; }},
      {"dy must have shape", [](BackwardParams& b) { b.dy.size[0] += 1; }},
      {"dy must be bfloat16", [](BackwardParams& b) { b.dy.dtype = DType::f32; }},
      {"weight must have shape", [](BackwardParams& b) { b.weight.dim = 2; }},
      {"mean belongs to LayerNorm", [](BackwardParams& b) { b.mean = TensorView(); }},
      {"rstd must have shape", [](BackwardParams& b) { b.rstd.size[1] = 1; }},
      {"dx must be bfloat16", [](BackwardParams& b) { b.dx.dtype = DType::f32; }},
      {"dx is written", [](BackwardParams& b) { b.dx.stride[1] = 0; }},
      {"dz must be given exactly when z is", [](BackwardParams& b) { b.dz = TensorView(); }},
      {"dz must be given exactly when z is", [](BackwardParams& b) { b.z = TensorView(); }},
      {"dz must be bfloat16", [](BackwardParams& b) { b.dz.dtype = DType::f32; }},
      {"dweight must be float32", [](BackwardParams& b) { b.dweight.dtype = DType::bf16; }},
      {"dbias must have shape", [](BackwardParams& b) { b.dbias.size[0] -= 1; }},
      {"dbias must be given exactly", [](BackwardParams& b) { b.dbias = TensorView(); }},
      {"dbias must be contiguous", [](BackwardParams& b) { b.dbias.stride[0] = 2; }},
      {"y must be bfloat16", [](BackwardParams& b) { b.y.dtype = DType::f32; }},
      {"workspace must have shape", [](BackwardParams& b) { b.workspace.size[0] += 1; }},
      {"workspace must be float32", [](BackwardParams& b) { b.workspace.dtype = DType::f64; }},
      {"workspace must be contiguous", [](BackwardParams& b) { b.workspace.stride[2] = 2; }},
  };
  for (const auto& row : rows) {
    Gradient g = gradient_of(p, saved, test::kCpu);
    const std::vector<unsigned char> before = g.result.dx.bytes();
    row.spoil(g.params);
    const std::string message = error_of([&] { backward(g.params); });
    EXPECT_NE(message.find(row.message), std::string::npos) << row.message << ": " << message;
    EXPECT_EQ(g.result.dx.bytes(), before) << row.message;
  }
}

// ---- the plan ----

struct Planned {
  ForwardParams forward;
  BackwardParams backward;
};

Planned planned(std::int64_t rows, std::int64_t groups, std::int64_t group_size) {
  alignas(16) static char memory[16];
  mamba_native::cuda::DeviceInfo device;
  device.multiprocessors = 132;
  const std::int64_t features = groups * group_size;
  Planned p;
  p.forward.x = p.forward.y = p.forward.z =
      TensorView(memory, DType::bf16, {rows, features}, test::kCuda);
  p.forward.weight = TensorView(memory, DType::f32, {features}, test::kCuda);
  p.forward.group_size = p.backward.group_size = group_size;
  p.backward.dy = p.backward.x = p.backward.z = p.backward.dx = p.backward.dz = p.forward.x;
  p.backward.weight = p.forward.weight;
  p.backward.workspace = TensorView(
      memory, DType::f32, {cuda::workspace_rows(rows, groups, device), 2, features}, test::kCuda);
  return p;
}

TEST(GatedNormPlan, AGroupIsHeldOrWalked) {
  for (std::int64_t size = 1; size < 20000; size += size < 300 ? 1 : 97) {
    for (const std::int64_t groups : {1, 8}) {
      const Planned p = planned(1000, groups, size);
      const cuda::Plan plan = cuda::choose_forward(p.forward);
      const cuda::Config& config = cuda::kForwardConfigs[plan.config];
      EXPECT_EQ(plan.threads % 32, 0) << size;
      EXPECT_LE(plan.threads * plan.rows, config.threads) << size;
      EXPECT_GE(plan.blocks * plan.rows, 1000) << size;
      EXPECT_EQ(plan.group_blocks, groups);
      EXPECT_EQ(config.vectors > 0, size % cuda::kVector == 0 && size <= 8192) << size;
      if (config.vectors > 0) {
        EXPECT_GE(std::int64_t{plan.threads} * config.vectors * cuda::kVector, size);
      }
      const cuda::Plan backward = cuda::choose_backward(p.backward);
      const cuda::Config& backward_config = cuda::kBackwardConfigs[backward.config];
      EXPECT_EQ(backward.threads % 32, 0) << size;
      EXPECT_LE(backward.threads * backward.rows, backward_config.threads) << size;
      EXPECT_LE(backward.blocks, p.backward.workspace.size[0]);
      EXPECT_GE(backward.blocks, 1);
      EXPECT_EQ(backward_config.vectors > 0, size % cuda::kVector == 0 && size <= 5120) << size;
    }
  }
  const cuda::Plan model = cuda::choose_forward(planned(16384, 1, 5120).forward);
  EXPECT_EQ(model.threads * cuda::kForwardConfigs[model.config].vectors * cuda::kVector, 5120);
}

TEST(GatedNormPlan, OneTensorOutOfLineIsWalked) {
  const auto shift = [](TensorView& tensor) { tensor.data = static_cast<char*>(tensor.data) + 4; };
  Planned p = planned(1000, 2, 256);
  shift(p.forward.z);
  shift(p.backward.dz);
  EXPECT_EQ(cuda::kForwardConfigs[cuda::choose_forward(p.forward).config].vectors, 0);
  EXPECT_EQ(cuda::kBackwardConfigs[cuda::choose_backward(p.backward).config].vectors, 0);
}

TEST(GatedNormPlan, AGridHasOnlySoManyGroups) {
  const Planned p = planned(3, 100000, 4);
  for (const cuda::Plan& plan :
       {cuda::choose_forward(p.forward), cuda::choose_backward(p.backward)}) {
    EXPECT_EQ(plan.group_blocks, cuda::kMostGroupBlocks);
  }
  EXPECT_EQ(cuda::kForwardConfigs[cuda::choose_forward(p.forward).config].vectors, 0);
  EXPECT_EQ(cuda::kBackwardConfigs[cuda::choose_backward(p.backward).config].vectors, 0);
  EXPECT_EQ(p.backward.workspace.size[0], 1);
}

}  // namespace
}  // namespace mamba_native::gated_norm
