// The selective scan on every device and instruction set, against the oracle; the oracle itself
// against numbers worked out by hand and against finite differences.
#include "selective_scan/selective_scan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <iterator>
#include <limits>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/math.h"
#include "core/parallel_for.h"
#include "selective_scan/cpu.h"
#include "selective_scan/plan.h"
#include "selective_scan/reference.h"
#include "support/compare.h"
#include "support/device_memory.h"
#include "support/targets.h"
#include "support/tensor.h"

namespace mamba_native::selective_scan {
namespace {

using test::Shape;
using test::Target;
using test::Tensor;

// ---- what is computed, and by whom ----

enum class Layout {
  contiguous,
  channels_last,  // (B, L, D) transposed: stride 1 over channels
  sliced,         // a window of a larger tensor at an odd offset, steps 2 apart
  expanded,       // stride 0: u over the batch, dout over everything, B and C over groups
};

// Several sequences in a batch entry, and whether they are numbered: with states of their own.
enum class Packing { none, indices, numbered };

struct Case {
  const char* name;
  std::int64_t batch = 2;
  std::int64_t channels = 20;  // one full AVX-512 block and a ragged one
  std::int64_t groups = 1;
  std::int64_t states = 16;
  std::int64_t length = 150;  // a full forward tile and a ragged one
  bool static_B = false;
  bool static_C = false;
  bool complex = false;  // A, and B, C and states with it
  bool skip = true;      // D
  bool gate = true;      // z
  bool bias = true;
  bool softplus = true;
  bool initial = true;
  bool dlast = true;
  bool reverse = false;
  Packing packing = Packing::none;
  bool one_step = false;  // every sequence has one
  Layout layout = Layout::contiguous;
  double delta_low = -1.0;  // before bias and softplus
  double delta_high = 1.0;
  double slowest = -0.5;  // A
  double fastest = -8.0;
  // The second metric compares the largest of two rounding noises, which is luck where one or two
  // large elements decide it: such a row has a seed of its own.
  unsigned seed = 1;
};

Case with(const char* name, const std::function<void(Case&)>& change) {
  Case row;
  row.name = name;
  change(row);
  return row;
}

// The base row, then rows that change one thing.
std::vector<Case> star() {
  return {
      with("base", [](Case&) {}),
      with("length_1", [](Case& c) { c.length = 1; }),
      with("length_8", [](Case& c) { c.length = 8; }),
      with("length_127", [](Case& c) { c.length = 127; }),
      with("length_128", [](Case& c) { c.length = 128; }),
      with("length_129", [](Case& c) { c.length = 129; }),
      with("length_255", [](Case& c) { c.length = 255; }),
      with("length_256", [](Case& c) { c.length = 256; }),
      with("length_257", [](Case& c) { c.length = 257; }),
      with("length_600", [](Case& c) { c.length = 600; }),
      with("many_batches", [](Case& c) { c.batch = 9; }),
      with("one_channel",  // dD and ddelta_bias would be a single number each
           [](Case& c) {
             c.channels = 1;
             c.states = 64;
             c.skip = c.bias = false;
           }),
      with("many_channels", [](Case& c) { c.channels = 131; }),
      with("two_groups", [](Case& c) { c.groups = 2; }),
      with("group_per_channel", [](Case& c) { c.groups = c.channels; }),
      with("states_1", [](Case& c) { c.states = 1; }),
      with("states_3",
           [](Case& c) {
             c.states = 3;
             c.seed = 2;
           }),
      with("states_8", [](Case& c) { c.states = 8; }),
      with("states_64", [](Case& c) { c.states = 64; }),
      with("states_96", [](Case& c) { c.states = 96; }),
      with("states_128", [](Case& c) { c.states = 128; }),
      with("states_256", [](Case& c) { c.states = 256; }),
      with("states_300", [](Case& c) { c.states = 300; }),
      with("static_B", [](Case& c) { c.static_B = true; }),
      with("static_C", [](Case& c) { c.static_C = true; }),
      with("static_B_and_C", [](Case& c) { c.static_B = c.static_C = true; }),
      with("no_D", [](Case& c) { c.skip = false; }),
      with("no_z", [](Case& c) { c.gate = false; }),
      with("no_bias", [](Case& c) { c.bias = false; }),
      with("no_softplus",
           [](Case& c) {
             c.softplus = false;
             c.bias = false;
             c.delta_low = 0.001;
             c.delta_high = 0.1;
           }),
      with("no_initial_state", [](Case& c) { c.initial = false; }),
      with("no_dlast_state", [](Case& c) { c.dlast = false; }),
      with("nothing_optional",
           [](Case& c) {
             c.skip = c.gate = c.bias = c.softplus = c.initial = c.dlast = false;
             c.delta_low = 0.01;
             c.delta_high = 0.2;
           }),
      with("softplus_threshold",
           [](Case& c) {
             c.bias = false;
             c.delta_low = 15.0;
             c.delta_high = 25.0;
             c.slowest = -0.001;
             c.fastest = -0.05;
             c.seed = 2;
           }),
      with("decay_underflows",
           [](Case& c) {
             c.delta_low = 0.0;
             c.delta_high = 40.0;
             c.fastest = -16.0;
           }),
      with("growth",
           [](Case& c) {
             c.length = 20;
             c.slowest = 0.5;
             c.fastest = -1.0;
           }),
      with("channels_last", [](Case& c) { c.layout = Layout::channels_last; }),
      with("channels_last_full_block",
           [](Case& c) {
             c.layout = Layout::channels_last;
             c.channels = 32;
           }),
      with("sliced", [](Case& c) { c.layout = Layout::sliced; }),
      with("expanded",
           [](Case& c) {
             c.layout = Layout::expanded;
             c.groups = 2;
           }),
      with("reverse", [](Case& c) { c.reverse = true; }),
      with("reverse_length_1",
           [](Case& c) {
             c.reverse = true;
             c.length = 1;
           }),
      with("reverse_length_257",
           [](Case& c) {
             c.reverse = true;
             c.length = 257;
           }),
      with("reverse_length_600",  // whole vectors, several checkpoints
           [](Case& c) {
             c.reverse = true;
             c.length = 600;
           }),
      with("reverse_two_groups",
           [](Case& c) {
             c.reverse = true;
             c.groups = 2;
           }),
      with("reverse_group_per_channel",
           [](Case& c) {
             c.reverse = true;
             c.groups = c.channels;
           }),
      with("reverse_states_64",
           [](Case& c) {
             c.reverse = true;
             c.states = 64;
           }),
      with("reverse_static_B_and_C",
           [](Case& c) {
             c.reverse = true;
             c.static_B = c.static_C = true;
           }),
      with("reverse_channels_last",
           [](Case& c) {
             c.reverse = true;
             c.layout = Layout::channels_last;
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
             c.groups = 2;
           }),
      with("packed", [](Case& c) { c.packing = Packing::indices; }),
      with("packed_length_600",
           [](Case& c) {
             c.packing = Packing::indices;
             c.length = 600;
           }),
      with("packed_reverse_length_600",
           [](Case& c) {
             c.packing = Packing::indices;
             c.length = 600;
             c.reverse = true;
           }),
      with("packed_one_step_each",
           [](Case& c) {
             c.packing = Packing::indices;
             c.length = 40;
             c.one_step = true;
           }),
      with("packed_two_groups",
           [](Case& c) {
             c.packing = Packing::indices;
             c.groups = 2;
           }),
      with("packed_group_per_channel",
           [](Case& c) {
             c.packing = Packing::indices;
             c.groups = c.channels;
           }),
      with("packed_states_64",
           [](Case& c) {
             c.packing = Packing::indices;
             c.length = 600;
             c.states = 64;
           }),
      with("packed_static_B_and_C",
           [](Case& c) {
             c.packing = Packing::indices;
             c.static_B = c.static_C = true;
           }),
      with("packed_channels_last",
           [](Case& c) {
             c.packing = Packing::indices;
             c.layout = Layout::channels_last;
           }),
      with("packed_sliced_reverse",
           [](Case& c) {
             c.packing = Packing::indices;
             c.layout = Layout::sliced;
             c.reverse = true;
           }),
      with("numbered",
           [](Case& c) {
             c.batch = 1;
             c.packing = Packing::numbered;
           }),
      with("numbered_length_600",
           [](Case& c) {
             c.batch = 1;
             c.packing = Packing::numbered;
             c.length = 600;
           }),
      with("numbered_reverse_length_600",
           [](Case& c) {
             c.batch = 1;
             c.packing = Packing::numbered;
             c.length = 600;
             c.reverse = true;
           }),
      with("numbered_length_1",
           [](Case& c) {
             c.batch = 1;
             c.packing = Packing::numbered;
             c.length = 1;
           }),
      with("numbered_one_step_each",
           [](Case& c) {
             c.batch = 1;
             c.packing = Packing::numbered;
             c.length = 40;
             c.one_step = true;
           }),
      with("numbered_states_64",
           [](Case& c) {
             c.batch = 1;
             c.packing = Packing::numbered;
             c.length = 600;
             c.states = 64;
           }),
      with("numbered_static_B_and_C",
           [](Case& c) {
             c.batch = 1;
             c.packing = Packing::numbered;
             c.static_B = c.static_C = true;
           }),
      with("numbered_no_initial_state",
           [](Case& c) {
             c.batch = 1;
             c.packing = Packing::numbered;
             c.initial = false;
           }),
      with("numbered_no_dlast_state",
           [](Case& c) {
             c.batch = 1;
             c.packing = Packing::numbered;
             c.dlast = false;
           }),
      with("numbered_two_groups",
           [](Case& c) {
             c.batch = 1;
             c.packing = Packing::numbered;
             c.groups = 2;
           }),
      with("numbered_channels_last_reverse",
           [](Case& c) {
             c.batch = 1;
             c.packing = Packing::numbered;
             c.layout = Layout::channels_last;
             c.reverse = true;
           }),
      with("complex", [](Case& c) { c.complex = true; }),
      with("complex_length_1",
           [](Case& c) {
             c.complex = true;
             c.length = 1;
           }),
      with("complex_length_256",
           [](Case& c) {
             c.complex = true;
             c.length = 256;
           }),
      with("complex_length_600",
           [](Case& c) {
             c.complex = true;
             c.length = 600;
           }),
      with("complex_one_channel",
           [](Case& c) {
             c.complex = true;
             c.channels = 1;
             c.states = 64;
             c.skip = c.bias = false;
           }),
      with("complex_two_groups",
           [](Case& c) {
             c.complex = true;
             c.groups = 2;
           }),
      with("complex_group_per_channel",
           [](Case& c) {
             c.complex = true;
             c.groups = c.channels;
           }),
      with("complex_states_1",
           [](Case& c) {
             c.complex = true;
             c.states = 1;
           }),
      with("complex_states_40",
           [](Case& c) {
             c.complex = true;
             c.states = 40;
           }),
      with("complex_static_B",
           [](Case& c) {
             c.complex = true;
             c.static_B = true;
           }),
      with("complex_static_C",
           [](Case& c) {
             c.complex = true;
             c.static_C = true;
           }),
      with("complex_static_B_and_C",
           [](Case& c) {
             c.complex = true;
             c.static_B = c.static_C = true;
           }),
      with("complex_nothing_optional",
           [](Case& c) {
             c.complex = true;
             c.skip = c.gate = c.bias = c.softplus = c.initial = c.dlast = false;
             c.delta_low = 0.01;
             c.delta_high = 0.2;
           }),
      with("complex_channels_last",
           [](Case& c) {
             c.complex = true;
             c.layout = Layout::channels_last;
           }),
      with("complex_sliced",
           [](Case& c) {
             c.complex = true;
             c.layout = Layout::sliced;
           }),
      with("complex_expanded",
           [](Case& c) {
             c.complex = true;
             c.layout = Layout::expanded;
             c.groups = 2;
           }),
      with("complex_reverse_length_600",
           [](Case& c) {
             c.complex = true;
             c.length = 600;
             c.reverse = true;
           }),
      with("complex_reverse_static_B_and_C",
           [](Case& c) {
             c.complex = true;
             c.static_B = c.static_C = true;
             c.reverse = true;
           }),
      with("complex_packed_length_600",
           [](Case& c) {
             c.complex = true;
             c.packing = Packing::indices;
             c.length = 600;
           }),
      with("complex_packed_sliced_reverse",
           [](Case& c) {
             c.complex = true;
             c.packing = Packing::indices;
             c.layout = Layout::sliced;
             c.reverse = true;
           }),
      with("complex_numbered_length_600",
           [](Case& c) {
             c.complex = true;
             c.batch = 1;
             c.packing = Packing::numbered;
             c.length = 600;
           }),
      with("complex_numbered_reverse_two_groups",
           [](Case& c) {
             c.complex = true;
             c.batch = 1;
             c.packing = Packing::numbered;
             c.groups = 2;
             c.reverse = true;
           }),
      with("complex_numbered_one_step_each",
           [](Case& c) {
             c.complex = true;
             c.batch = 1;
             c.packing = Packing::numbered;
             c.length = 40;
             c.one_step = true;
           }),
  };
}

Shape activations(const Case& c, bool expand_all = false) {
  const std::int64_t B = c.batch, D = c.channels, L = c.length;
  switch (c.layout) {
    case Layout::contiguous:
      return {{B, D, L}};
    case Layout::channels_last:
      return {{B, D, L}, {L * D, 1, D}};
    case Layout::sliced:
      return {{B, D, L}, {(2 * D + 1) * (2 * L + 3), 2 * (2 * L + 3), 2}, 3};
    case Layout::expanded:
      return expand_all ? Shape{{B, D, L}, {0, 0, 0}} : Shape{{B, D, L}, {0, L, 1}};
  }
  fail("unknown layout");
}

// Where numbers have two parts: beside each other, or in `sliced` all real parts before all
// imaginary ones.
Shape numbers(const Case& c, Shape shape) {
  if (!c.complex) {
    return shape;
  }
  std::int64_t last = 0;
  for (std::size_t i = 0; i < shape.strides.size(); ++i) {
    last += (shape.sizes[i] - 1) * shape.strides[i];
    shape.strides[i] *= c.layout == Layout::sliced ? 1 : 2;
  }
  if (!shape.strides.empty()) {
    shape.strides.push_back(c.layout == Layout::sliced ? last + 1 : 1);
  }
  shape.sizes.push_back(2);
  return shape;
}

Shape real_projection(const Case& c, bool is_static) {
  const std::int64_t B = c.batch, G = c.groups, N = c.states, L = c.length;
  if (is_static) {
    return c.layout == Layout::channels_last ? Shape{{c.channels, N}, {1, c.channels}}
                                             : Shape{{c.channels, N}};
  }
  switch (c.layout) {
    case Layout::contiguous:
      return {{B, G, N, L}};
    case Layout::channels_last:
      return {{B, G, N, L}, {L * G * N, N, 1, G * N}};
    case Layout::sliced:
      return {{B, G, N, L}, {G * N * (2 * L + 3), N * (2 * L + 3), 2 * L + 3, 2}, 1};
    case Layout::expanded:
      return {{B, G, N, L}, {N * L, 0, L, 1}};
  }
  fail("unknown layout");
}

Shape projection(const Case& c, bool is_static) {
  return numbers(c, real_projection(c, is_static));
}

// Sequences of one step, sequences that begin and end beside the borders of tiles, sequences
// without steps (a gap in the numbers), and at the end padding with an index that has no row.
std::vector<double> sequence_indices(const Case& c) {
  std::vector<double> indices;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    double index = 0;
    for (std::int64_t t = 0; t < c.length; ++t) {
      const std::int64_t cuts[] = {1, 2, 60, 127, 128, 129, 255, 256, 257, 380, 512};
      const std::int64_t place = t + 3 * b;
      if (t > 0 && (c.one_step || std::count(std::begin(cuts), std::end(cuts), place) > 0)) {
        index += place == 60 || place == 256 ? 2 : 1;
      }
      indices.push_back(c.length > 20 && t >= c.length - 5 ? -1 : index);
    }
  }
  return indices;
}

struct Data {
  DType dtype = DType::f32;
  bool softplus = false;
  bool reverse = false;
  std::int64_t sequences = 0;
  Tensor u, delta, A, B, C, D, z, bias, initial, seq_idx, dout, dlast;

