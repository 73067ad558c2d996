// Products of small matrices that stay in cache. Include only in translation units of one
// instruction set, as simd.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/compiler.h"
#include "core/cpu/simd.h"

namespace mamba_native::cpu {

// Which part of an operand is zero, or of the result is not wanted (and gets zero or rubbish):
// above the diagonal is column > row.
enum class Zeros { none, a_above, a_below, b_above, b_below, out_above, out_below };

// out[i][j] = sum over k of a(i,k) b[k][j]; with `accumulate`, keep * out[i][j] is added.
struct Matmul {
  const float* a;  // a(i,k) = a[i * a_row + k * a_column]
  std::int64_t a_row;
  std::int64_t a_column;
  const float* b;
  std::int64_t b_row;
  float* out;
  std::int64_t out_row;
  std::int64_t rows;
  std::int64_t columns;  // b and out can be read and written up to a multiple of kLanes
  std::int64_t depth;
  Zeros zeros = Zeros::none;
  bool accumulate = false;
  float keep = 1.0f;
};

// A tile of the result lives in registers: a's elements are broadcast, b's rows are vectors.
template <class Arch, int ROWS, int VECTORS>
MAMBA_ALWAYS_INLINE void matmul_tile(const Matmul& m, std::int64_t row, std::int64_t column) {
  constexpr int kWidth = kLanes<Arch>;
  std::int64_t begin = 0;
  std::int64_t end = m.depth;
  const std::int64_t end_row = row + ROWS;
  const std::int64_t end_column = column + VECTORS * kWidth;
  switch (m.zeros) {
    case Zeros::none:
      break;
    case Zeros::a_above:
      end = std::min(end, end_row);
      break;
    case Zeros::a_below:
      begin = row;
      break;
    case Zeros::b_above:
      begin = column;
      break;
    case Zeros::b_below:
      end = std::min(end, end_column);
      break;
    case Zeros::out_above:
      end = column < end_row ? end : 0;
      break;
    case Zeros::out_below:
      end = end_column > row ? end : 0;
      break;
  }
  Vec<Arch> sums[ROWS][VECTORS];
  float* const out = m.out + row * m.out_row + column;
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      sums[r][v] = m.accumulate ? Vec<Arch>(m.keep) *
                                      Vec<Arch>::load_unaligned(out + r * m.out_row + v * kWidth)
                                : Vec<Arch>(0.0f);
    }
  }
  const float* a = m.a + row * m.a_row + begin * m.a_column;
  const float* b = m.b + begin * m.b_row + column;
  for (std::int64_t k = begin; k < end; ++k, a += m.a_column, b += m.b_row) {
    Vec<Arch> row_of_b[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      row_of_b[v] = Vec<Arch>::load_unaligned(b + v * kWidth);
    }
    for (int r = 0; r < ROWS; ++r) {
      const Vec<Arch> element(a[r * m.a_row]);
      for (int v = 0; v < VECTORS; ++v) {
        sums[r][v] = xsimd::fma(element, row_of_b[v], sums[r][v]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      sums[r][v].store_unaligned(out + r * m.out_row + v * kWidth);
    }
  }
}

template <class Arch, int ROWS>
MAMBA_ALWAYS_INLINE void matmul_rows(const Matmul& m, std::int64_t row) {
  constexpr int kWidth = kLanes<Arch>;
  std::int64_t column = 0;
  for (; column + kWidth < m.columns; column += 2 * kWidth) {
    matmul_tile<Arch, ROWS, 2>(m, row, column);
  }
  if (column < m.columns) {
    matmul_tile<Arch, ROWS, 1>(m, row, column);
  }
}

// Rows of a tile: with two vectors each, as many as the registers hold.
template <class Arch>
inline constexpr int kMatmulRows = kLanes<Arch> >= 16 ? 12 : 6;

template <class Arch>
void matmul(const Matmul& m) {
  constexpr int kRows = kMatmulRows<Arch>;
  std::int64_t row = 0;
  for (; row + kRows <= m.rows; row += kRows) {
    matmul_rows<Arch, kRows>(m, row);
  }
  for (; row + 4 <= m.rows; row += 4) {
    matmul_rows<Arch, 4>(m, row);
  }
  for (; row < m.rows; ++row) {
    matmul_rows<Arch, 1>(m, row);
  }
}

}  // namespace mamba_native::cpu
