// LayerNorm and RMSNorm on every device and instruction set, against the oracle; the oracle itself
// against numbers worked out by hand and against finite differences.
#include "layer_norm/layer_norm.h"

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
#include "layer_norm/cpu.h"
#include "layer_norm/dropout.h"
#include "layer_norm/plan.h"
#include "layer_norm/reference.h"
#include "support/compare.h"
#include "support/device_memory.h"
#include "support/targets.h"
#include "support/tensor.h"

namespace mamba_native::layer_norm {
namespace {

using test::Shape;
using test::Target;
using test::Tensor;

// ---- what is computed, and by whom ----

struct Case {
  std::string name;
  std::int64_t rows = 37;
  std::int64_t features = 256;
  bool rms = true;
  bool bias = false;
  bool residual = true;
  bool residual_f32 = true;     // else in x's dtype
  bool stores_residual = true;  // residual_out
  bool weight_alike = false;    // weight and bias in x's dtype, not float32
  bool strided = false;         // rows and features farther apart
  bool misaligned = false;      // from an odd element on
  bool expanded_dy = false;     // as y.sum().backward() makes it
  bool expanded_x = false;      // one row for all
  bool x1 = false;              // a second branch, in float32
  bool weight1 = false;         // a second output, with a bias where the first has one
  bool rowscale = false;
  double dropout = 0.0;
  double offset = 0.0;  // of x: a mean far from zero
  double spread = 2.0;  // of x around offset
  double eps = 1e-5;

  bool branches() const { return x1 || weight1 || rowscale || dropout > 0.0; }
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
      with("layer_norm",
           [](Case& c) {
             c.rms = false;
             c.bias = true;
           }),
      with("layer_norm_without_bias", [](Case& c) { c.rms = false; }),
      with("rms_with_bias", [](Case& c) { c.bias = true; }),
      with("no_residual", [](Case& c) { c.residual = c.stores_residual = false; }),
      with("no_residual_but_stored", [](Case& c) { c.residual = false; }),
      with("residual_alike", [](Case& c) { c.residual_f32 = false; }),
      with("residual_not_stored", [](Case& c) { c.stores_residual = false; }),
      with("weight_alike",
           [](Case& c) {
             c.weight_alike = true;
             c.bias = true;
           }),
      with("one_row", [](Case& c) { c.rows = 1; }),
      with("rows_1000", [](Case& c) { c.rows = 1000; }),
      with("strided", [](Case& c) { c.strided = true; }),
      with("misaligned", [](Case& c) { c.misaligned = true; }),
      with("expanded_dy", [](Case& c) { c.expanded_dy = true; }),
      with("expanded_x", [](Case& c) { c.expanded_x = true; }),
      with("far_mean",
           [](Case& c) {
             c.rms = false;
             c.offset = 5.0;
             c.residual = false;
           }),
      with("layer_norm_strided",
           [](Case& c) {
             c.rms = false;
             c.bias = true;
             c.strided = true;
           }),
  };
  const auto everything = [](Case& c) {
    c.rms = false;
    c.bias = c.x1 = c.weight1 = c.rowscale = true;
    c.dropout = 0.25;
  };
  const std::vector<Case> branches = {
      with("x1", [](Case& c) { c.x1 = true; }),
      with("x1_without_residual",
           [](Case& c) {
             c.x1 = true;
             c.residual = false;
           }),
      with("weight1", [](Case& c) { c.weight1 = true; }),
      with("weight1_of_x_alone",
           [](Case& c) {
             c.weight1 = true;
             c.residual = c.stores_residual = false;
           }),
      with("weight1_and_bias1", [](Case& c) { c.weight1 = c.bias = true; }),
      with("rowscale", [](Case& c) { c.rowscale = true; }),
      with("dropout", [](Case& c) { c.dropout = 0.1; }),
      with("dropout_of_everything", [](Case& c) { c.dropout = 1.0; }),
      with("everything", everything),
      with("everything_strided",
           [&](Case& c) {
             everything(c);
             c.strided = true;
           }),
      with("everything_misaligned",
           [&](Case& c) {
             everything(c);
             c.misaligned = true;
           }),
      with("everything_expanded_dy",
           [&](Case& c) {
             everything(c);
             c.expanded_dy = true;
           }),
      with("everything_alike",
           [&](Case& c) {
             everything(c);
             c.residual_f32 = false;
             c.weight_alike = true;
           }),
      // rstd above 300: what stands beside a row in a vector must not grow with it from row to row.
      with("small_values",
           [](Case& c) {
             c.rms = false;
             c.rows = 2100;
             c.features = 31;
             c.residual = c.stores_residual = false;
             c.spread = 0.002;
             c.offset = 0.002;
           }),
  };
  rows.insert(rows.end(), branches.begin(), branches.end());
  for (const std::int64_t features : {1, 31, 100, 128, 768, 1000, 4096, 5120, 8192, 8196}) {
    rows.push_back(with("everything_features_" + std::to_string(features), [&](Case& c) {
      everything(c);
      c.features = features;
      c.rows = features > 1000 ? 5 : features < 4 ? 300 : 19;
      c.eps = features < 4 ? 0.5 : 1e-5;
    }));
  }
  for (const std::int64_t features :
       {1, 2, 3, 8, 31, 64, 100, 128, 132, 512, 768, 1000, 2560, 3001, 5120, 8192, 16384, 20000}) {
    for (const bool rms : {true, false}) {
      rows.push_back(
          with((rms ? "rms_features_" : "layer_norm_features_") + std::to_string(features),
               [&](Case& c) {
                 c.features = features;
                 c.rms = rms;
                 c.bias = !rms;
                 c.rows = features > 1000 ? 5 : features < 4 ? 300 : 19;
                 // Few values lie close together now and then, and their rstd magnifies rounding.
                 c.eps = features < 4 ? 0.5 : 1e-5;
               }));
    }
  }
  return rows;
}

Shape matrix(const Case& c, bool expanded = false) {
  if (expanded) {
    return {{c.rows, c.features}, {0, c.expanded_dy ? 0 : 1}};
  }
  if (c.strided) {
    return {{c.rows, c.features}, {3 * c.features + 5, 3}, 2};
  }
  return {{c.rows, c.features}, {}, c.misaligned ? 1 : 0};
}

struct Problem {
  Case c;
  DType dtype = DType::f32;  // of x
  Tensor x, weight, bias, residual, dy, dresidual_out;
  Tensor x1, weight1, bias1, rowscale, dy1, seed;

