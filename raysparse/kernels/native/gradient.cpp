// dW = dY^T X at the live weights only; the dense gradient is never formed.
#include "panel.h"
#include "stream.h"

namespace {

#if AVX512
typedef __m512 Sums;
INLINE Sums zero() { return _mm512_setzero_ps(); }
// to[i] += the sum of s[i] over its lanes, for the first `count` of four vectors.
INLINE void add_totals(float* to, const Sums s[4], int count) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
  __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
  __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  __m128 total = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  __mmask8 these = (__mmask8)((1 << count) - 1);
  _mm_mask_storeu_ps(to, these, _mm_add_ps(_mm_maskz_loadu_ps(these, to), total));
}
#else
typedef floats Sums;
INLINE Sums zero() { return floats{}; }
typedef float four __attribute__((vector_size(16)));
INLINE four fold(floats x) {
#if defined(__AVX2__)
  return (four)_mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  return x;
#endif
}
INLINE void add_totals(float* to, const Sums s[4], int count) {
  four a = fold(s[0]), b = fold(s[1]), c = fold(s[2]), d = fold(s[3]), old = {};
  four ab = four{a[0], b[0], a[1], b[1]} + four{a[2], b[2], a[3], b[3]}, cd = four{c[0], d[0], c[1], d[1]} + four{c[2], d[2], c[3], d[3]};
  four total = four{ab[0], ab[1], cd[0], cd[1]} + four{ab[2], ab[3], cd[2], cd[3]};
  memcpy(&old, to, (size_t)count * 4);
  old += total;
  memcpy(to, &old, (size_t)count * 4);
}
#endif

// A row of a panel against another: products of the same tokens, not yet summed over lanes.
struct FloatDot {
  using Panel = float;
  using Vector = floats;
  static constexpr int PER_VECTOR = LANES;
  static INLINE Vector load(const float* x) { return *(const floats*)x; }
  static INLINE Sums add(Sums s, Vector a, Vector b) { return (Sums)((floats)s + a * b); }
};
#if AVX512
struct PairDot {  // pairs of tokens: nothing to shuffle
  using Panel = bf16;
  using Vector = __m512i;
  static constexpr int PER_VECTOR = 32;
  static INLINE Vector load(const bf16* x) { return _mm512_load_si512(x); }
  static INLINE Sums add(Sums s, Vector a, Vector b) { return _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b); }
};
#endif

// COLUMNS columns with GRAIN rows, at most four products together: their sums over lanes cost little more than one.
template <class Dot, int GRAIN, int VECTORS, int COLUMNS>
INLINE void add_columns(const typename Dot::Vector (&dy)[GRAIN][VECTORS], const typename Dot::Panel* x, int tokens, const uint16_t* columns, float* totals) {
  Sums sums[4] = {zero(), zero(), zero(), zero()};
  UNROLL for (int c = 0; c < COLUMNS; c++) {
    const typename Dot::Panel* from = x + (int64_t)columns[c] * tokens;
    UNROLL for (int r = 0; r < GRAIN; r++) {
      Sums even = zero(), odd = zero();  // two chains, for the multiply-add's latency
      UNROLL for (int t = 0; t < VECTORS; t++) {
        Sums& sum = t % 2 ? odd : even;
        sum = Dot::add(sum, dy[r][t], Dot::load(from + t * Dot::PER_VECTOR));
      }
      sums[c * GRAIN + r] = even + odd;
    }
  }
  add_totals(totals, sums, COLUMNS * GRAIN);
}

