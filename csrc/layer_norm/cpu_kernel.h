// The norm in SIMD: features lie across the lanes, one row after the other. A row is converted to
// float32 once, into an array that stays in the first-level cache.
#pragma once

#include <cmath>

#include "core/cpu/simd.h"
#include "layer_norm/cpu.h"

namespace mamba_native::layer_norm::cpu {

using mamba_native::cpu::kLanes;
using mamba_native::cpu::Vec;

template <class Arch, class T>
void read_typed(const T* from, std::int64_t step, std::int64_t count, float* to) {
  std::int64_t n = 0;
  for (; step == 1 && n + kLanes<Arch> <= count; n += kLanes<Arch>) {
    mamba_native::cpu::load<Arch>(from + n).store_unaligned(to + n);
  }
  for (; n < count; ++n) {
    to[n] = to_float(from[n * step]);
  }
}

template <class Arch, class T>
void write_typed(const float* from, std::int64_t step, std::int64_t count, T* to) {
  std::int64_t n = 0;
  for (; step == 1 && n + kLanes<Arch> <= count; n += kLanes<Arch>) {
    mamba_native::cpu::store<Arch>(to + n, Vec<Arch>::load_unaligned(from + n));
  }
  for (; n < count; ++n) {
    T lanes[kLanes<Arch>];
    mamba_native::cpu::store<Arch>(lanes, Vec<Arch>(from[n]));
    to[n * step] = lanes[0];
  }
}

// Row m of a (M, N) tensor, or the whole of a (N) one.
template <class Arch>
void read_row(const TensorView& tensor, std::int64_t m, float* to) {
  const int last = tensor.dim - 1;
  const std::int64_t offset = last == 0 ? 0 : m * tensor.stride[0];
  for_dtype(tensor.dtype, [&](auto tag) {
    read_typed<Arch>(tensor.as<const decltype(tag)>() + offset, tensor.stride[last],
                     tensor.size[last], to);
  });
}

template <class Arch>
void write_row(const TensorView& tensor, std::int64_t m, const float* from) {
  for_dtype(tensor.dtype, [&](auto tag) {
    write_typed<Arch>(from, tensor.stride[1], tensor.size[1],
                      tensor.as<decltype(tag)>() + m * tensor.stride[0]);
  });
}

// Four independent chains hide the latency of the additions.
template <class Arch>
struct Sum {
  Vec<Arch> chains[4] = {Vec<Arch>(0.0f), Vec<Arch>(0.0f), Vec<Arch>(0.0f), Vec<Arch>(0.0f)};