  // The same numbers elsewhere. Parameters and states follow as float32, or float64 with float64.
  Data to(DType type, Device device) const {
    const DType sum = type == DType::f64 ? DType::f64 : DType::f32;
    const DType type_B = B.shape().sizes.size() < 4 ? sum : type;
    const DType type_C = C.shape().sizes.size() < 4 ? sum : type;
    return {type,
            softplus,
            reverse,
            sequences,
            u.to(type, device),
            delta.to(type, device),
            A.to(sum, device),
            B.to(type_B, device),
            C.to(type_C, device),
            D.to(sum, device),
            z.to(type, device),
            bias.to(sum, device),
            initial.to(sum, device),
            seq_idx.to(DType::i32, device),
            dout.to(type, device),
            dlast.to(sum, device)};
  }

  Inputs inputs() const {
    Inputs in;
    in.u = u.view();
    in.delta = delta.view();
    in.A = A.view();
    in.B = B.view();
    in.C = C.view();
    in.D = D.view();
    in.z = z.view();
    in.delta_bias = bias.view();
    in.initial_state = initial.view();
    in.delta_softplus = softplus;
    in.reverse = reverse;
    in.seq_idx = seq_idx.view();
    in.sequences = sequences;
    return in;
  }

  // `leading`, then the sizes of a channel's states.
  Shape states(std::vector<std::int64_t> leading) const {
    const std::vector<std::int64_t>& sizes = A.shape().sizes;
    leading.insert(leading.end(), sizes.begin() + 1, sizes.end());
    return {leading};
  }

