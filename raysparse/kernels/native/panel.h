// Panels: activations turned so that tokens lie along the vector's lanes.
//
// A panel holds 64 tokens or so. Column k of the activations becomes one row of that many numbers, so a non-zero w[n, k] is one broadcast
// and a few multiply-adds with memory operands. Tokens that are not there are zeros. Where entries are padded, every tile's columns are
// followed by a row of zeros, the padding's target.
#pragma once
#include "native.h"

#if AVX512
// 16 x 16 numbers of 32 bits, in registers.
INLINE void transpose_16(__m512i r[16]) {
  __m512i t[16];
  UNROLL for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// from[16 rows][16] -> to[16 rows][16]. The rows are far apart, more of them than the hardware foresees: the next squares are asked for.
INLINE void turn_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512i r[16];
  UNROLL for (int i = 0; i < 16; i++) __builtin_prefetch(from + i * from_stride + 32);
  UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * from_stride);
  transpose_16(r);
  UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * to_stride, r[i]);
}

// The same of 32 x 32 numbers of 16 bits: two halves as pairs of 32 bits, then even and odd columns parted.
INLINE void turn_square(const bf16* from, int64_t from_stride, bf16* to, int64_t to_stride) {
  alignas(64) static constexpr uint16_t EVEN[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                    32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  alignas(64) static constexpr uint16_t ODD[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                   33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  __m512i even = _mm512_load_si512(EVEN), odd = _mm512_load_si512(ODD), upper[16], lower[16];
  UNROLL for (int i = 0; i < 32; i++) __builtin_prefetch(from + i * from_stride + 64);
  UNROLL for (int i = 0; i < 16; i++) upper[i] = _mm512_loadu_si512(from + i * from_stride);
  transpose_16(upper);
  UNROLL for (int i = 0; i < 16; i++) lower[i] = _mm512_loadu_si512(from + (16 + i) * from_stride);
  transpose_16(lower);
  UNROLL for (int i = 0; i < 16; i++) {
    _mm512_storeu_si512(to + 2 * i * to_stride, _mm512_permutex2var_epi16(upper[i], even, lower[i]));
    _mm512_storeu_si512(to + (2 * i + 1) * to_stride, _mm512_permutex2var_epi16(upper[i], odd, lower[i]));
  }
}
constexpr int SQUARE_FLOAT = 16, SQUARE_BF16 = 32;
#else
INLINE void turn_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  float block[8][8];
  for (int i = 0; i < 8; i++) memcpy(block[i], from + i * from_stride, 32);
  for (int j = 0; j < 8; j++)
    UNROLL for (int i = 0; i < 8; i++) to[j * to_stride + i] = block[i][j];
}
constexpr int SQUARE_FLOAT = 8, SQUARE_BF16 = 8;
#endif

template <class From, class To> INLINE To converted(From x) {
  To y;
  from_float(to_float(x), &y);
  return y;
}

// from[rows, cols] -> to[cols, rows], of any types; both strides in elements.
template <class From, class To> static void turn(const From* from, int64_t from_stride, int64_t rows, int64_t cols, To* to, int64_t to_stride) {
  constexpr int side = sizeof(From) == 2 ? SQUARE_BF16 : SQUARE_FLOAT;
  constexpr bool has_square = sizeof(From) == sizeof(To) && (AVX512 || sizeof(From) == 4);
  int64_t whole_rows = has_square ? rows / side * side : 0, whole_cols = has_square ? cols / side * side : 0;
  if constexpr (has_square)
    for (int64_t r = 0; r < whole_rows; r += side)
      for (int64_t c = 0; c < whole_cols; c += side) turn_square(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  for (int64_t c = 0; c < cols; c++)
    for (int64_t r = c < whole_cols ? whole_rows : 0; r < rows; r++) to[c * to_stride + r] = converted<From, To>(from[r * from_stride + c]);
}

// x[tokens <= TOKENS, cols] (row stride = stride) -> a panel; a tile of it begins every tile_cols (+ 1) rows.
template <int TOKENS, class From, class To>
static void fill_panel(const From* x, int64_t stride, int64_t tokens, int64_t cols, int64_t tile_cols, bool padded, To* panel) {
  for (int64_t first = 0; first < cols; first += tile_cols) {
    int64_t here = cols - first < tile_cols ? cols - first : tile_cols;
    turn(x + first, stride, tokens, here, panel, TOKENS);
    if (tokens < TOKENS)
      for (int64_t c = 0; c < here; c++) memset((void*)(panel + c * TOKENS + tokens), 0, (size_t)(TOKENS - tokens) * sizeof(To));
    if (padded) memset((void*)(panel + here * TOKENS), 0, TOKENS * sizeof(To));
    panel += (tile_cols + padded) * TOKENS;
  }
}