  DType residual_dtype() const {
    return dtype == DType::f64 ? DType::f64 : c.residual_f32 ? DType::f32 : dtype;
  }
  DType sum_dtype() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }

  // A copy, in float64 or as it is.
  Problem to(bool exact, Device device) const {
    const auto copy = [&](const Tensor& tensor) {
      return tensor.to(exact ? DType::f64 : tensor.dtype(), device);
    };
    return {c,           exact ? DType::f64 : dtype,
            copy(x),     copy(weight),
            copy(bias),  copy(residual),
            copy(dy),    copy(dresidual_out),
            copy(x1),    copy(weight1),
            copy(bias1), copy(rowscale),
            copy(dy1),   seed.to(seed.dtype(), device)};
  }
};

Problem make(const Case& c, DType dtype, unsigned seed = 1) {
  std::mt19937 random(seed);
  const auto uniform = [&](DType type, const Shape& shape, double low, double high) {
    return Tensor::uniform(random, type, test::kCpu, shape, low, high);
  };
  const DType parameter = c.weight_alike ? dtype : DType::f32;
  Problem p;
  p.c = c;
  p.dtype = dtype;
  p.x = uniform(dtype, matrix(c, c.expanded_x), c.offset - c.spread, c.offset + c.spread);
  p.weight = uniform(parameter, {{c.features}, {c.strided ? 2 : 1}}, -1, 1);
  p.dy = uniform(dtype, matrix(c, c.expanded_dy), -1, 1);
  if (c.bias) {
    p.bias = uniform(parameter, {{c.features}}, -1, 1);
  }
  if (c.residual) {
    p.residual = uniform(p.residual_dtype(), matrix(c), -1, 1);
  }
  if (c.stores_residual) {
    p.dresidual_out = uniform(p.residual_dtype(), matrix(c), -1, 1);
  }
  if (c.x1) {
    p.x1 = uniform(DType::f32, matrix(c), -2, 2);
  }
  if (c.weight1) {
    p.weight1 = uniform(parameter, {{c.features}}, -1, 1);
    p.dy1 = uniform(dtype, matrix(c, c.expanded_dy), -1, 1);
    if (c.bias) {
      p.bias1 = uniform(parameter, {{c.features}}, -1, 1);
    }
  }
  if (c.rowscale) {
    p.rowscale = uniform(DType::f32, {{c.rows}, {c.strided ? 2 : 1}}, -2, 2);
  }
  if (c.dropout > 0.0) {
    p.seed = Tensor::from_values(DType::i64, test::kCpu, {{1}}, {-1234567890123.0});
  }
  return p;
}

struct Forward {
  Tensor y, residual_out, mean, rstd, y1;
};

struct Backward {
  Tensor dx, dresidual, dweight, dbias, dx1, dweight1, dbias1;
};

using RunForward = std::function<void(const ForwardParams&)>;
using RunBackward = std::function<void(const BackwardParams&)>;

ForwardParams params_of(const Problem& p, const Forward& result) {
  ForwardParams params;
  params.x = p.x.view();
  params.weight = p.weight.view();
  params.bias = p.bias.view();
  params.residual = p.residual.view();
  params.eps = p.c.eps;
  params.is_rms_norm = p.c.rms;
  params.y = result.y.view();
  params.residual_out = result.residual_out.view();
  params.mean = result.mean.view();
  params.rstd = result.rstd.view();
  params.x1 = p.x1.view();
  params.weight1 = p.weight1.view();
  params.bias1 = p.bias1.view();
  params.rowscale = p.rowscale.view();
  params.dropout = {p.c.dropout, p.seed.view()};
  params.y1 = result.y1.view();
  return params;
}