  // Of initial_state and last_state.
  std::int64_t rows() const { return sequences > 0 ? sequences : u.shape().sizes[0]; }
};

Data make(const Case& c, DType dtype) {
  std::mt19937 random(c.seed);
  const DType sum = dtype == DType::f64 ? DType::f64 : DType::f32;
  const std::int64_t B = c.batch, D = c.channels, N = c.states;
  const auto uniform = [&](DType type, const Shape& shape, double low, double high) {
    return Tensor::uniform(random, type, test::kCpu, shape, low, high);
  };
  Data p;
  p.dtype = dtype;
  p.softplus = c.softplus;
  p.reverse = c.reverse;
  p.u = uniform(dtype, activations(c), -1, 1);
  p.delta = uniform(dtype, activations(c), c.delta_low, c.delta_high);
  p.A = uniform(sum, numbers(c, {{D, N}}), c.fastest, c.slowest);
  p.B = uniform(c.static_B ? sum : dtype, projection(c, c.static_B), -1, 1);
  p.C = uniform(c.static_C ? sum : dtype, projection(c, c.static_C), -1, 1);
  p.dout = uniform(dtype, activations(c, true), -1, 1);
  if (c.skip) {
    p.D = uniform(sum, {{D}, {c.layout == Layout::sliced ? 3 : 1}}, -1, 1);
  }
  if (c.gate) {
    p.z = uniform(dtype, activations(c), -2, 2);
  }
  if (c.bias) {
    p.bias = uniform(sum, {{D}}, -3, -1);
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
                numbers(c, c.layout == Layout::channels_last ? Shape{{rows, D, N}, {D * N, 1, D}}
                                                             : Shape{{rows, D, N}}),
                -1, 1);
  }
  if (c.dlast) {
    p.dlast = uniform(sum,
                      numbers(c, c.layout == Layout::expanded ? Shape{{rows, D, N}, {0, 0, 0}}
                                                              : Shape{{rows, D, N}}),
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
  Tensor out, last_state, checkpoints;
};

struct Backward {
  Tensor du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial;
};

using RunForward = std::function<void(const ForwardParams&)>;
using RunBackward = std::function<void(const BackwardParams&)>;

Forward run_forward(const Data& p, Device device, const RunForward& run, int config = -1) {
  const DType sum = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const std::vector<std::int64_t>& size = p.u.shape().sizes;
  Forward result;
  result.out = Tensor(p.dtype, device, writable(p.u));
  result.last_state = Tensor(
      sum, device, p.initial.present() ? writable(p.initial) : p.states({p.rows(), size[1]}));
  result.checkpoints =
      Tensor(sum, device, p.states({size[0], size[1], ceil_div(size[2], kCheckpointInterval)}));
  ForwardParams params;
  params.in = p.inputs();
  params.out = result.out.view();
  params.last_state = result.last_state.view();
  params.checkpoints = result.checkpoints.view();
  params.config = config;
  run(params);
  return result;
}

Backward run_backward(const Data& p, Device device, const RunBackward& run,
                      const Tensor& checkpoints, int config = -1) {
  const DType sum = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto like = [&](const Tensor& tensor) {
    return tensor.present() ? Tensor(sum, device, {tensor.shape().sizes}) : Tensor();
  };
  Backward result;
  result.du = Tensor(p.dtype, device, writable(p.u));
  result.ddelta = Tensor(p.dtype, device, writable(p.delta));
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
  params.dlast_state = p.dlast.view();
  params.checkpoints = checkpoints.view();
  params.du = result.du.view();
  params.ddelta = result.ddelta.view();
  params.dA = result.dA.view();
  params.dB = result.dB.view();
  params.dC = result.dC.view();
  params.dD = result.dD.view();
  params.dz = result.dz.view();
  params.ddelta_bias = result.dbias.view();
  params.dinitial_state = result.dinitial.view();
  params.config = config;
  Tensor workspace;
  if (device.is_cuda() && backward_workspace(params) > 0) {
    workspace = Tensor(DType::f32, device, {{backward_workspace(params)}});
    params.workspace = workspace.view();
  }
  run(params);
  return result;
}

// Truth in float64 and yardstick in float32, as compare.h wants them.
struct Expected {
  explicit Expected(const Data& p)
      : forward_slack(test::kForwardSlack * (p.A.view().dim == 3 ? test::kAngleSlack : 1)),
        gradient_slack(test::kGradientSlack * (p.A.view().dim == 3 ? test::kAngleSlack : 1)) {
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
  double forward_slack, gradient_slack;
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
  return test::is_close(op, dtype, output, got.dtype(), got.values(), truth.values(),
                        yardstick.values(),
                        got.device().is_cuda() ? slack * test::kHardwareExp2Slack : slack);
}

void expect_close(const Forward& got, const Expected& expected, DType dtype) {
  constexpr char kOp[] = "selective_scan_forward";
  const Forward& truth = expected.truth;
  const Forward& yard = expected.yardstick;
  EXPECT_TRUE(close(kOp, "out", dtype, got.out, truth.out, yard.out, expected.forward_slack));
  EXPECT_TRUE(close(kOp, "last_state", dtype, got.last_state, truth.last_state, yard.last_state,
                    expected.forward_slack));
  EXPECT_TRUE(close(kOp, "checkpoints", dtype, got.checkpoints, truth.checkpoints, yard.checkpoints,
                    expected.forward_slack));
}

void expect_close(const Backward& got, const Expected& expected, DType dtype) {
  struct Row {
    const char* name;
    Tensor Backward::* output;
  };
  const Row rows[] = {{"du", &Backward::du},
                      {"ddelta", &Backward::ddelta},
                      {"dA", &Backward::dA},
                      {"dB", &Backward::dB},
                      {"dC", &Backward::dC},
                      {"dD", &Backward::dD},
                      {"dz", &Backward::dz},
                      {"ddelta_bias", &Backward::dbias},
                      {"dinitial_state", &Backward::dinitial}};
  for (const Row& row : rows) {
    EXPECT_TRUE(close("selective_scan_backward", row.name, dtype, got.*row.output,
                      expected.truth_gradients.*row.output,
                      expected.yardstick_gradients.*row.output, expected.gradient_slack));
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
using SelectiveScan = test::RowTest<Case>;

TEST_P(SelectiveScan, MatchesTheOracle) {
  const Row& row = GetParam();
  const Data host = make(row.problem, row.dtype);
  const Data p = host.to(row.dtype, row.target.device);
  const Expected expected(host);
  const Forward result = run_forward(p, row.target.device, forward_on(row.target));
  expect_close(result, expected, row.dtype);
  expect_close(run_backward(p, row.target.device, backward_on(row.target), result.checkpoints),
               expected, row.dtype);
}

INSTANTIATE_TEST_SUITE_P(Star, SelectiveScan, testing::ValuesIn(test::rows(star())),
                         test::row_name<Case>);

// A kernel that forgot a term must not pass: each is dropped here in turn, on the kernel's side
// only.
using SelectiveScanMutation = SelectiveScan;

TEST_P(SelectiveScanMutation, ADroppedTermFails) {
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
      {"D", [](Data& p) { p.D = Tensor(); }, &Backward::du, true},
      {"z", [](Data& p) { p.z = Tensor(); }, &Backward::du, true},
      {"delta_bias", [](Data& p) { p.bias = Tensor(); }, &Backward::ddelta, true},
      {"softplus", [](Data& p) { p.softplus = false; }, &Backward::ddelta, true},
      {"initial_state", [](Data& p) { p.initial = Tensor(); }, &Backward::dA, true},
      {"dlast_state", [](Data& p) { p.dlast = Tensor(); }, &Backward::dinitial, false},
      {"reverse", [](Data& p) { p.reverse = true; }, &Backward::du, true}};
  for (const Mutation& mutation : mutations) {
    Data p = host.to(row.dtype, row.target.device);
    mutation.drop(p);
    const Forward result = run_forward(p, row.target.device, forward_on(row.target));
    EXPECT_EQ(!close("selective_scan_forward", "out", row.dtype, result.out, expected.truth.out,
                     expected.yardstick.out, test::kForwardSlack),
              mutation.forward)
        << mutation.term;
    const Backward gradients =
        run_backward(p, row.target.device, backward_on(row.target), result.checkpoints);
    EXPECT_FALSE(close("selective_scan_backward", mutation.term, row.dtype,
                       gradients.*mutation.gradient, expected.truth_gradients.*mutation.gradient,
                       expected.yardstick_gradients.*mutation.gradient, expected.gradient_slack));
  }
}

INSTANTIATE_TEST_SUITE_P(Base, SelectiveScanMutation,
                         testing::ValuesIn(test::rows<Case>(
                             {star().front(), with("complex", [](Case& c) { c.complex = true; })})),
                         test::row_name<Case>);

// A sequence cut in two, the second part starting from the first's last state, is the whole
// sequence; the gradients agree too when the second part's gradient of its initial state enters the
// first.
using SelectiveScanIdentity = test::TargetTest;

std::vector<double> steps(const Tensor& tensor, std::int64_t begin, std::int64_t end) {
  const std::int64_t length = tensor.shape().sizes.back();
  const std::vector<double> all = tensor.values();
  std::vector<double> some;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const std::int64_t t = static_cast<std::int64_t>(i) % length;
    if (t >= begin && t < end) {
      some.push_back(all[i]);
    }
  }
  return some;
}

Tensor cut(const Tensor& tensor, Device device, std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> sizes = tensor.shape().sizes;
  sizes.back() = end - begin;
  return Tensor::from_values(tensor.dtype(), device, {sizes}, steps(tensor, begin, end));
}

Data cut(const Data& p, Device device, std::int64_t begin, std::int64_t end) {
  Data part = p;
  for (Tensor Data::* tensor :
       {&Data::u, &Data::delta, &Data::B, &Data::C, &Data::z, &Data::dout}) {
    part.*tensor = cut(p.*tensor, device, begin, end);
  }
  return part;
}

void expect_near(const char* what, const std::vector<double>& a, const std::vector<double>& b) {
  ASSERT_EQ(a.size(), b.size()) << what;
  EXPECT_LT(test::nmse(a, b), 1e-12) << what;
}

TEST_P(SelectiveScanIdentity, SplitWithCarriedStateIsTheWhole) {
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
  second.initial = first_result.last_state;
  const Forward second_result = run_forward(second, target.device, forward_on(target));
  expect_near("out, first part", first_result.out.values(), steps(all.out, 0, kCut));
  expect_near("out, second part", second_result.out.values(), steps(all.out, kCut, kLength));
  expect_near("last_state", second_result.last_state.values(), all.last_state.values());

  const Backward second_gradients =
      run_backward(second, target.device, backward_on(target), second_result.checkpoints);
  first.dlast = second_gradients.dinitial;
  const Backward first_gradients =
      run_backward(first, target.device, backward_on(target), first_result.checkpoints);
  expect_near("du, first part", first_gradients.du.values(), steps(all_gradients.du, 0, kCut));
  expect_near("ddelta, second part", second_gradients.ddelta.values(),
              steps(all_gradients.ddelta, kCut, kLength));
  expect_near("dB, first part", first_gradients.dB.values(), steps(all_gradients.dB, 0, kCut));
  expect_near("dinitial_state", first_gradients.dinitial.values(), all_gradients.dinitial.values());
  std::vector<double> dA = first_gradients.dA.values();
  const std::vector<double> second_dA = second_gradients.dA.values();
  for (std::size_t i = 0; i < dA.size(); ++i) {
    dA[i] += second_dA[i];
  }
  expect_near("dA", dA, all_gradients.dA.values());
}

// The last dimension backwards.
std::vector<double> flipped(const Tensor& tensor) {
  std::vector<double> values = tensor.values();
  const std::int64_t length = tensor.shape().sizes.back();
  for (auto row = values.begin(); row != values.end(); row += length) {
    std::reverse(row, row + length);
  }
  return values;
}

TEST_P(SelectiveScanIdentity, ReverseIsFlipScanFlip) {
  const Target& target = GetParam();
  for (const std::int64_t length : {300, 600}) {
    Data p = make(with("", [&](Case& c) { c.length = length; }), DType::f32)
                 .to(DType::f32, target.device);
    Data mirrored = p;
    for (Tensor Data::* tensor :
         {&Data::u, &Data::delta, &Data::B, &Data::C, &Data::z, &Data::dout}) {
      mirrored.*tensor =
          Tensor::from_values(DType::f32, target.device, (p.*tensor).shape(), flipped(p.*tensor));
    }
    const Forward expected = run_forward(mirrored, target.device, forward_on(target));
    const Backward expected_gradients =
        run_backward(mirrored, target.device, backward_on(target), expected.checkpoints);
    p.reverse = true;
    const Forward result = run_forward(p, target.device, forward_on(target));
    const Backward gradients =
        run_backward(p, target.device, backward_on(target), result.checkpoints);
    expect_near("out", result.out.values(), flipped(expected.out));
    expect_near("last_state", result.last_state.values(), expected.last_state.values());
    for (Tensor Backward::* gradient :
         {&Backward::du, &Backward::ddelta, &Backward::dB, &Backward::dC, &Backward::dz}) {
      expect_near("gradient", (gradients.*gradient).values(),
                  flipped(expected_gradients.*gradient));
    }
    for (Tensor Backward::* gradient :
         {&Backward::dA, &Backward::dD, &Backward::dbias, &Backward::dinitial}) {
      expect_near("gradient", (gradients.*gradient).values(),
                  (expected_gradients.*gradient).values());
    }
  }
}

// Every sequence of a packed row is what a call of its own gives: outputs, gradients, its row of
// last_state; the sums are those of all calls.
TEST_P(SelectiveScanIdentity, PackedIsSeparate) {
  const Target& target = GetParam();
  for (const bool reverse : {false, true}) {
    const Data packed = make(with("",
                                  [&](Case& c) {
                                    c.batch = 1;
                                    c.length = 600;
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
    const std::vector<std::int64_t>& state_sizes = packed.initial.shape().sizes;
    std::vector<double> dA(all_gradients.dA.values().size());
    for (std::int64_t begin = 0, end; begin < 600; begin = end) {
      end = begin + 1;
      while (end < 600 &&
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
        const Shape shape = {{1, state_sizes[1], state_sizes[2]}};
        one.initial =
            Tensor::from_values(DType::f32, target.device, shape, state_row(packed.initial, index));
        one.dlast =
            Tensor::from_values(DType::f32, target.device, shape, state_row(packed.dlast, index));
      }
      const Forward result = run_forward(one, target.device, forward_on(target));
      const Backward gradients =
          run_backward(one, target.device, backward_on(target), result.checkpoints);
      expect_near("out", steps(all.out, begin, end), result.out.values());
      for (Tensor Backward::* gradient :
           {&Backward::du, &Backward::ddelta, &Backward::dB, &Backward::dC, &Backward::dz}) {
        expect_near("gradient", steps(all_gradients.*gradient, begin, end),
                    (gradients.*gradient).values());
      }
      if (index >= 0) {
        expect_near("last_state", state_row(all.last_state, index), result.last_state.values());
        expect_near("dinitial_state", state_row(all_gradients.dinitial, index),
                    gradients.dinitial.values());
      }
      const std::vector<double> part = gradients.dA.values();
      std::transform(dA.begin(), dA.end(), part.begin(), dA.begin(), std::plus<double>());
    }
    expect_near("dA", dA, all_gradients.dA.values());
    // The last sequence has no steps.
    EXPECT_EQ(state_row(all.last_state, packed.sequences - 1),
              state_row(packed.initial, packed.sequences - 1));
    EXPECT_EQ(state_row(all_gradients.dinitial, packed.sequences - 1),
              state_row(packed.dlast, packed.sequences - 1));
  }
}

// A NaN stays in its sequence.
TEST_P(SelectiveScanIdentity, SequencesDoNotSeeEachOther) {
  const Target& target = GetParam();
  Data p = make(with("",
                     [](Case& c) {
                       c.batch = 1;
                       c.packing = Packing::numbered;
                     }),
                DType::f32);
  const std::vector<double> indices = p.seq_idx.values();
  std::vector<double> u = p.u.values();
  constexpr std::size_t kLength = 150, kBad = 100;
  for (std::size_t d = 0; d < 20; ++d) {
    u[d * kLength + kBad] = std::numeric_limits<double>::quiet_NaN();
  }
  p.u = Tensor::from_values(DType::f32, test::kCpu, p.u.shape(), u);
  p = p.to(DType::f32, target.device);
  const Forward result = run_forward(p, target.device, forward_on(target));
  const std::vector<double> out = result.out.values();
  const std::vector<double> du =
      run_backward(p, target.device, backward_on(target), result.checkpoints).du.values();
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::size_t t = i % kLength;
    const bool same = indices[t] == indices[kBad];
    EXPECT_EQ(std::isnan(out[i]), same && t >= kBad) << "step " << t;
    EXPECT_FALSE(std::isnan(du[i]) && !same) << "step " << t;
  }
}

// Calls over nothing leave the state they began with, and gradients of zero.
TEST_P(SelectiveScanIdentity, EmptySizes) {
  const Target& target = GetParam();
  const std::function<void(Case&)> nothings[] = {
      [](Case& c) { c.length = 0; }, [](Case& c) { c.batch = 0; }, [](Case& c) { c.channels = 0; }};
  for (const auto& nothing : nothings) {
    for (const bool is_static : {false, true}) {
      const Case problem = with("", [&](Case& c) {
        nothing(c);
        c.static_B = c.static_C = is_static;
      });
      const Data p = make(problem, DType::f32).to(DType::f32, target.device);
      // Through the public interface: that is where empty calls are told apart.
      const Forward result =
          run_forward(p, target.device, static_cast<void (*)(const ForwardParams&)>(&forward));
      EXPECT_EQ(result.last_state.values(), p.initial.values());
      const Backward gradients =
          run_backward(p, target.device, static_cast<void (*)(const BackwardParams&)>(&backward),
                       result.checkpoints);
      EXPECT_EQ(gradients.dinitial.values(), p.dlast.values());
      for (const Tensor* sums :
           {&gradients.dA, &gradients.dB, &gradients.dC, &gradients.dD, &gradients.dbias}) {
        for (const double value : sums->values()) {
          EXPECT_EQ(value, 0.0);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Identity, SelectiveScanIdentity, testing::ValuesIn(test::kTargets),
                         test::target_name);

// ---- the CPU's own promises ----

TEST(SelectiveScanCpu, ResultsDoNotDependOnTheThreads) {
  const Data p = make(with("",
                           [](Case& c) {
                             c.length = 700;
                             c.channels = 200;
                           }),
                      DType::f32);
  std::vector<std::vector<unsigned char>> first;
  for (const int threads : {1, 2, 3, 7}) {
    set_num_threads(threads);
    const Forward result = run_forward(p, test::kCpu, [](const ForwardParams& q) { forward(q); });
    const Backward gradients = run_backward(
        p, test::kCpu, [](const BackwardParams& q) { backward(q); }, result.checkpoints);
    std::vector<std::vector<unsigned char>> bytes;
    for (const Tensor* tensor : {&result.out, &result.last_state, &gradients.du, &gradients.dA,
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

// A NaN in delta reaches every later output of its channel and no other channel.
TEST(SelectiveScanCpu, PropagatesNaN) {
  for (const Target& target : test::kTargets) {
    if (target.device.is_cuda() || !test::unavailable(target).empty()) {
      continue;
    }
    const Case problem = with("", [](Case& c) { c.batch = 1; });
    Data p = make(problem, DType::f32);
    std::vector<double> delta = p.delta.values();
    constexpr std::int64_t kChannel = 3, kStep = 10;
    delta[static_cast<std::size_t>(kChannel * problem.length + kStep)] =
        std::numeric_limits<double>::quiet_NaN();
    p.delta = Tensor::from_values(DType::f32, test::kCpu, p.delta.shape(), delta);
    const std::vector<double> out = run_forward(p, test::kCpu, forward_on(target)).out.values();
    for (std::int64_t d = 0; d < problem.channels; ++d) {
      for (std::int64_t t = 0; t < problem.length; ++t) {
        EXPECT_EQ(std::isnan(out[static_cast<std::size_t>(d * problem.length + t)]),
                  d == kChannel && t >= kStep)
            << target.name << " channel " << d << " step " << t;
      }
    }
  }
}

TEST(SelectiveScanCpu, Float64RunsTheOracle) {
  const Data p = make(star().front(), DType::f64);
  const Expected expected(p);
  const Forward result = run_forward(p, test::kCpu, [](const ForwardParams& q) { forward(q); });
  EXPECT_EQ(result.out.values(), expected.truth.out.values());
  const Backward gradients =
      run_backward(p, test::kCpu, [](const BackwardParams& q) { backward(q); }, result.checkpoints);
  EXPECT_EQ(gradients.dA.values(), expected.truth_gradients.dA.values());
}

// ---- the oracle ----

// delta = ln 2 and A = -1 halve the state at every step. With u = 1, 2, 3, B = 1 / ln 2, h[-1] = 8:
// h = 4 + 1 = 5, 2.5 + 2 = 4.5, 2.25 + 3 = 5.25; C = 1, 2, 4 and D = 10 give y = 15, 29, 51.
TEST(SelectiveScanOracle, ForwardByHand) {
  const double ln2 = std::log(2.0);
  Data p;
  p.dtype = DType::f64;
  const auto tensor = [](std::vector<std::int64_t> sizes, const std::vector<double>& values) {
    return Tensor::from_values(DType::f64, test::kCpu, {std::move(sizes)}, values);
  };
  p.u = tensor({1, 1, 3}, {1, 2, 3});
  p.delta = tensor({1, 1, 3}, {ln2, ln2, ln2});
  p.A = tensor({1, 1}, {-1});
  p.B = tensor({1, 1, 1, 3}, {1 / ln2, 1 / ln2, 1 / ln2});
  p.C = tensor({1, 1, 1, 3}, {1, 2, 4});
  p.D = tensor({1}, {10});
  p.initial = tensor({1, 1, 1}, {8});
  const Forward result = run_forward(p, test::kCpu, &reference::forward<double>);
  const std::vector<double> y = {15, 29, 51};
  for (std::size_t t = 0; t < y.size(); ++t) {
    EXPECT_NEAR(result.out.values()[t], y[t], 1e-13);
  }
  EXPECT_NEAR(result.last_state.values()[0], 5.25, 1e-14);
  EXPECT_EQ(result.checkpoints.values()[0], 8);

  // From the last step to the first: h = 4 + 3 = 7, 3.5 + 2 = 5.5, 2.75 + 1 = 3.75.
  p.reverse = true;
  const Forward reversed = run_forward(p, test::kCpu, &reference::forward<double>);
  const std::vector<double> y_reversed = {13.75, 31, 58};
  for (std::size_t t = 0; t < y.size(); ++t) {
    EXPECT_NEAR(reversed.out.values()[t], y_reversed[t], 1e-13);
  }
  EXPECT_NEAR(reversed.last_state.values()[0], 3.75, 1e-14);
  p.reverse = false;

  // z = 0 closes the gate; softplus(0) = ln 2 and delta = 0 give the same scan as delta = ln 2.
  p.z = tensor({1, 1, 3}, {0, 0, 40});
  p.delta = tensor({1, 1, 3}, {-1, -1, -1});
  p.bias = tensor({1}, {1});
  p.softplus = true;
  const std::vector<double> gated =
      run_forward(p, test::kCpu, &reference::forward<double>).out.values();
  EXPECT_EQ(gated[0], 0);
  EXPECT_EQ(gated[1], 0);
  EXPECT_NEAR(gated[2], 51 * 40.0, 1e-10);
}

// The same numbers backwards, with dout = 1 and dlast_state = 16:
// q = C + carry: q[2] = 4 + 16 = 20, q[1] = 2 + 10 = 12, q[0] = 1 + 6 = 7, and 3.5 leaves to h[-1].
TEST(SelectiveScanOracle, BackwardByHand) {
  const double ln2 = std::log(2.0);
  Data p;
  p.dtype = DType::f64;
  const auto tensor = [](std::vector<std::int64_t> sizes, const std::vector<double>& values) {
    return Tensor::from_values(DType::f64, test::kCpu, {std::move(sizes)}, values);
  };
  p.u = tensor({1, 1, 3}, {1, 2, 3});
  p.delta = tensor({1, 1, 3}, {ln2, ln2, ln2});
  p.A = tensor({1, 1}, {-1});
  p.B = tensor({1, 1, 1, 3}, {1 / ln2, 1 / ln2, 1 / ln2});
  p.C = tensor({1, 1, 1, 3}, {1, 2, 4});
  p.D = tensor({1}, {10});
  p.initial = tensor({1, 1, 1}, {8});
  p.dout = tensor({1, 1, 3}, {1, 1, 1});
  p.dlast = tensor({1, 1, 1}, {16});
  const Backward gradients = run_backward(p, test::kCpu, &reference::backward<double>,
                                          Tensor(DType::f64, test::kCpu, {{1, 1, 1, 1}}));
  const double q[] = {7, 12, 20};
  const double h[] = {5, 4.5, 5.25};
  const double decayed[] = {4, 2.5, 2.25};  // exp(delta A) h[t-1]
  const double u[] = {1, 2, 3};
  double dA = 0;
  for (std::size_t t = 0; t < 3; ++t) {
    EXPECT_NEAR(gradients.du.values()[t], 10 + q[t], 1e-12);  // D g + q delta B
    EXPECT_NEAR(gradients.ddelta.values()[t], q[t] * u[t] / ln2 - q[t] * decayed[t], 1e-12);
    EXPECT_NEAR(gradients.dB.values()[t], q[t] * ln2 * u[t], 1e-12);
    EXPECT_NEAR(gradients.dC.values()[t], h[t], 1e-12);
    dA += q[t] * ln2 * decayed[t];
  }
  EXPECT_NEAR(gradients.dA.values()[0], dA, 1e-12);
  EXPECT_NEAR(gradients.dD.values()[0], 6, 1e-12);
  EXPECT_NEAR(gradients.dinitial.values()[0], 3.5, 1e-12);
}

// L = sum dout out + sum dlast_state last_state, in float64.
double loss(const Data& p) {
  const Forward result = run_forward(p, test::kCpu, &reference::forward<double>);
  double sum = 0;
  const std::vector<double> out = result.out.values(), dout = p.dout.values();
  for (std::size_t i = 0; i < out.size(); ++i) {
    sum += out[i] * dout[i];
  }
  const std::vector<double> last = result.last_state.values(), dlast = p.dlast.values();
  for (std::size_t i = 0; i < dlast.size(); ++i) {
    sum += last[i] * dlast[i];
  }
  return sum;
}

TEST(SelectiveScanOracle, BackwardMatchesFiniteDifferences) {
  for (const bool is_static : {false, true}) {
    for (const int kind : {0, 1, 2, 3}) {
      const bool softplus = kind % 2 == 1;
      const Data p = make(with("",
                               [&](Case& c) {
                                 c.complex = kind / 2 == 1;
                                 c.channels = 4;
                                 c.groups = is_static ? 1 : 2;
                                 c.states = 3;
                                 c.length = 5;
                                 c.static_B = c.static_C = is_static;
                                 c.softplus = softplus;
                                 c.reverse = is_static == softplus;
                                 c.delta_low = softplus ? -1.0 : 3.01;  // above the bias
                                 c.delta_high = softplus ? 1.0 : 3.3;
                               }),
                          DType::f64);
      const Forward result = run_forward(p, test::kCpu, &reference::forward<double>);
      const Backward gradients =
          run_backward(p, test::kCpu, &reference::backward<double>, result.checkpoints);
      struct Pair {
        const char* name;
        Tensor Data::* input;
        Tensor Backward::* gradient;
      };
      const Pair pairs[] = {{"u", &Data::u, &Backward::du},
                            {"delta", &Data::delta, &Backward::ddelta},
                            {"A", &Data::A, &Backward::dA},
                            {"B", &Data::B, &Backward::dB},
                            {"C", &Data::C, &Backward::dC},
                            {"D", &Data::D, &Backward::dD},
                            {"z", &Data::z, &Backward::dz},
                            {"delta_bias", &Data::bias, &Backward::dbias},
                            {"initial_state", &Data::initial, &Backward::dinitial}};
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

struct Bad {
  const char* name;
  std::function<void(Inputs&)> change;
  const char* message;
};

std::string forward_error(const Data& p, const std::function<void(ForwardParams&)>& change) {
  std::string message;
  Forward result = run_forward(p, test::kCpu, [&](const ForwardParams& good) {
    ForwardParams params = good;
    change(params);
    try {
      forward(params);
    } catch (const Error& error) {
      message = error.what();
    }
  });
  for (const Tensor* output : {&result.out, &result.last_state, &result.checkpoints}) {
    for (const double value : output->values()) {
      EXPECT_TRUE(std::isnan(value)) << "memory was touched before the error";
    }
  }
  return message;
}

TEST(SelectiveScanErrors, BadInputNamesTheArgument) {
  const Data p = make(star().front(), DType::f32);
  const Bad bad[] = {
      {"u dim", [](Inputs& in) { in.u.dim = 2; }, "u must have shape (batch, channels, length)"},
      {"A dim", [](Inputs& in) { in.A.dim = 1; }, "A must have shape (channels, states)"},
      {"u dtype", [](Inputs& in) { in.u.dtype = DType::i32; }, "u must be float32, float16"},
      {"no states", [](Inputs& in) { in.A.size[1] = 0; }, "A must have at least one state"},
      {"delta shape", [](Inputs& in) { in.delta.size[2] = 151; },
       "delta must have shape (2, 20, 150)"},
      {"delta dtype", [](Inputs& in) { in.delta.dtype = DType::f16; }, "delta must be float32"},
      {"delta missing", [](Inputs& in) { in.delta = TensorView(); }, "delta is missing"},
      {"A shape", [](Inputs& in) { in.A.size[0] = 19; }, "A must have shape (20, 16)"},
      {"A dtype", [](Inputs& in) { in.A.dtype = DType::bf16; }, "A must be float32"},
      {"B dim", [](Inputs& in) { in.B.dim = 3; },
       "B must have shape (20, 16) or (2, groups, 16, 150)"},
      {"B states", [](Inputs& in) { in.B.size[2] = 15; }, "B must have shape (2, 1, 16, 150)"},
      {"B groups", [](Inputs& in) { in.B.size[1] = 3; },
       "cannot be divided into the 3 groups of B"},
      {"no groups", [](Inputs& in) { in.B.size[1] = 0; },
       "cannot be divided into the 0 groups of B"},
      {"other groups", [](Inputs& in) { in.C.size[1] = 2; }, "B has 1 groups and C 2"},
      {"C length", [](Inputs& in) { in.C.size[3] = 69; }, "C must have shape (2, 1, 16, 150)"},
      {"C dtype", [](Inputs& in) { in.C.dtype = DType::f16; }, "C must be float32"},
      {"D shape", [](Inputs& in) { in.D.size[0] = 21; }, "D must have shape (20)"},
      {"z shape", [](Inputs& in) { in.z.size[0] = 1; }, "z must have shape (2, 20, 150)"},
      {"bias dtype", [](Inputs& in) { in.delta_bias.dtype = DType::f64; },
       "delta_bias must be float32"},
      {"initial shape", [](Inputs& in) { in.initial_state.size[2] = 8; },
       "initial_state must have shape (2, 20, 16)"},
      {"seq_idx shape", [](Inputs& in) { in.seq_idx = TensorView(nullptr, DType::i32, {2, 149}); },
       "seq_idx must have shape (2, 150)"},
      {"seq_idx dtype", [](Inputs& in) { in.seq_idx = TensorView(nullptr, DType::i64, {2, 150}); },
       "seq_idx must be int32"},
      {"sequences without seq_idx", [](Inputs& in) { in.sequences = 3; },
       "with sequences, u must have batch 1 and seq_idx must say"},
      {"sequences below 0", [](Inputs& in) { in.sequences = -1; }, "sequences must be 0 or"},
      {"device", [](Inputs& in) { in.z.device = test::kCuda; }, "z must be on cpu"},
      {"no memory", [](Inputs& in) { in.B.data = nullptr; }, "B has no memory"},
      {"negative stride", [](Inputs& in) { in.u.stride[2] = -1; }, "u has a negative stride"},
      {"overflow", [](Inputs& in) { in.u.stride[0] = std::int64_t{1} << 61; },
       "u is larger than 64-bit offsets"},
      {"negative size",
       [](Inputs& in) {
         in.u.size[0] = -2;
         in.delta.size[0] = -2;
       },
       "u has a negative size"},
  };
  for (const Bad& row : bad) {
    const std::string message =
        forward_error(p, [&](ForwardParams& params) { row.change(params.in); });
    EXPECT_NE(message.find(row.message), std::string::npos)
        << row.name << ": \"" << message << "\"";
    EXPECT_EQ(message.find("selective_scan_forward: "), 0u)
        << row.name << ": \"" << message << "\"";
  }
}

TEST(SelectiveScanErrors, BadOutputNamesTheArgument) {
  const Data p = make(star().front(), DType::f32);
  const std::pair<std::function<void(ForwardParams&)>, const char*> bad[] = {
      {[](ForwardParams& q) { q.out.dtype = DType::f16; }, "out must be float32"},
      {[](ForwardParams& q) { q.out.stride[1] = 0; },
       "out is written, so its elements may not share memory"},
      {[](ForwardParams& q) { q.last_state = TensorView(); }, "last_state is missing"},
      {[](ForwardParams& q) { q.checkpoints.size[2] = 2; },
       "checkpoints must have shape (2, 20, 1, 16)"},
      {[](ForwardParams& q) { q.checkpoints.stride[0] = 500; }, "checkpoints must be contiguous"},
  };
  for (const auto& row : bad) {
    const std::string message = forward_error(p, row.first);
    EXPECT_NE(message.find(row.second), std::string::npos)
        << row.second << ": \"" << message << "\"";
  }
}

TEST(SelectiveScanErrors, BadGradientNamesTheArgument) {
  const Data p = make(star().front(), DType::f32);
  const std::pair<std::function<void(BackwardParams&)>, const char*> bad[] = {
      {[](BackwardParams& q) { q.dout.size[2] = 3; }, "dout must have shape (2, 20, 150)"},
      {[](BackwardParams& q) { q.dlast_state.dtype = DType::f16; }, "dlast_state must be float32"},
      {[](BackwardParams& q) { q.checkpoints = TensorView(); }, "checkpoints is missing"},
      {[](BackwardParams& q) { q.dB.stride[0] = 5000; }, "dB must be contiguous"},
      {[](BackwardParams& q) { q.dC.size[3] = 1; }, "dC must have shape (2, 1, 16, 150)"},
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
    EXPECT_EQ(message.find(std::string("selective_scan_backward: ") + row.second), 0u)
        << row.second << ": \"" << message << "\"";
    for (const double value : result.du.values()) {
      EXPECT_TRUE(std::isnan(value)) << "memory was touched before the error";
    }
  }
}

TEST(SelectiveScanErrors, Float64OnAGpuIsRefusedByName) {
  Data p = make(star().front(), DType::f64);
  const std::string message =
      forward_error(p, [](ForwardParams& params) { params.in.u.device = test::kCuda; });
  EXPECT_NE(message.find("u is float64, which only the CPU takes"), std::string::npos) << message;
}

#if !MAMBA_WITH_CUDA
TEST(SelectiveScanErrors, ABuildWithoutTheDeviceSaysSo) {
  const Data p = make(star().front(), DType::f32);
  const std::string message = forward_error(p, [](ForwardParams& params) {
    Inputs& in = params.in;
    for (TensorView* view :
         {&in.u, &in.delta, &in.A, &in.B, &in.C, &in.D, &in.z, &in.delta_bias, &in.initial_state,
          &params.out, &params.last_state, &params.checkpoints}) {
      view->device = test::kCuda;
    }
  });
  EXPECT_NE(message.find("built without CUDA"), std::string::npos) << message;
}
#endif

// ---- the choice of a CUDA kernel, which needs no GPU ----

TEST(SelectiveScanPlan, ChoosesARowForEveryProblem) {
  mamba_native::cuda::DeviceInfo device;
  device.multiprocessors = 132;
  device.major = 9;
  device.shared_memory_per_block = 227 * 1024;
  for (const Case& c : star()) {
    const Problem problem = problem_of(make(c, DType::f32).inputs());
    EXPECT_EQ(problem.groups, c.static_B && c.static_C ? 1 : c.groups) << c.name;
    const int forward_row = choose_forward(problem, device);
    EXPECT_GE(forward_row, 0) << c.name;
    EXPECT_LT(forward_row, kForwardConfigCount) << c.name;
    EXPECT_EQ(choose_forward(problem, device, forward_row), forward_row) << c.name;
    const int backward_row = choose_backward(problem, device);
    EXPECT_GE(backward_row, 0) << c.name;
    EXPECT_LT(backward_row, kBackwardConfigCount) << c.name;
    EXPECT_EQ(choose_backward(problem, device, backward_row), backward_row) << c.name;
  }
}

TEST(SelectiveScanPlan, RefusesRowsThatDoNotExistOrDoNotFit) {
  mamba_native::cuda::DeviceInfo device;
  device.multiprocessors = 132;
  device.shared_memory_per_block = 64 * 1024;
  Problem problem;
  EXPECT_THROW(choose_forward(problem, device, kForwardConfigCount), Error);
  EXPECT_THROW(choose_backward(problem, device, kBackwardConfigCount), Error);
  problem.d_state = kSerialStates + 1;
  EXPECT_THROW(choose_forward(problem, device, 0), Error);
  problem.d_state = 4096;
  EXPECT_THROW(choose_backward(problem, device, 0), Error);
}

#if MAMBA_WITH_CUDA
// Every row of both tables that can run a problem is right on it, chosen or not.
class SelectiveScanCudaConfig : public testing::TestWithParam<int> {};

TEST_P(SelectiveScanCudaConfig, MatchesTheOracle) {
  const std::string reason = test::cuda_unavailable();
  if (!reason.empty()) {
    GTEST_SKIP() << reason;
  }
  const int config = GetParam();
  const mamba_native::cuda::DeviceInfo& device = mamba_native::cuda::device_info(0);
  int ran = 0;
  for (const Case& c : star()) {
    SCOPED_TRACE(c.name);
    const Data host = make(c, DType::f32);
    const Data p = host.to(DType::f32, test::kCuda);
    int forward_row = config, backward_row = config;
    try {
      choose_forward(problem_of(p.inputs()), device, config);
      ++ran;
    } catch (const Error&) {
      forward_row = -1;
    }
    try {
      choose_backward(problem_of(p.inputs()), device, config);
      ++ran;
    } catch (const Error&) {
      backward_row = -1;
    }
    if (forward_row < 0 && backward_row < 0) {
      continue;
    }
    const Expected expected(host);
    const Forward result =
        run_forward(p, test::kCuda, [](const ForwardParams& q) { forward(q); }, forward_row);
    expect_close(result, expected, DType::f32);
    expect_close(run_backward(
                     p, test::kCuda, [](const BackwardParams& q) { backward(q); },
                     result.checkpoints, backward_row),
                 expected, DType::f32);
  }
  EXPECT_GT(ran, 0) << "no problem of the star can run this row";
}

// Sums in a fixed order are the same sums, and the same bits every time.
Backward run_ordered(const Data& p, const Tensor& checkpoints) {
  Tensor workspace;
  return run_backward(
      p, test::kCuda,
      [&](const BackwardParams& atomic) {
        BackwardParams params = atomic;
        params.deterministic = true;
        workspace = Tensor(DType::f32, test::kCuda, {{backward_workspace(params)}});
        params.workspace = workspace.view();
        backward(params);
      },
      checkpoints);
}

TEST(SelectiveScanCuda, OrderedSumsMatchTheOracleAndRepeatThemselves) {
  const std::string reason = test::cuda_unavailable();
  if (!reason.empty()) {
    GTEST_SKIP() << reason;
  }
  for (const Case& c : star()) {
    SCOPED_TRACE(c.name);
    const Data host = make(c, DType::f32);
    const Data p = host.to(DType::f32, test::kCuda);
    const Tensor checkpoints =
        run_forward(p, test::kCuda, [](const ForwardParams& q) { forward(q); }).checkpoints;
    const Backward once = run_ordered(p, checkpoints);
    expect_close(once, Expected(host), DType::f32);
    const Backward again = run_ordered(p, checkpoints);
    for (const auto sum : {&Backward::dA, &Backward::dB, &Backward::dC, &Backward::dD,
                           &Backward::dbias, &Backward::dinitial}) {
      if ((once.*sum).present()) {
        EXPECT_EQ((once.*sum).values(), (again.*sum).values());
      }
    }
  }
}

std::string config_name(const testing::TestParamInfo<int>& info) {
  return "cuda_" + std::to_string(info.param);
}

INSTANTIATE_TEST_SUITE_P(Config, SelectiveScanCudaConfig,
                         testing::Range(0, std::max(kForwardConfigCount, kBackwardConfigCount)),
                         config_name);
#endif

}  // namespace
}  // namespace mamba_native::selective_scan
