// The norm in SIMD: features lie across the lanes, one row after the other. A row is converted to
// float32 once, into an array that stays in the first-level cache.
#pragma once

#include <cmath>

#include "core/cpu/rows.h"
#include "layer_norm/cpu.h"
#include "layer_norm/dropout.h"

namespace mamba_native::layer_norm::cpu {

using mamba_native::cpu::kLanes;
using mamba_native::cpu::read_typed;
using mamba_native::cpu::Sum;
using mamba_native::cpu::Vec;
using mamba_native::cpu::write_typed;

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

// The branches of a call: x with its rowscale is 0, x1 is 1.
template <class Arch>
struct Branches {
  Branches(const DropoutParams& params, const TensorView& scales, std::int64_t columns)
      : dropout(dropout_of(params.p)),
        seed(dropout.threshold > 0 ? *params.seed.as<const std::uint64_t>() : 0),
        rowscale(scales),
        features(columns) {}

  // row = dropout(row rowscale), and its mask unless null. `factors` is scratch.
  void apply(unsigned branch, std::int64_t m, float* row, float* factors,
             std::uint8_t* mask) const {
    if (branch == 0 && rowscale.present()) {
      float scale = 0.0f;
      for_dtype(rowscale.dtype, [&](auto tag) {
        scale = to_float(rowscale.as<const decltype(tag)>()[m * rowscale.stride[0]]);
      });
      for (std::int64_t n = 0; n < features; ++n) {
        row[n] *= scale;
      }
    }
    if (dropout.threshold == 0) {
      return;
    }
    for (std::int64_t n = 0; n < padded(features); n += kDropoutGroup) {
      const unsigned bits = kept(dropout, seed, branch, m, n / kDropoutGroup);
      for (int i = 0; i < kDropoutGroup; ++i) {
        factors[n + i] = (bits >> i & 1u) != 0 ? dropout.scale : 0.0f;
      }
    }
    for (std::int64_t n = 0; n < features; ++n) {  // dropped infinities and NaNs are gone, too
      row[n] = factors[n] > 0.0f ? row[n] * factors[n] : 0.0f;
    }
    for (std::int64_t n = 0; mask != nullptr && n < features; ++n) {
      mask[m * features + n] = factors[n] > 0.0f ? 1 : 0;
    }
  }

