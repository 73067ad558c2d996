// Transposing between tensors of any dtype and stride and float tiles. Include only in translation
// units of one instruction set, as simd.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/compiler.h"
#include "core/cpu/simd.h"

namespace mamba_native::cpu {

// Transposes run in squares of at most 8 x 8: what xsimd has shuffles for.
template <class Arch>
using Square = std::conditional_t<(kLanes<Arch> > 8), xsimd::avx2, Arch>;

template <class Arch>
MAMBA_ALWAYS_INLINE void assign(float* to, float value) {
  *to = value;
}
template <class Arch>
MAMBA_ALWAYS_INLINE void assign(Half* to, float value) {
  *to = round_to_f16(value);
}
template <class Arch>
MAMBA_ALWAYS_INLINE void assign(BFloat16* to, float value) {
  *to = round_to_bf16(value);
}

// to[c * to_row + r] = from[r * row + c * column] for `rows` rows and `columns` columns; zero for
// further rows up to a multiple of 16.
template <class Arch, class T>
void load_transposed(const T* from, std::int64_t row, std::int64_t column, std::int64_t rows,
                     std::int64_t columns, float* to, std::int64_t to_row) {
  using Small = Square<Arch>;
  constexpr int kSide = kLanes<Small>;
  const std::int64_t square_rows = column == 1 ? rows / kSide * kSide : 0;
  const std::int64_t square_columns = column == 1 ? columns / kSide * kSide : 0;
  for (std::int64_t r = 0; r < square_rows; r += kSide) {
    for (std::int64_t c = 0; c < square_columns; c += kSide) {
      Vec<Small> lines[kSide];
      for (int i = 0; i < kSide; ++i) {
        lines[i] = load<Small>(from + (r + i) * row + c);
      }
      xsimd::transpose(lines, lines + kSide);
      for (int i = 0; i < kSide; ++i) {
        lines[i].store_unaligned(to + (c + i) * to_row + r);
      }
    }
  }
  for (std::int64_t c = 0; c < columns; ++c) {
    float* const line = to + c * to_row;
    const T* const source = from + c * column;
    std::int64_t r = c < square_columns ? square_rows : 0;
    for (; row == 1 && r + kLanes<Arch> <= rows; r += kLanes<Arch>) {
      load<Arch>(source + r).store_unaligned(line + r);
    }
    for (; r < rows; ++r) {
      line[r] = to_float(source[r * row]);
    }
    for (; r % 16 != 0; ++r) {
      line[r] = 0.0f;
    }
  }
}

// to[r * row + c * column] = from[c * from_row + r], rounded to T.
template <class Arch, class T>
void store_transposed(const float* from, std::int64_t from_row, std::int64_t rows,
                      std::int64_t columns, T* to, std::int64_t row, std::int64_t column) {
  using Small = Square<Arch>;
  constexpr int kSide = kLanes<Small>;
  const std::int64_t square_rows = column == 1 ? rows / kSide * kSide : 0;
  const std::int64_t square_columns = column == 1 ? columns / kSide * kSide : 0;
  for (std::int64_t r = 0; r < square_rows; r += kSide) {
    for (std::int64_t c = 0; c < square_columns; c += kSide) {
      Vec<Small> lines[kSide];
      for (int i = 0; i < kSide; ++i) {
        lines[i] = Vec<Small>::load_unaligned(from + (c + i) * from_row + r);
      }
      xsimd::transpose(lines, lines + kSide);
      for (int i = 0; i < kSide; ++i) {
        store<Small>(to + (r + i) * row + c, lines[i]);
      }
    }
  }
  for (std::int64_t c = 0; c < columns; ++c) {
    const float* const line = from + c * from_row;
    T* const target = to + c * column;
    std::int64_t r = c < square_columns ? square_rows : 0;
    for (; row == 1 && r + kLanes<Arch> <= rows; r += kLanes<Arch>) {
      store<Arch>(target + r, Vec<Arch>::load_unaligned(line + r));
    }
    for (; r < rows; ++r) {
      assign<Arch>(target + r * row, line[r]);
    }
  }
}

}  // namespace mamba_native::cpu