// totals[entry, r] += sum over tokens of dy[row r] x[column], for the units of one tile and the tokens of one panel.
template <class Dot, int GRAIN, int TOKENS>
void add_tile(const Stream& s, int64_t row_block, int64_t col_block, const typename Dot::Panel* x, const typename Dot::Panel* dy, float* totals) {
  constexpr int ALL = TOKENS / Dot::PER_VECTOR, MOST = (AVX512 && GRAIN > 1 ? 16 : 8) / GRAIN, VECTORS = ALL < MOST ? ALL : MOST;
  constexpr int COLUMNS = 4 / GRAIN;
  static_assert(ALL % VECTORS == 0);
  const uint16_t *units = s.units.data() + s.first_unit(row_block, col_block), *counts = s.counts.data() + s.first_unit(row_block, col_block);
  const uint16_t* columns = s.columns.data() + s.first_entry(row_block, col_block);
  int64_t num_units = s.units_of(row_block);
  for (int64_t u = 0; u < num_units; u++) {
    int count = counts[u];
    const typename Dot::Panel* rows = dy + (int64_t)units[u] * GRAIN * TOKENS;
    for (int part = 0; part < ALL && count; part += VECTORS) {
      typename Dot::Vector d[GRAIN][VECTORS];
      UNROLL for (int r = 0; r < GRAIN; r++)
        UNROLL for (int t = 0; t < VECTORS; t++) d[r][t] = Dot::load(rows + r * TOKENS + (part + t) * Dot::PER_VECTOR);
      const typename Dot::Panel* from = x + part * Dot::PER_VECTOR;
      int e = 0;
      for (; e + COLUMNS <= count; e += COLUMNS) add_columns<Dot, GRAIN, VECTORS, COLUMNS>(d, from, TOKENS, columns + e, totals + e * GRAIN);
      if constexpr (COLUMNS > 2)
        if (count - e == 3) add_columns<Dot, GRAIN, VECTORS, 3>(d, from, TOKENS, columns + e, totals + e * GRAIN);
      if constexpr (COLUMNS > 2)
        if (count - e == 2) add_columns<Dot, GRAIN, VECTORS, 2>(d, from, TOKENS, columns + e, totals + e * GRAIN);
      if constexpr (COLUMNS > 1)
        if (count - e == 1) add_columns<Dot, GRAIN, VECTORS, 1>(d, from, TOKENS, columns + e, totals + e * GRAIN);
    }
    columns += count;
    totals += (int64_t)count * GRAIN;
  }
}

// The totals in the gradient's type, in place: element i of the result lies at or before float i.
INLINE const float* rounded(float* totals, int64_t, float*) { return totals; }
INLINE const bf16* rounded(float* totals, int64_t count, bf16*) {
  bf16* to = (bf16*)totals;
  int64_t i = 0;
#if AVX512
  for (; i + 16 <= count; i += 16) _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(totals + i)));
#endif
  for (; i < count; i++) {
    float total;
    memcpy(&total, totals + i, 4);
    from_float(total, to + i);
  }
  return to;
}

// A tile's totals at their places.
template <int GRAIN, class W> void write_tile(const Stream& s, int64_t r, int64_t c, float* sums, W* gradient) {
  W* corner = gradient + s.corner(r, c);
  const W* totals = rounded(sums, (s.first_entry(r, c + 1) - s.first_entry(r, c)) * GRAIN, gradient);
  const uint16_t *units = s.units.data() + s.first_unit(r, c), *counts = s.counts.data() + s.first_unit(r, c);
  const uint16_t* columns = s.columns.data() + s.first_entry(r, c);
  for (int64_t u = 0; u < s.units_of(r); u++) {
    W* row = corner + (int64_t)units[u] * GRAIN * s.row_step;
    for (int e = 0; e < counts[u]; e++)
      UNROLL for (int g = 0; g < GRAIN; g++) row[columns[e] + g * s.row_step] = totals[e * GRAIN + g];
    columns += counts[u], totals += (int64_t)counts[u] * GRAIN;
  }
}

// Tiles begin..end of a row block: zeros, for the totals to be written among. Whole rows are one piece of memory.
template <class W> void clear(const Stream& s, int64_t r, int64_t begin, int64_t end, W* gradient) {
  int64_t width = (end == s.col_blocks() ? s.cols : end * s.tile_cols) - begin * s.tile_cols, rows = s.rows_of(r);
  bool whole = width == s.cols;
  W* corner = gradient + s.corner(r, begin);
  for (int64_t i = 0; i < (whole ? 1 : rows); i++) memset((void*)(corner + i * s.row_step), 0, (size_t)(whole ? rows * width : width) * sizeof(W));
}