  MAMBA_ALWAYS_INLINE Vec<Arch>& operator[](std::int64_t n) { return chains[n / kLanes<Arch> % 4]; }
  MAMBA_ALWAYS_INLINE float total() const {
    return xsimd::reduce_add((chains[0] + chains[1]) + (chains[2] + chains[3]));
  }
};

// y = (h - mean) rstd weight + bias with h = x + residual.
template <class Arch>
void forward_rows(const ForwardParams& p, std::int64_t begin, std::int64_t end, float* scratch) {
  using V = Vec<Arch>;
  constexpr std::int64_t kStep = kLanes<Arch>;
  const std::int64_t features = p.x.size[1];
  const std::int64_t width = padded(features);
  float* const h = scratch;
  float* const weight = h + width;
  float* const bias = weight + width;  // zeros when absent
  float* const other = bias + width;   // the residual, then y
  read_row<Arch>(p.weight, 0, weight);
  if (p.bias.present()) {
    read_row<Arch>(p.bias, 0, bias);
  }
  for (std::int64_t m = begin; m < end; ++m) {
    read_row<Arch>(p.x, m, h);
    if (p.residual.present()) {
      read_row<Arch>(p.residual, m, other);
      for (std::int64_t n = 0; n < width; n += kStep) {
        (V::load_unaligned(h + n) + V::load_unaligned(other + n)).store_unaligned(h + n);
      }
    }
    if (p.residual_out.present()) {
      write_row<Arch>(p.residual_out, m, h);
    }
    float mean = 0.0f;
    if (!p.is_rms_norm) {
      Sum<Arch> sum;
      for (std::int64_t n = 0; n < width; n += kStep) {
        sum[n] += V::load_unaligned(h + n);
      }
      mean = sum.total() / static_cast<float>(features);
      for (std::int64_t n = features; n < width; ++n) {
        h[n] = mean;  // the padding adds nothing to the variance
      }
    }
    Sum<Arch> squares;
    for (std::int64_t n = 0; n < width; n += kStep) {
      const V centred = V::load_unaligned(h + n) - V(mean);
      squares[n] = xsimd::fma(centred, centred, squares[n]);
    }
    const float rstd = 1.0f / std::sqrt(squares.total() / static_cast<float>(features) +
                                        static_cast<float>(p.eps));
    for (std::int64_t n = 0; n < width; n += kStep) {
      const V xhat = (V::load_unaligned(h + n) - V(mean)) * V(rstd);
      xsimd::fma(xhat, V::load_unaligned(weight + n), V::load_unaligned(bias + n))
          .store_unaligned(other + n);
    }
    write_row<Arch>(p.y, m, other);
    for (std::int64_t n = features; n < width; ++n) {
      h[n] = other[n] = 0.0f;
    }
    if (!p.is_rms_norm) {
      p.mean.as<float>()[m] = mean;
    }
    p.rstd.as<float>()[m] = rstd;
  }
}

// dh = (w dy - xhat c1 - c2) rstd + dresidual_out.
template <class Arch>
void backward_rows(const BackwardParams& p, std::int64_t begin, std::int64_t end, float* scratch,
                   float* workspace) {
  using V = Vec<Arch>;
  constexpr std::int64_t kStep = kLanes<Arch>;
  const std::int64_t features = p.h.size[1];
  const std::int64_t width = padded(features);
  float* const xhat = scratch;
  float* const wdy = xhat + width;
  float* const dh = wdy + width;
  float* const weight = dh + width;
  float* const dweight = weight + width;
  float* const dbias = dweight + width;
  read_row<Arch>(p.weight, 0, weight);
  for (std::int64_t m = begin; m < end; ++m) {
    const float mean = p.is_rms_norm ? 0.0f : p.mean.as<const float>()[m];
    const float rstd = p.rstd.as<const float>()[m];
    read_row<Arch>(p.h, m, xhat);
    read_row<Arch>(p.dy, m, wdy);  // 0 beyond the row, so that nothing there counts
    if (p.dresidual_out.present()) {
      read_row<Arch>(p.dresidual_out, m, dh);
    }
    Sum<Arch> sum1;
    Sum<Arch> sum2;
    for (std::int64_t n = 0; n < width; n += kStep) {
      const V x = (V::load_unaligned(xhat + n) - V(mean)) * V(rstd);
      const V dy = V::load_unaligned(wdy + n);
      const V w = V::load_unaligned(weight + n) * dy;
      sum1[n] = xsimd::fma(x, w, sum1[n]);
      sum2[n] += w;
      xsimd::fma(dy, x, V::load_unaligned(dweight + n)).store_unaligned(dweight + n);
      (V::load_unaligned(dbias + n) + dy).store_unaligned(dbias + n);
      x.store_unaligned(xhat + n);
      w.store_unaligned(wdy + n);
    }
    const V c1(sum1.total() / static_cast<float>(features));
    const V c2(p.is_rms_norm ? 0.0f : sum2.total() / static_cast<float>(features));
    for (std::int64_t n = 0; n < width; n += kStep) {
      const V inner = V::load_unaligned(wdy + n) - V::load_unaligned(xhat + n) * c1 - c2;
      const V gradient = inner * V(rstd);
      (p.dresidual_out.present() ? gradient + V::load_unaligned(dh + n) : gradient)
          .store_unaligned(dh + n);
    }
    write_row<Arch>(p.dx, m, dh);
    if (p.dresidual.present()) {
      write_row<Arch>(p.dresidual, m, dh);
    }
  }
  for (std::int64_t n = 0; n < features; ++n) {
    workspace[n] = dweight[n];
    workspace[features + n] = dbias[n];
  }
}

}  // namespace mamba_native::layer_norm::cpu