Forward outputs_of(const Problem& p, Device device) {
  const DType sum = p.sum_dtype();
  return {Tensor(p.dtype, device, matrix(p.c)),
          p.c.stores_residual ? Tensor(p.residual_dtype(), device, matrix(p.c)) : Tensor(),
          p.c.rms ? Tensor() : Tensor(sum, device, {{p.c.rows}}), Tensor(sum, device, {{p.c.rows}}),
          p.c.weight1 ? Tensor(p.dtype, device, matrix(p.c)) : Tensor()};
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

// `saved`: what forward left. Without residual_out the normalised sum is x.
Gradient gradient_of(const Problem& p, const Forward& saved, Device device) {
  const DType sum = p.sum_dtype();
  const Tensor& h = saved.residual_out.present() ? saved.residual_out : p.x;
  Gradient g;
  g.result.dx = Tensor(p.dtype, device, matrix(p.c));
  g.result.dresidual =
      h.dtype() != p.dtype || p.c.branches() ? Tensor(h.dtype(), device, matrix(p.c)) : Tensor();
  g.result.dweight = Tensor(sum, device, {{p.c.features}});
  g.result.dbias = p.c.bias ? Tensor(sum, device, {{p.c.features}}) : Tensor();
  if (p.c.x1) {
    g.result.dx1 = Tensor(p.x1.dtype(), device, matrix(p.c));
  }
  if (p.c.weight1) {
    g.result.dweight1 = Tensor(sum, device, {{p.c.features}});
    g.result.dbias1 = p.c.bias ? Tensor(sum, device, {{p.c.features}}) : Tensor();
  }
  g.workspace = Tensor(DType::f32, device,
                       {{workspace_rows(p.c.rows, device), p.c.weight1 ? 4 : 2, p.c.features}});
  g.params.dy = p.dy.view();
  g.params.dresidual_out = saved.residual_out.present() ? p.dresidual_out.view() : TensorView();
  g.params.h = h.view();
  g.params.weight = p.weight.view();
  g.params.mean = saved.mean.view();
  g.params.rstd = saved.rstd.view();
  g.params.is_rms_norm = p.c.rms;
  g.params.dx = g.result.dx.view();
  g.params.dresidual = g.result.dresidual.view();
  g.params.dweight = g.result.dweight.view();
  g.params.dbias = g.result.dbias.view();
  g.params.dy1 = p.dy1.view();
  g.params.weight1 = p.weight1.view();
  g.params.rowscale = p.rowscale.view();
  g.params.dropout = {p.c.dropout, p.seed.view()};
  g.params.dx1 = g.result.dx1.view();
  g.params.dweight1 = g.result.dweight1.view();
  g.params.dbias1 = g.result.dbias1.view();
  g.params.workspace = g.workspace.view();
  return g;
}

Backward run_backward(const Problem& p, const Forward& saved, Device device,
                      const RunBackward& run) {
  const Gradient g = gradient_of(p, saved, device);
  run(g.params);
  return g.result;
}

// What forward left, in float64: the truth of backward is the gradient at what it is given.
Forward exact(const Forward& saved) {
  const auto copy = [](const Tensor& tensor) { return tensor.to(DType::f64, test::kCpu); };
  return {copy(saved.y), copy(saved.residual_out), copy(saved.mean), copy(saved.rstd),
          copy(saved.y1)};
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
    if (!output.truth.present() || !output.yardstick.present()) {
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
  bool all = close("layer_norm_forward", p.dtype,
                   {{"y", got.y, truth.y, yard.y},
                    {"y1", got.y1, truth.y1, yard.y1},
                    {"residual_out", got.residual_out, truth.residual_out, yard.residual_out},
                    {"rstd", got.rstd, truth.rstd, yard.rstd}},
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
        test::is_close("layer_norm_forward", p.dtype, "mean", got.mean.dtype(), scaled(got.mean),
                       scaled(truth.mean), scaled(yard.mean), test::kForwardSlack);
    if (expect) {
      EXPECT_TRUE(result);
    }
    all = all && result;
  }
  return all;
}

// `saved`, on the CPU, is what both sides' backward was given.
bool backward_close(const Problem& p, const Forward& saved, const Backward& got, bool expect) {
  const Backward truth =
      run_backward(p.to(true, test::kCpu), exact(saved), test::kCpu, &reference::backward<double>);
  const Backward yard = run_backward(p, saved, test::kCpu, &reference::backward<float>);
  // In float64 one gradient serves x and residual, but for branches.
  return close(
      "layer_norm_backward", p.dtype,
      {{"dx", got.dx, truth.dx, yard.dx},
       {"dx1", got.dx1, truth.dx1, yard.dx1},
       {"dresidual", got.dresidual, p.c.branches() ? truth.dresidual : truth.dx, yard.dresidual},
       {"dweight", got.dweight, truth.dweight, yard.dweight},
       {"dbias", got.dbias, truth.dbias, yard.dbias},
       {"dweight1", got.dweight1, truth.dweight1, yard.dweight1},
       {"dbias1", got.dbias1, truth.dbias1, yard.dbias1}},
      test::kGradientSlack, expect);
}

Forward saved_on(const Problem& p, Device device) {
  const Forward saved = run_forward(p, test::kCpu, &reference::forward<float>);
  const auto copy = [&](const Tensor& tensor) { return tensor.to(tensor.dtype(), device); };
  return {copy(saved.y), copy(saved.residual_out), copy(saved.mean), copy(saved.rstd),
          copy(saved.y1)};
}

// ---- every implementation on every row ----

RunForward forward_on(const Target& target) {
  return test::on<ForwardParams>(target, &forward, &cpu::forward);
}

RunBackward backward_on(const Target& target) {
  return test::on<BackwardParams>(target, &backward, &cpu::backward);
}

using LayerNorm = test::RowTest<Case>;

TEST_P(LayerNorm, ForwardMatchesTheOracle) {
  const auto& [target, dtype, problem] = GetParam();
  const Problem p = make(problem, dtype);
  forward_close(p, run_forward(p.to(false, target.device), target.device, forward_on(target)),
                true);
}

TEST_P(LayerNorm, BackwardMatchesTheOracle) {
  const auto& [target, dtype, problem] = GetParam();
  const Problem p = make(problem, dtype);
  const Backward got = run_backward(p.to(false, target.device), saved_on(p, target.device),
                                    target.device, backward_on(target));
  backward_close(p, saved_on(p, test::kCpu), got, true);
}

INSTANTIATE_TEST_SUITE_P(Star, LayerNorm, testing::ValuesIn(test::rows(star())),
                         test::row_name<Case>);

using LayerNormTarget = test::TargetTest;

// An implementation that forgot a term must not pass: each is dropped here in turn, on its side
// only.
TEST_P(LayerNormTarget, NoticesADroppedTerm) {
  const Target& target = GetParam();
  const Problem p = make(with("mutation",
                              [](Case& c) {
                                c.rms = false;
                                c.bias = true;
                                c.offset = 0.5;
                              }),
                         DType::f32);
  const Problem there = p.to(false, target.device);
  const std::function<void(ForwardParams&)> forward_mutations[] = {
      [](ForwardParams& f) { f.bias = TensorView(); },
      [](ForwardParams& f) { f.residual = TensorView(); },
      [](ForwardParams& f) { f.weight = f.bias; },
      [](ForwardParams& f) { f.eps = 0.1; },
      [](ForwardParams& f) {
        f.is_rms_norm = true;
        f.mean = TensorView();
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
      [](BackwardParams& b) { b.dresidual_out = TensorView(); },
      [](BackwardParams& b) { b.weight = b.rstd; },
      [](BackwardParams& b) { b.dy = b.h; },
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
                                        changed.weight.size[0] = params.weight.size[0];
                                        changed.weight.stride[0] = i == 1 ? 0 : 1;
                                        backward_on(target)(changed);
                                      });
    EXPECT_FALSE(backward_close(p, saved_on(p, test::kCpu), got, false))
        << "backward mutation " << i;
  }
}

// The same for what only branches have.
TEST_P(LayerNormTarget, NoticesADroppedBranch) {
  const Target& target = GetParam();
  const Problem p = make(with("mutation",
                              [](Case& c) {
                                c.bias = c.x1 = c.weight1 = c.rowscale = true;
                                c.dropout = 0.25;
                              }),
                         DType::f32);
  const Problem there = p.to(false, target.device);
  const Tensor seed = Tensor::from_values(DType::i64, target.device, {{1}}, {5});
  const std::function<void(ForwardParams&)> forward_mutations[] = {
      [](ForwardParams& f) { f.x1 = TensorView(); },
      [](ForwardParams& f) { f.x1 = f.x; },
      [](ForwardParams& f) { f.weight1 = f.weight; },
      [](ForwardParams& f) { f.bias1 = TensorView(); },
      [](ForwardParams& f) { f.rowscale = TensorView(); },
      [](ForwardParams& f) { f.dropout = DropoutParams(); },
      [&](ForwardParams& f) { f.dropout.seed = seed.view(); },
      [](ForwardParams& f) { f.dropout.p = 0.26; },
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
      [](BackwardParams& b) { b.dy1 = b.dy; },
      [](BackwardParams& b) { b.weight1 = b.weight; },
      [](BackwardParams& b) { b.rowscale = TensorView(); },
      [](BackwardParams& b) { b.dropout = DropoutParams(); },
      [&](BackwardParams& b) { b.dropout.seed = seed.view(); },
  };
  for (std::size_t i = 0; i < std::size(backward_mutations); ++i) {
    const Backward got = run_backward(there, saved_on(p, target.device), target.device,
                                      [&](const BackwardParams& params) {
                                        BackwardParams changed = params;
                                        backward_mutations[i](changed);
                                        backward_on(target)(changed);
                                      });
    EXPECT_FALSE(backward_close(p, saved_on(p, test::kCpu), got, false))
        << "backward mutation " << i;
  }
}

// Masks as forward writes them: every device gives the reference's, and the sums agree with them.
TEST_P(LayerNormTarget, MasksAreTheReferences) {
  const Target& target = GetParam();
  for (const std::int64_t features : {256, 31}) {
    const Problem p = make(with("masks",
                                [&](Case& c) {
                                  c.features = features;
                                  c.x1 = true;
                                  c.dropout = 0.3;
                                }),
                           DType::f32);
    const std::size_t count = static_cast<std::size_t>(p.c.rows * features);
    using Masks = std::vector<std::uint8_t>;
    const auto masks_of = [&](Device device, const RunForward& run) {
      Masks masks(2 * count, 2);
      const bool cuda = device.is_cuda();
      std::uint8_t* const memory =
          cuda ? static_cast<std::uint8_t*>(test::device_allocate(masks.size())) : masks.data();
      run_forward(p.to(false, device), device, [&](const ForwardParams& params) {
        ForwardParams asked = params;
        asked.mask = memory;
        asked.mask1 = memory + count;
        run(asked);
      });
      if (cuda) {
        test::copy_from_device(masks.data(), memory, masks.size());
        test::device_release(memory);
      }
      return masks;
    };
    const Masks expected = masks_of(test::kCpu, &reference::forward<double>);
    EXPECT_EQ(masks_of(target.device, forward_on(target)), expected);
    for (const std::size_t first : {std::size_t{0}, count}) {
      std::size_t stays = 0;
      for (std::size_t i = 0; i < count; ++i) {
        ASSERT_LE(expected[first + i], 1);
        stays += expected[first + i];
      }
      const double deviation = std::sqrt(static_cast<double>(count) * 0.3 * 0.7);
      EXPECT_NEAR(static_cast<double>(stays), static_cast<double>(count) * 0.7, 4 * deviation);
    }
    EXPECT_NE(Masks(expected.begin(), expected.begin() + static_cast<std::ptrdiff_t>(count)),
              Masks(expected.begin() + static_cast<std::ptrdiff_t>(count), expected.end()));
  }
}

// Dropped infinities and NaNs leave no trace, as if they had never been there.
TEST_P(LayerNormTarget, WhatIsDroppedDoesNotMatter) {
  const Target& target = GetParam();
  const Problem p = make(with("dropped", [](Case& c) { c.dropout = 1.0; }), DType::f32);
  Problem spoilt = p;
  spoilt.x = Tensor::from_values(
      DType::f32, test::kCpu, {{p.c.rows, p.c.features}},
      std::vector<double>(static_cast<std::size_t>(p.c.rows * p.c.features), HUGE_VAL));
  const Forward expected =
      run_forward(p.to(false, target.device), target.device, forward_on(target));
  const Forward got =
      run_forward(spoilt.to(false, target.device), target.device, forward_on(target));
  EXPECT_EQ(got.y.bytes(), expected.y.bytes());
}

TEST_P(LayerNormTarget, EmptyRowsGiveZeroGradients) {
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

TEST_P(LayerNormTarget, GradientsAreTheSameInEveryRun) {
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
  }
  set_num_threads(0);
}

INSTANTIATE_TEST_SUITE_P(Targets, LayerNormTarget, testing::ValuesIn(test::kTargets),
                         test::target_name);

// Rows that start 2^21 elements apart, so that the last ones lie beyond 2^31 elements.
TEST(LayerNormCudaLarge, RowsBeyondTwoToThe31) {
  const std::string reason = test::cuda_unavailable();
  if (!reason.empty()) {
    GTEST_SKIP() << reason;
  }
  for (const std::int64_t features : {256, 255}) {  // whole vectors, and not
    const std::int64_t rows = 1030;
    const std::int64_t distance = std::int64_t{1} << 21;
    const Problem p = make(with("large",
                                [&](Case& c) {
                                  c.rows = rows;
                                  c.features = features;
                                  c.residual = c.stores_residual = false;
                                }),
                           DType::f32);
    const Forward truth =
        run_forward(p.to(true, test::kCpu), test::kCpu, &reference::forward<double>);
    const Forward saved = saved_on(p, test::kCuda);
    const Backward gradients = run_backward(p.to(true, test::kCpu), exact(saved_on(p, test::kCpu)),
                                            test::kCpu, &reference::backward<double>);
    const Problem there = p.to(false, test::kCuda);
    const std::size_t row_bytes = static_cast<std::size_t>(features) * 4;
    char* const memory =
        static_cast<char*>(test::device_allocate(static_cast<std::size_t>(rows * distance) * 4));
    const auto spread = [&](TensorView view) {
      view.data = memory;
      view.stride[0] = distance;
      return view;
    };
    const auto row_of = [&](std::int64_t row) {
      std::vector<float> values(static_cast<std::size_t>(features));
      test::copy_from_device(values.data(), memory + static_cast<std::size_t>(row * distance) * 4,
                             row_bytes);
      return std::vector<double>(values.begin(), values.end());
    };
    const auto expected_row = [&](const Tensor& tensor, std::int64_t row) {
      const std::vector<double> values = tensor.values();
      return std::vector<double>(values.begin() + row * features,
                                 values.begin() + (row + 1) * features);
    };
    // Outputs go to the spread rows, then backward writes its gradient there.
    const Forward result = outputs_of(there, test::kCuda);
    ForwardParams params = params_of(there, result);
    params.y = spread(params.y);
    forward(params);
    for (const std::int64_t row : {std::int64_t{0}, std::int64_t{1024}, rows - 1}) {
      EXPECT_LE(test::nmse(row_of(row), expected_row(truth.y, row)), 1e-12) << row;
    }
    Gradient g = gradient_of(there, saved, test::kCuda);
    g.params.dx = spread(g.params.dx);
    backward(g.params);
    for (const std::int64_t row : {std::int64_t{0}, std::int64_t{1024}, rows - 1}) {
      EXPECT_LE(test::nmse(row_of(row), expected_row(gradients.dx, row)), 1e-11) << row;
    }
    test::device_release(memory);
  }
}

// ---- the oracle ----

Tensor exactly(Shape shape, const std::vector<double>& values) {
  return Tensor::from_values(DType::f64, test::kCpu, shape, values);
}

// h = (1, 3, 5, 7): mean 4, variance 5, mean square 21.
TEST(LayerNormOracle, ForwardByHand) {
  Problem p;
  p.dtype = DType::f64;
  p.c = with("hand", [](Case& c) {
    c.rows = 1;
    c.features = 4;
    c.rms = false;
    c.bias = true;
  });
  p.x = exactly({{1, 4}}, {0, 1, 2, 3});
  p.residual = exactly({{1, 4}}, {1, 2, 3, 4});
  p.weight = exactly({{4}}, {1, 2, 1, -1});
  p.bias = exactly({{4}}, {0, 0, 10, 0});
  const auto eps_zero = [](const ForwardParams& params) {
    ForwardParams changed = params;
    changed.eps = 0;
    forward(changed);
  };
  const Forward layer = run_forward(p, test::kCpu, eps_zero);
  const double root5 = std::sqrt(5.0);
  const double expected[] = {-3 / root5, -2 / root5, 1 / root5 + 10, -3 / root5};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(layer.y.values()[i], expected[i], 1e-15);
  }
  EXPECT_EQ(layer.residual_out.values(), (std::vector<double>{1, 3, 5, 7}));
  EXPECT_EQ(layer.mean.values()[0], 4.0);
  EXPECT_NEAR(layer.rstd.values()[0], 1 / root5, 1e-16);

  p.c.rms = true;
  p.c.bias = false;
  p.bias = Tensor();
  const Forward rms = run_forward(p, test::kCpu, eps_zero);
  const double root21 = std::sqrt(21.0);
  const double rms_expected[] = {1 / root21, 6 / root21, 5 / root21, -7 / root21};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(rms.y.values()[i], rms_expected[i], 1e-15);
  }
  EXPECT_NEAR(rms.rstd.values()[0], 1 / root21, 1e-16);
}

