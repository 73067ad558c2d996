// The gated norm in SIMD: the features of a group lie across the lanes, one row and group after the
// other. A group is converted to float32 once, into arrays that stay in the first-level cache.
#pragma once

#include <cmath>

#include "core/cpu/rows.h"
#include "gated_norm/cpu.h"
#include "gated_norm/gate.h"

namespace mamba_native::gated_norm::cpu {

using mamba_native::cpu::kLanes;
using mamba_native::cpu::Sum;
using mamba_native::cpu::Vec;

// Elements [first, first + count) of row m of a (M, N) tensor, or of a (N) one.
template <class Arch>
void read_group(const TensorView& tensor, std::int64_t m, std::int64_t first, std::int64_t count,
                float* to) {
  const int last = tensor.dim - 1;
  const std::int64_t step = tensor.stride[last];
  const std::int64_t offset = (last == 0 ? 0 : m * tensor.stride[0]) + first * step;
  for_dtype(tensor.dtype, [&](auto tag) {
    mamba_native::cpu::read_typed<Arch>(tensor.as<const decltype(tag)>() + offset, step, count, to);
  });
}

template <class Arch>
void write_group(const TensorView& tensor, std::int64_t m, std::int64_t first, std::int64_t count,
                 const float* from) {
  for_dtype(tensor.dtype, [&](auto tag) {
    mamba_native::cpu::write_typed<Arch>(
        from, tensor.stride[1], count,
        tensor.as<decltype(tag)>() + m * tensor.stride[0] + first * tensor.stride[1]);
  });
}

// weight and bias of all groups, padded each.
template <class Arch, class Params>
void read_affine(const Params& p, float* weight, float* bias) {
  const std::int64_t width = padded(p.group_size);
  for (std::int64_t group = 0; group * p.group_size < p.x.size[1]; ++group) {
    const std::int64_t first = group * p.group_size;
    read_group<Arch>(p.weight, 0, first, p.group_size, weight + group * width);
    if (p.bias.present()) {
      read_group<Arch>(p.bias, 0, first, p.group_size, bias + group * width);
    }
  }
}

template <class Arch, Gate GATE>
void forward_groups(const ForwardParams& p, std::int64_t begin, std::int64_t end, float* scratch) {
  using V = Vec<Arch>;
  constexpr std::int64_t kStep = kLanes<Arch>;
  const std::int64_t count = p.group_size;
  const std::int64_t groups = p.x.size[1] / count;
  const std::int64_t rows = p.x.size[0];
  const std::int64_t width = padded(count);
  float* const u = scratch;
  float* const z = u + width;
  float* const y = z + width;
  float* const weights = y + width;
  float* const biases = weights + groups * width;  // zeros when absent
  read_affine<Arch>(p, weights, biases);
  for (std::int64_t item = begin * groups; item < end * groups; ++item) {
    const std::int64_t m = item / groups;
    const std::int64_t group = item % groups;
    const float* const weight = weights + group * width;
    const float* const bias = biases + group * width;
    read_group<Arch>(p.x, m, group * count, count, u);
    if constexpr (GATE != Gate::none) {
      read_group<Arch>(p.z, m, group * count, count, z);
    }
    Sum<Arch> sum;
    for (std::int64_t n = 0; n < width; n += kStep) {
      V value = V::load_unaligned(u + n);
      if constexpr (GATE == Gate::before) {
        value *= mamba_native::cpu::silu<Arch>(V::load_unaligned(z + n));
        value.store_unaligned(u + n);
      }
      sum[n] += value;
    }
    const float mean = p.is_rms_norm ? 0.0f : sum.total() / static_cast<float>(count);
    for (std::int64_t n = count; n < width; ++n) {
      u[n] = mean;  // the padding adds nothing to the variance
    }
    Sum<Arch> squares;
    for (std::int64_t n = 0; n < width; n += kStep) {
      const V centred = V::load_unaligned(u + n) - V(mean);
      squares[n] = xsimd::fma(centred, centred, squares[n]);
    }
    const float rstd =
        1.0f / std::sqrt(squares.total() / static_cast<float>(count) + static_cast<float>(p.eps));
    for (std::int64_t n = 0; n < width; n += kStep) {
      const V xhat = (V::load_unaligned(u + n) - V(mean)) * V(rstd);
      V value = xsimd::fma(xhat, V::load_unaligned(weight + n), V::load_unaligned(bias + n));
      if constexpr (GATE == Gate::after) {
        value *= mamba_native::cpu::silu<Arch>(V::load_unaligned(z + n));
      }
      value.store_unaligned(y + n);
    }
    write_group<Arch>(p.y, m, group * count, count, y);
    for (std::int64_t n = count; n < width; ++n) {
      u[n] = 0.0f;
    }
    if (!p.is_rms_norm) {
      p.mean.as<float>()[group * rows + m] = mean;
    }
    p.rstd.as<float>()[group * rows + m] = rstd;
  }
}

template <class Arch, Gate GATE>
void backward_groups(const BackwardParams& p, std::int64_t begin, std::int64_t end, float* scratch,
                     float* workspace) {
  using V = Vec<Arch>;
  constexpr std::int64_t kStep = kLanes<Arch>;
  const std::int64_t count = p.group_size;
  const std::int64_t features = p.x.size[1];
  const std::int64_t groups = features / count;
  const std::int64_t width = padded(count);
  float* const x = scratch;  // then dx
  float* const z = x + width;
  float* const dy = z + width;  // 0 beyond the group, so that nothing there counts
  float* const xhat = dy + width;
  float* const g = xhat + width;
  float* const y = g + width;
  float* const dz = y + width;
  float* const weights = dz + width;
  float* const biases = weights + groups * width;  // zeros when absent
  float* const dweights = biases + groups * width;
  float* const dbiases = dweights + groups * width;
  read_affine<Arch>(p, weights, biases);
  for (std::int64_t item = begin * groups; item < end * groups; ++item) {
    const std::int64_t m = item / groups;
    const std::int64_t group = item % groups;
    const std::int64_t first = group * count;
    const float* const weight = weights + group * width;
    const float* const bias = biases + group * width;
    float* const dweight = dweights + group * width;
    float* const dbias = dbiases + group * width;
    const auto saved = [&](const TensorView& of) {
      return of.as<const float>()[group * of.stride[0] + m * of.stride[1]];
    };
    const float mean = p.is_rms_norm ? 0.0f : saved(p.mean);
    const float rstd = saved(p.rstd);
    read_group<Arch>(p.x, m, first, count, x);
    read_group<Arch>(p.dy, m, first, count, dy);
    if constexpr (GATE != Gate::none) {
      read_group<Arch>(p.z, m, first, count, z);
    }
    Sum<Arch> sum1;
    Sum<Arch> sum2;
    for (std::int64_t n = 0; n < width; n += kStep) {
      V u = V::load_unaligned(x + n);
      if constexpr (GATE == Gate::before) {
        u *= mamba_native::cpu::silu<Arch>(V::load_unaligned(z + n));
      }
      const V normal = (u - V(mean)) * V(rstd);
      const V w = V::load_unaligned(weight + n);
      V value = xsimd::fma(normal, w, V::load_unaligned(bias + n));
      V dv = V::load_unaligned(dy + n);
      if constexpr (GATE == Gate::after) {
        const V gate = V::load_unaligned(z + n);
        const V s = mamba_native::cpu::sigmoid<Arch>(gate);
        const V slope = s * xsimd::fma(gate, V(1.0f) - s, V(1.0f));
        (dv * value * slope).store_unaligned(dz + n);
        dv *= gate * s;
        value *= gate * s;
      }
      value.store_unaligned(y + n);
      xsimd::fma(dv, normal, V::load_unaligned(dweight + n)).store_unaligned(dweight + n);
      (V::load_unaligned(dbias + n) + dv).store_unaligned(dbias + n);
      const V inner = w * dv;
      sum1[n] = xsimd::fma(normal, inner, sum1[n]);
      sum2[n] += inner;
      normal.store_unaligned(xhat + n);
      inner.store_unaligned(g + n);
    }
    const V c1(sum1.total() / static_cast<float>(count));
    const V c2(p.is_rms_norm ? 0.0f : sum2.total() / static_cast<float>(count));
    for (std::int64_t n = 0; n < width; n += kStep) {
      const V inner = V::load_unaligned(g + n) - V::load_unaligned(xhat + n) * c1 - c2;
      V du = inner * V(rstd);
      if constexpr (GATE == Gate::before) {
        const V gate = V::load_unaligned(z + n);
        const V s = mamba_native::cpu::sigmoid<Arch>(gate);
        const V slope = s * xsimd::fma(gate, V(1.0f) - s, V(1.0f));
        (du * V::load_unaligned(x + n) * slope).store_unaligned(dz + n);
        du *= gate * s;
      }
      du.store_unaligned(x + n);
    }
    write_group<Arch>(p.dx, m, first, count, x);
    if constexpr (GATE != Gate::none) {
      write_group<Arch>(p.dz, m, first, count, dz);
    }
    if (p.y.present()) {
      write_group<Arch>(p.y, m, first, count, y);
    }
    for (std::int64_t n = count; n < width; ++n) {
      x[n] = 0.0f;  // or it would grow with rstd from group to group, and infinity times 0 is NaN
    }
  }
  for (std::int64_t n = 0; n < features; ++n) {
    const std::int64_t from = n / count * width + n % count;
    workspace[n] = dweights[from];
    workspace[features + n] = dbiases[from];
  }
}

template <class Arch>
void forward_rows(const ForwardParams& p, std::int64_t begin, std::int64_t end, float* scratch) {
  switch (gate_of(p)) {
    case Gate::none:
      return forward_groups<Arch, Gate::none>(p, begin, end, scratch);
    case Gate::before:
      return forward_groups<Arch, Gate::before>(p, begin, end, scratch);
    case Gate::after:
      return forward_groups<Arch, Gate::after>(p, begin, end, scratch);
  }
}

template <class Arch>
void backward_rows(const BackwardParams& p, std::int64_t begin, std::int64_t end, float* scratch,
                   float* workspace) {
  switch (gate_of(p)) {
    case Gate::none:
      return backward_groups<Arch, Gate::none>(p, begin, end, scratch, workspace);
    case Gate::before:
      return backward_groups<Arch, Gate::before>(p, begin, end, scratch, workspace);
    case Gate::after:
      return backward_groups<Arch, Gate::after>(p, begin, end, scratch, workspace);
  }
}

}  // namespace mamba_native::gated_norm::cpu