template <class Dot, int GRAIN, int TOKENS, class X>
void gradient(const Stream& s, const X* x, const X* dy, int64_t tokens, X* out, int threads) {
  using Panel = typename Dot::Panel;
  Panel* xs = (Panel*)scratch((size_t)(s.panel_rows() * TOKENS) * sizeof(Panel), 0);
  float* totals = (float*)scratch((size_t)(s.entries() * GRAIN) * 4, 2);
  int64_t row_blocks = s.row_blocks(), col_blocks = s.col_blocks();
  int64_t parts = threads == 1 ? 1 : (2 * threads + row_blocks - 1) / row_blocks;  // of a row block's tiles, so that all threads have work
  if (parts > col_blocks) parts = col_blocks;
#pragma omp parallel num_threads(threads)
  {
    Panel* dys = (Panel*)scratch((size_t)(s.tile_rows * TOKENS) * sizeof(Panel), 1);
    for (int64_t first = 0; first < tokens; first += TOKENS) {
      int64_t here = tokens - first < TOKENS ? tokens - first : TOKENS;
#pragma omp for schedule(dynamic, 1)
      for (int64_t c = 0; c < col_blocks; c++)
        fill_panel<TOKENS>(x + first * s.cols + c * s.tile_cols, s.cols, here, s.cols_of(c), s.tile_cols, false, xs + c * s.panel_stride() * TOKENS);
      // a tile's totals are one thread's at a time, and panels follow each other: the same bits for any number of threads
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < row_blocks * parts; item++) {
        int64_t r = item / parts, part = item % parts, begin = part * col_blocks / parts, end = (part + 1) * col_blocks / parts;
        bool last = first + TOKENS >= tokens;
        fill_panel<TOKENS>(dy + first * s.rows + r * s.tile_rows, s.rows, here, s.rows_of(r), s.tile_rows, false, dys);
        if (last) clear(s, r, begin, end, out);
        for (int64_t c = begin; c < end; c++) {
          float* sums = totals + s.first_entry(r, c) * GRAIN;
          if (!first) memset(sums, 0, (size_t)((s.first_entry(r, c + 1) - s.first_entry(r, c)) * GRAIN) * 4);
          add_tile<Dot, GRAIN, TOKENS>(s, r, c, xs + c * s.panel_stride() * TOKENS, dys, sums);
          if (last) write_tile<GRAIN>(s, r, c, sums, out);
        }
      }
    }
  }
}

// The more tokens a panel has, the fewer sums over lanes; but what it lacks to a whole panel is computed for nothing.
template <class Dot, int TOKENS, class X> void gradient_of(const Stream& s, const X* x, const X* dy, int64_t tokens, X* out, int threads) {
  if (tokens == 0) {
    for (int64_t r = 0; r < s.row_blocks(); r++) clear(s, r, 0, s.col_blocks(), out);
    return;
  }
  if constexpr (TOKENS > 32)
    if ((tokens + TOKENS - 1) / TOKENS * TOKENS > tokens + tokens / 8) return gradient_of<Dot, TOKENS / 2>(s, x, dy, tokens, out, threads);
  if (s.grain == 4) return gradient<Dot, 4, TOKENS>(s, x, dy, tokens, out, threads);
  if (s.grain == 2) return gradient<Dot, 2, TOKENS>(s, x, dy, tokens, out, threads);
  gradient<Dot, 1, TOKENS>(s, x, dy, tokens, out, threads);
}

}  // namespace

// x: [tokens, cols], dy: [tokens, rows], out: [rows, cols], written whole: zero at dead weights.
API void rs_gradient_f32(const Stream* s, const float* x, const float* dy, int64_t tokens, float* out, int threads) {
  if (s->tile_cols > 64) return gradient_of<FloatDot, 64>(*s, x, dy, tokens, out, threads);
  gradient_of<FloatDot, 128>(*s, x, dy, tokens, out, threads);
}

API void rs_gradient_bf16(const Stream* s, const bf16* x, const bf16* dy, int64_t tokens, bf16* out, int threads) {
#if AVX512
  gradient_of<PairDot, 256>(*s, x, dy, tokens, out, threads);
#else
  gradient_of<FloatDot, 128>(*s, x, dy, tokens, out, threads);
#endif
}