// RMS, N = 2, h = (3, 4), rstd = 1 / sqrt(12.5), w = 1, dy = (1, 0):
// c1 = 3 rstd / 2, dh = ((1, 0) - h rstd c1) rstd = (1 - 9/25, -12/25) rstd.
TEST(LayerNormOracle, BackwardByHand) {
  Problem p;
  p.dtype = DType::f64;
  p.c = with("hand", [](Case& c) {
    c.rows = 1;
    c.features = 2;
    c.residual = c.stores_residual = false;
    c.bias = true;
  });
  const double rstd = 1 / std::sqrt(12.5);
  p.x = exactly({{1, 2}}, {3, 4});
  p.weight = exactly({{2}}, {1, 1});
  p.dy = exactly({{1, 2}}, {1, 0});
  Forward saved;
  saved.rstd = exactly({{1}}, {rstd});
  const Backward got = run_backward(p, saved, test::kCpu, &backward);
  EXPECT_NEAR(got.dx.values()[0], 16.0 / 25 * rstd, 1e-15);
  EXPECT_NEAR(got.dx.values()[1], -12.0 / 25 * rstd, 1e-15);
  EXPECT_NEAR(got.dweight.values()[0], 3 * rstd, 1e-15);
  EXPECT_EQ(got.dweight.values()[1], 0.0);
  EXPECT_EQ(got.dbias.values(), (std::vector<double>{1, 0}));
}