  Dropout dropout;
  std::uint64_t seed;
  const TensorView& rowscale;
  std::int64_t features;
};

template <class Arch>
void add_rows(const float* from, std::int64_t width, float* to) {
  using V = Vec<Arch>;
  for (std::int64_t n = 0; n < width; n += kLanes<Arch>) {
    (V::load_unaligned(to + n) + V::load_unaligned(from + n)).store_unaligned(to + n);
  }
}

// y = (h - mean) rstd weight + bias with h = dropout(x rowscale) + dropout(x1) + residual.
template <class Arch>
void forward_rows(const ForwardParams& p, std::int64_t begin, std::int64_t end, float* scratch) {
  using V = Vec<Arch>;
  constexpr std::int64_t kStep = kLanes<Arch>;
  const std::int64_t features = p.x.size[1];
  const std::int64_t width = padded(features);
  const Branches<Arch> branches(p.dropout, p.rowscale, features);
  float* const h = scratch;
  float* const other = h + width;  // what joins the sum, then y
  float* const weight = other + width;
  float* const bias = weight + width;  // zeros when absent
  float* const weight1 = bias + width;
  float* const bias1 = weight1 + width;  // zeros when absent
  float* const factors = bias1 + width;
  read_row<Arch>(p.weight, 0, weight);
  if (p.bias.present()) {
    read_row<Arch>(p.bias, 0, bias);
  }
  if (p.weight1.present()) {
    read_row<Arch>(p.weight1, 0, weight1);
  }
  if (p.bias1.present()) {
    read_row<Arch>(p.bias1, 0, bias1);
  }
  for (std::int64_t m = begin; m < end; ++m) {
    read_row<Arch>(p.x, m, h);
    if (has_branches(p)) {
      branches.apply(0, m, h, factors, p.mask);
    }
    if (p.x1.present()) {
      read_row<Arch>(p.x1, m, other);
      branches.apply(1, m, other, factors, p.mask1);
      add_rows<Arch>(other, width, h);
    }
    if (p.residual.present()) {
      read_row<Arch>(p.residual, m, other);
      add_rows<Arch>(other, width, h);
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
    const auto write_affine = [&](const float* w, const float* b, const TensorView& to) {
      for (std::int64_t n = 0; n < width; n += kStep) {
        const V xhat = (V::load_unaligned(h + n) - V(mean)) * V(rstd);
        xsimd::fma(xhat, V::load_unaligned(w + n), V::load_unaligned(b + n))
            .store_unaligned(other + n);
      }
      write_row<Arch>(to, m, other);
    };
    write_affine(weight, bias, p.y);
    if (p.weight1.present()) {
      write_affine(weight1, bias1, p.y1);
    }
    for (std::int64_t n = features; n < width; ++n) {
      h[n] = other[n] = 0.0f;
    }
    if (!p.is_rms_norm) {
      p.mean.as<float>()[m] = mean;
    }
    p.rstd.as<float>()[m] = rstd;
  }
}

// dh = (g - xhat c1 - c2) rstd + dresidual_out with g = w dy + w1 dy1.
template <class Arch>
void backward_rows(const BackwardParams& p, std::int64_t begin, std::int64_t end, float* scratch,
                   float* workspace) {
  using V = Vec<Arch>;
  constexpr std::int64_t kStep = kLanes<Arch>;
  const std::int64_t features = p.h.size[1];
  const std::int64_t width = padded(features);
  const Branches<Arch> branches(p.dropout, p.rowscale, features);
  const bool second = p.weight1.present();
  float* const xhat = scratch;
  float* const g = xhat + width;
  float* const dh = g + width;
  struct Affine {
    float* weight;
    float* dweight;
    float* dbias;
  };
  const Affine affine = {dh + width, dh + 2 * width, dh + 3 * width};
  const Affine affine1 = {dh + 4 * width, dh + 5 * width, dh + 6 * width};
  float* const other = dh + 7 * width;  // dy1, then a branch's gradient
  float* const factors = other + width;
  read_row<Arch>(p.weight, 0, affine.weight);
  if (second) {
    read_row<Arch>(p.weight1, 0, affine1.weight);
  }
  // w dy, while dy goes into the sums over rows.
  const auto take = [&](const Affine& of, V dy, V x, std::int64_t n) {
    xsimd::fma(dy, x, V::load_unaligned(of.dweight + n)).store_unaligned(of.dweight + n);
    (V::load_unaligned(of.dbias + n) + dy).store_unaligned(of.dbias + n);
    return V::load_unaligned(of.weight + n) * dy;
  };
  for (std::int64_t m = begin; m < end; ++m) {
    const float mean = p.is_rms_norm ? 0.0f : p.mean.as<const float>()[m];
    const float rstd = p.rstd.as<const float>()[m];
    read_row<Arch>(p.h, m, xhat);
    read_row<Arch>(p.dy, m, g);  // 0 beyond the row, so that nothing there counts
    if (second) {
      read_row<Arch>(p.dy1, m, other);
    }
    if (p.dresidual_out.present()) {
      read_row<Arch>(p.dresidual_out, m, dh);
    }
    Sum<Arch> sum1;
    Sum<Arch> sum2;
    for (std::int64_t n = 0; n < width; n += kStep) {
      const V x = (V::load_unaligned(xhat + n) - V(mean)) * V(rstd);
      V w = take(affine, V::load_unaligned(g + n), x, n);
      if (second) {
        w += take(affine1, V::load_unaligned(other + n), x, n);
      }
      sum1[n] = xsimd::fma(x, w, sum1[n]);
      sum2[n] += w;
      x.store_unaligned(xhat + n);
      w.store_unaligned(g + n);
    }
    const V c1(sum1.total() / static_cast<float>(features));
    const V c2(p.is_rms_norm ? 0.0f : sum2.total() / static_cast<float>(features));
    for (std::int64_t n = 0; n < width; n += kStep) {
      const V inner = V::load_unaligned(g + n) - V::load_unaligned(xhat + n) * c1 - c2;
      const V gradient = inner * V(rstd);
      (p.dresidual_out.present() ? gradient + V::load_unaligned(dh + n) : gradient)
          .store_unaligned(dh + n);
    }
    const auto write_branch = [&](unsigned branch, const TensorView& to) {
      for (std::int64_t n = 0; n < features; ++n) {
        other[n] = dh[n];
      }
      branches.apply(branch, m, other, factors, nullptr);
      write_row<Arch>(to, m, other);
    };
    if (has_branches(p)) {
      write_branch(0, p.dx);
    } else {
      write_row<Arch>(p.dx, m, dh);
    }
    if (p.dx1.present()) {
      write_branch(1, p.dx1);
    }
    if (p.dresidual.present()) {
      write_row<Arch>(p.dresidual, m, dh);
    }
    for (std::int64_t n = features; n < width; ++n) {
      xhat[n] = 0.0f;  // or it would grow with rstd from row to row, and infinity times 0 is NaN
    }
  }
  const float* const sums[] = {affine.dweight, affine.dbias, affine1.dweight, affine1.dbias};
  for (int sum = 0; sum < (second ? 4 : 2); ++sum) {
    for (std::int64_t n = 0; n < features; ++n) {
      workspace[sum * features + n] = sums[sum][n];
    }
  }
}

}  // namespace mamba_native::layer_norm::cpu
