// Small dense products and powers of two, on rows of floats in scratch memory that start at multiples of a vector.
//
// A product is made of blocks whose sums stay in registers: an element of one factor, broadcast, times one or two vectors of the other.
#pragma once
#include <type_traits>
#include "native.h"

typedef uint32_t words __attribute__((vector_size(LANES * 4)));

// A matrix that is read element by element, and so may be transposed.
struct Elements {
  const float* start;
  int64_t row, col;
};

// A matrix that is read or written vector by vector.
template <class Float> struct Vectors {
  Float* start;
  int64_t row;
};

template <int ROWS, int COLUMNS, bool ADD> INLINE void multiply_block(int64_t depth, Elements a, Vectors<const float> b, Vectors<float> c) {
  floats sums[ROWS][COLUMNS];
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int v = 0; v < COLUMNS; v++) sums[r][v] = ADD ? ((const floats*)(c.start + r * c.row))[v] : floats{};
  for (int64_t k = 0; k < depth; k++, a.start += a.col, b.start += b.row) {
    floats line[COLUMNS];
    UNROLL for (int v = 0; v < COLUMNS; v++) line[v] = ((const floats*)b.start)[v];
    UNROLL for (int r = 0; r < ROWS; r++)
      UNROLL for (int v = 0; v < COLUMNS; v++) sums[r][v] += a.start[r * a.row] * line[v];
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int v = 0; v < COLUMNS; v++) ((floats*)(c.start + r * c.row))[v] = sums[r][v];
}

template <int COLUMNS, bool ADD>
INLINE void multiply_columns(int64_t rows, int64_t depth, Elements a, Vectors<const float> b, Vectors<float> c) {
#if AVX512 || defined(__aarch64__)
  constexpr int MOST = 12;  // of 32 registers
#else
  constexpr int MOST = 6;  // of 16
#endif
  int64_t r = 0;
  auto blocks = [&](auto size) {
    constexpr int ROWS = decltype(size)::value;
    for (; r + ROWS <= rows; r += ROWS)
      multiply_block<ROWS, COLUMNS, ADD>(depth, {a.start + r * a.row, a.row, a.col}, b, {c.start + r * c.row, c.row});
  };
  blocks(std::integral_constant<int, MOST>());
  blocks(std::integral_constant<int, 4>());
  blocks(std::integral_constant<int, 2>());
  blocks(std::integral_constant<int, 1>());
}

// c[rows, columns] = (or +=) a[rows, depth] b[depth, columns]; columns are whole vectors.
template <bool ADD> void multiply(int64_t rows, int64_t columns, int64_t depth, Elements a, Vectors<const float> b, Vectors<float> c) {
  for (; columns >= 2 * LANES; columns -= 2 * LANES, b.start += 2 * LANES, c.start += 2 * LANES)
    multiply_columns<2, ADD>(rows, depth, a, b, c);
  if (columns) multiply_columns<1, ADD>(rows, depth, a, b, c);
}

// 2^x for x < 128, to 2e-7 of its value; 0 below -126, where floats lose their precision, so of -inf; NaN of NaN. With n the integer next
// to x it is 2^n times a polynomial in x - n. Adding 1.5 * 2^23 rounds to n, and leaves n in the lowest bits.
INLINE floats power_of_two(floats x) {
  const float shift = 12582912.0f;
  floats shifted = x + shift, f = x - (shifted - shift);
  floats p = f * 1.5353362e-4f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503325e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  floats scale = (floats)(((words)shifted << 23) + (127u << 23));
  return x < -126.0f ? floats{} : p * scale;
}