// d/dt of sum(dy y) + sum(dresidual_out residual_out) along one element at a time.
TEST(LayerNormOracle, BackwardMatchesFiniteDifferences) {
  for (const int variant : {0, 1, 2}) {
    Problem p = make(with("differences",
                          [&](Case& c) {
                            c.rows = 3;
                            c.features = 7;
                            c.rms = variant == 1;
                            c.bias = true;
                            c.x1 = c.weight1 = c.rowscale = variant == 2;
                            c.dropout = variant == 2 ? 0.3 : 0.0;
                          }),
                     DType::f32)
                    .to(true, test::kCpu);
    const auto loss = [&] {
      const Forward result = run_forward(p, test::kCpu, &forward);
      double sum = 0;
      const std::vector<double> y = result.y.values(), dy = p.dy.values(),
                                h = result.residual_out.values(), dh = p.dresidual_out.values();
      for (std::size_t i = 0; i < y.size(); ++i) {
        sum += y[i] * dy[i] + h[i] * dh[i];
      }
      const std::vector<double> y1 = result.y1.values(), dy1 = p.dy1.values();
      for (std::size_t i = 0; i < y1.size(); ++i) {
        sum += y1[i] * dy1[i];
      }
      return sum;
    };
    const Backward got =
        run_backward(p, run_forward(p, test::kCpu, &forward), test::kCpu, &backward);
    const struct {
      const Tensor& input;
      const Tensor& gradient;
    } pairs[] = {{p.x, got.dx},           {p.residual, variant == 2 ? got.dresidual : got.dx},
                 {p.weight, got.dweight}, {p.bias, got.dbias},
                 {p.x1, got.dx1},         {p.weight1, got.dweight1},
                 {p.bias1, got.dbias1}};
    for (const auto& pair : pairs) {
      const std::vector<double> analytic = pair.gradient.values();
      for (std::size_t i = 0; i < analytic.size(); ++i) {
        constexpr double kStep = 1e-5;
        double& element = pair.input.view().as<double>()[i];
        const double before = element;
        element = before + kStep;
        const double above = loss();
        element = before - kStep;
        const double below = loss();
        element = before;
        EXPECT_NEAR(analytic[i], (above - below) / (2 * kStep), 1e-8);
      }
    }
  }
}

// The known answers that the authors of Philox publish (Random123 1.14, kat_vectors).
TEST(LayerNormDropout, PhiloxGivesTheKnownAnswers) {
  const struct {
    Philox counter;
    std::uint64_t key;
    Philox answer;
  } rows[] = {
      {{{0, 0, 0, 0}}, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
      {{{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}},
       0xffffffffffffffffu,
       {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       0x299f31d0a4093822u,
       {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}},
  };
  for (const auto& row : rows) {
    const Philox got = philox(row.counter, row.key);
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(got.words[i], row.answer.words[i]);
    }
  }
}

TEST(LayerNormDropout, ProbabilitiesOfNothingAndEverything) {
  EXPECT_EQ(dropout_of(0.0).threshold, 0u);
  EXPECT_EQ(dropout_of(0.0).scale, 1.0f);
  EXPECT_GT(dropout_of(1e-12).threshold, 0u);
  EXPECT_EQ(dropout_of(0.5).threshold, 1u << 23);
  EXPECT_EQ(dropout_of(1.0).threshold, 1u << 24);  // above every random number
  EXPECT_EQ(dropout_of(1.0).scale, 0.0f);
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

TEST(LayerNormErrors, BadForwardNamesTheArgumentAndTouchesNothing) {
  const Problem p = make(with("errors",
                              [](Case& c) {
                                c.rms = false;
                                c.bias = c.x1 = c.weight1 = c.rowscale = true;
                                c.dropout = 0.5;
                              }),
                         DType::f32);
  const struct {
    const char* message;
    std::function<void(ForwardParams&)> spoil;
  } rows[] = {
      {"x must have shape (rows, features)", [](ForwardParams& f) { f.x.dim = 1; }},
      {"at least one feature", [](ForwardParams& f) { f.x.size[1] = 0; }},
      {"x must be", [](ForwardParams& f) { f.x.dtype = DType::i32; }},
      {"weight must have shape", [](ForwardParams& f) { f.weight.size[0] = 5; }},
      {"weight must have shape", [](ForwardParams& f) { f.weight = TensorView(); }},
      {"weight must be on cpu", [](ForwardParams& f) { f.weight.device = test::kCuda; }},
      {"weight must be float64 exactly", [](ForwardParams& f) { f.weight.dtype = DType::f64; }},
      {"bias must be float32", [](ForwardParams& f) { f.bias.dtype = DType::f16; }},
      {"residual must have shape", [](ForwardParams& f) { f.residual.size[0] -= 1; }},
      {"y must be float32", [](ForwardParams& f) { f.y.dtype = DType::bf16; }},
      {"y is written", [](ForwardParams& f) { f.y.stride[0] = 0; }},
      {"residual_out must have shape", [](ForwardParams& f) { f.residual_out.dim = 1; }},
      {"mean is an output", [](ForwardParams& f) { f.mean = TensorView(); }},
      {"mean is an output", [](ForwardParams& f) { f.is_rms_norm = true; }},
      {"mean must be contiguous", [](ForwardParams& f) { f.mean.stride[0] = 2; }},
      {"rstd must have shape", [](ForwardParams& f) { f.rstd = TensorView(); }},
      {"rstd must be float32", [](ForwardParams& f) { f.rstd.dtype = DType::bf16; }},
      {"x1 must have shape", [](ForwardParams& f) { f.x1.size[0] += 1; }},
      {"weight1 must have shape", [](ForwardParams& f) { f.weight1.size[0] -= 1; }},
      {"bias1 must be float32", [](ForwardParams& f) { f.bias1.dtype = DType::f16; }},
      {"bias1 needs weight1", [](ForwardParams& f) { f.weight1 = f.y1 = TensorView(); }},
      {"y1 is an output with weight1", [](ForwardParams& f) { f.y1 = TensorView(); }},
      {"y1 is written", [](ForwardParams& f) { f.y1.stride[1] = 0; }},
      {"rowscale must have shape", [](ForwardParams& f) { f.rowscale.dim = 2; }},
      {"dropout_p must be from 0 to 1", [](ForwardParams& f) { f.dropout.p = 1.5; }},
      {"dropout_p must be from 0 to 1", [](ForwardParams& f) { f.dropout.p = -0.1; }},
      {"dropout_p must be from 0 to 1", [](ForwardParams& f) { f.dropout.p = std::nan(""); }},
      {"seed must be given", [](ForwardParams& f) { f.dropout.p = 0.0; }},
      {"seed must be given", [](ForwardParams& f) { f.dropout.seed = TensorView(); }},
      {"seed must be int64", [](ForwardParams& f) { f.dropout.seed.dtype = DType::i32; }},
      {"seed must have shape", [](ForwardParams& f) { f.dropout.seed.size[0] = 2; }},
      {"mask1 is an output with x1",
       [](ForwardParams& f) {
         f.x1 = TensorView();
         f.mask1 = f.y.as<std::uint8_t>();
       }},
      {"mask and mask1 are outputs of dropout",
       [](ForwardParams& f) {
         f.dropout = DropoutParams();
         f.mask = f.y.as<std::uint8_t>();
       }},
  };
  for (const auto& row : rows) {
    const Forward out = outputs_of(p, test::kCpu);
    const std::vector<unsigned char> before = out.y.bytes();
    const std::vector<unsigned char> h_before = out.residual_out.bytes();
    ForwardParams params = params_of(p, out);
    row.spoil(params);
    const std::string message = error_of([&] { forward(params); });
    EXPECT_NE(message.find(row.message), std::string::npos) << row.message << ": " << message;
    EXPECT_EQ(out.y.bytes(), before) << row.message;
    EXPECT_EQ(out.residual_out.bytes(), h_before) << row.message;
  }
}

TEST(LayerNormErrors, BadBackwardNamesTheArgumentAndTouchesNothing) {
  const Problem p = make(with("errors",
                              [](Case& c) {
                                c.rms = false;
                                c.bias = c.x1 = c.weight1 = c.rowscale = true;
                                c.dropout = 0.5;
                              }),
                         DType::bf16);
  const Forward saved = saved_on(p, test::kCpu);
  const struct {
    const char* message;
    std::function<void(BackwardParams&)> spoil;
  } rows[] = {
      {"h must have shape (rows, features)", [](BackwardParams& b) { b.h.dim = 3; }},
      {"dy must have shape", [](BackwardParams& b) { b.dy.size[0] += 1; }},
      {"dresidual_out must be float32",
       [](BackwardParams& b) { b.dresidual_out.dtype = DType::bf16; }},
      {"weight must have shape", [](BackwardParams& b) { b.weight.dim = 2; }},
      {"mean is an input", [](BackwardParams& b) { b.mean = TensorView(); }},
      {"rstd must have shape", [](BackwardParams& b) { b.rstd.size[0] = 1; }},
      {"dx must be bfloat16", [](BackwardParams& b) { b.dx.dtype = DType::f32; }},
      {"dx is written", [](BackwardParams& b) { b.dx.stride[1] = 0; }},
      {"dresidual must be float32", [](BackwardParams& b) { b.dresidual.dtype = DType::bf16; }},
      {"dweight must be float32", [](BackwardParams& b) { b.dweight.dtype = DType::bf16; }},
      {"dbias must have shape", [](BackwardParams& b) { b.dbias.size[0] -= 1; }},
      {"dy1 is an input with weight1", [](BackwardParams& b) { b.dy1 = TensorView(); }},
      {"dy1 must be bfloat16", [](BackwardParams& b) { b.dy1.dtype = DType::f32; }},
      {"dy1 must have shape", [](BackwardParams& b) { b.dy1.size[1] -= 1; }},
      {"weight1 must have shape", [](BackwardParams& b) { b.weight1.size[0] -= 1; }},
      {"dweight1 is an output", [](BackwardParams& b) { b.dweight1 = TensorView(); }},
      {"dbias1 must have shape", [](BackwardParams& b) { b.dbias1.size[0] -= 1; }},
      {"dx1 must have shape", [](BackwardParams& b) { b.dx1.size[0] -= 1; }},
      {"rowscale must have shape", [](BackwardParams& b) { b.rowscale.size[0] -= 1; }},
      {"dropout_p must be", [](BackwardParams& b) { b.dropout.p = 2.0; }},
      {"seed must be given", [](BackwardParams& b) { b.dropout.seed = TensorView(); }},
      {"workspace must have shape", [](BackwardParams& b) { b.workspace.size[0] += 1; }},
      {"workspace must have shape", [](BackwardParams& b) { b.workspace.size[1] = 2; }},
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

ForwardParams planned(DType dtype, std::int64_t rows, std::int64_t features) {
  alignas(16) static char memory[16];
  ForwardParams p;
  p.x = TensorView(memory, dtype, {rows, features});
  p.y = p.x;
  p.weight = TensorView(memory, DType::f32, {features});
  p.residual = TensorView(memory, DType::f32, {rows, features});
  p.residual_out = p.residual;
  return p;
}

TEST(LayerNormPlan, ForwardHoldsTheRowOrWalks) {
  for (std::int64_t features = 1; features < 20000; features += features < 300 ? 1 : 97) {
    const cuda::ForwardPlan plan = cuda::choose_forward(planned(DType::bf16, 1000, features));
    const cuda::Config& config = cuda::kForwardConfigs[plan.config];
    EXPECT_EQ(plan.threads % 32, 0) << features;
    EXPECT_LE(plan.threads, config.threads) << features;
    EXPECT_LE(plan.threads * plan.rows, config.threads) << features;
    EXPECT_GE(plan.blocks * plan.rows, 1000) << features;
    if (config.vectors > 0) {
      EXPECT_GE(std::int64_t{plan.threads} * config.vectors * cuda::kVector, features);
      EXPECT_EQ(features % cuda::kVector, 0) << features;
    } else {
      EXPECT_TRUE(features % cuda::kVector != 0 || features > 8192) << features;
    }
  }
  const cuda::ForwardPlan model = cuda::choose_forward(planned(DType::bf16, 16384, 2560));
  EXPECT_EQ(model.threads * cuda::kForwardConfigs[model.config].vectors * cuda::kVector, 2560);
  ForwardParams misaligned = planned(DType::bf16, 16384, 2560);
  misaligned.residual.data = static_cast<char*>(misaligned.residual.data) + 4;
  EXPECT_EQ(cuda::kForwardConfigs[cuda::choose_forward(misaligned).config].vectors, 0);
}

// Calls with branches have kernels of their own, and the others none of theirs.
TEST(LayerNormPlan, BranchesTakeTheirRows) {
  mamba_native::cuda::DeviceInfo device;
  device.multiprocessors = 132;
  for (const std::int64_t features : {4, 128, 2560, 4096, 8192, 8196, 31, 20000}) {
    for (const bool branches : {false, true}) {
      ForwardParams f = planned(DType::bf16, 1000, features);
      BackwardParams b;
      b.dy = b.dx = f.x;
      b.h = b.dresidual = b.dresidual_out = f.residual;
      b.weight = f.weight;
      b.workspace =
          TensorView(nullptr, DType::f32, {cuda::workspace_rows(1000, device), 2, features});
      if (branches) {
        f.x1 = f.x;
        b.dx1 = f.x;
      }
      const cuda::ForwardPlan forward = cuda::choose_forward(f);
      const cuda::BackwardPlan backward = cuda::choose_backward(b);
      EXPECT_EQ(cuda::kForwardConfigs[forward.config].branches, branches) << features;
      EXPECT_EQ(cuda::kBackwardConfigs[backward.config].branches, branches) << features;
      EXPECT_LE(forward.threads * forward.rows, cuda::kForwardConfigs[forward.config].threads);
      EXPECT_LE(backward.threads * backward.rows, cuda::kBackwardConfigs[backward.config].threads);
      if (branches) {
        EXPECT_EQ(cuda::kForwardConfigs[forward.config].vectors,
                  features % cuda::kVector == 0 && features <= 8192 ? 4 : 0);
        EXPECT_EQ(cuda::kBackwardConfigs[backward.config].vectors,
                  features % cuda::kVector == 0 && features <= 4096 ? 2 : 0);
      }
    }
  }
  ForwardParams misaligned = planned(DType::bf16, 1000, 2560);
  misaligned.x1 = misaligned.residual;
  misaligned.x1.data = static_cast<char*>(misaligned.x1.data) + 4;
  EXPECT_EQ(cuda::kForwardConfigs[cuda::choose_forward(misaligned).config].vectors, 0);
}

TEST(LayerNormPlan, BackwardFillsTheWorkspaceOrLess) {
  mamba_native::cuda::DeviceInfo device;
  device.multiprocessors = 132;
  for (const std::int64_t rows : {1, 7, 1000, 100000}) {
    for (const std::int64_t features : {4, 100, 128, 132, 2560, 5120, 5124, 8192, 8196, 2561}) {
      const ForwardParams f = planned(DType::bf16, rows, features);
      BackwardParams p;
      p.dy = p.dx = f.x;
      p.h = p.dresidual = p.dresidual_out = f.residual;
      p.weight = f.weight;
      p.workspace =
          TensorView(nullptr, DType::f32, {cuda::workspace_rows(rows, device), 2, features});
      const cuda::BackwardPlan plan = cuda::choose_backward(p);
      const cuda::Config& config = cuda::kBackwardConfigs[plan.config];
      EXPECT_LE(plan.blocks, p.workspace.size[0]);
      EXPECT_GE(plan.blocks, 1);
      EXPECT_LE(plan.threads * plan.rows, config.threads);
      EXPECT_EQ(config.vectors == 0, features % cuda::kVector != 0 || features > 5120) << features;
    }
  }
}

}  // namespace
}  // namespace mamba_native::layer_norm
