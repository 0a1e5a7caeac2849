// y[tokens, rows] = x[tokens, cols] S^T + bias, S sparse: the forward pass of a linear layer, and with S = W^T its input gradient.
#include "panel.h"
#include "stream.h"

namespace {

constexpr int TOKENS = LANES == 4 ? 32 : 64;

// The memory of a tile of the weight, asked for line by line: its rows lie apart, and one by one each would be waited for.
template <class Weight> struct Lines {
  const Weight* corner = nullptr;
  int64_t rows = 0, length = 0, stride = 0, row = 0, at = 0;

  Lines(const Stream& s, int64_t r, int64_t c, const Weight* weight) : corner(weight + s.corner(r, c)), stride(s.row_step * s.col_step) {
    bool turned = s.col_step > 1;
    rows = turned ? s.cols_of(c) : s.rows_of(r), length = turned ? s.rows_of(r) : s.cols_of(c);
  }
  INLINE void ask(int64_t count) {
    for (; count > 0 && row < rows; count--) {
      __builtin_prefetch(corner + row * stride + at);
      if ((at += 64 / (int64_t)sizeof(Weight)) >= length) row++, at = 0;
    }
  }
};

// What the inner loops multiply by: every entry's values, in order, from the dense weight. Meanwhile the next tile is asked for.
template <int GRAIN, class Weight, class Value> void load_tile(const Stream& s, int64_t r, int64_t c, const Weight* weight, Value* values, Lines<Weight> next) {
  const Weight* corner = weight + s.corner(r, c);
  const uint16_t *units = s.units.data() + s.first_unit(r, c), *counts = s.counts.data() + s.first_unit(r, c);
  const uint16_t* columns = s.columns.data() + s.first_entry(r, c);
  int64_t share = next.rows * (next.length * (int64_t)sizeof(Weight) / 64 + 1) / s.units_of(r) + 1;
  for (int64_t u = 0; u < s.units_of(r); u++) {
    next.ask(share);
    const Weight* row = corner + (int64_t)units[u] * GRAIN * s.row_step;
    int whole = counts[u];
    bool padded = whole && columns[whole - 1] == s.cols_of(c);
    for (int e = 0; e < whole - padded; e++)
      UNROLL for (int g = 0; g < GRAIN; g++) values[e * GRAIN + g] = converted<Weight, Value>(row[columns[e] * s.col_step + g * s.row_step]);
    if (padded)
      UNROLL for (int g = 0; g < GRAIN; g++) values[(whole - 1) * GRAIN + g] = Value{};
    columns += whole, values += whole * GRAIN;
  }
}

template <class Weight, class Value> void load(Stream& s, const Weight* weight, int threads) {
  Value* values = (Value*)s.values.data();
  int64_t tiles = s.row_blocks() * s.col_blocks();
  bool turned = s.col_step > 1;
  auto row_of = [&](int64_t tile) { return turned ? tile % s.row_blocks() : tile / s.col_blocks(); };  // in the order of the memory
  auto col_of = [&](int64_t tile) { return turned ? tile / s.row_blocks() : tile % s.col_blocks(); };
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = 0; tile < tiles; tile++) {
    int64_t r = row_of(tile), c = col_of(tile), after = tile + 1 < tiles ? tile + 1 : tile;
    Lines<Weight> next(s, row_of(after), col_of(after), weight);
    Value* first = values + s.first_entry(r, c) * s.grain;
    if (s.grain == 4)
      load_tile<4>(s, r, c, weight, first, next);
    else if (s.grain == 2)
      load_tile<2>(s, r, c, weight, first, next);
    else
      load_tile<1>(s, r, c, weight, first, next);
  }
}

// One unit of GRAIN rows in one tile, VECTORS vectors of tokens at a time: sums[r] += sum over entries of value[r] x[column].
template <int GRAIN, int VECTORS>
INLINE void add_unit(const float* x, const uint16_t* columns, const float* values, int count, float* sums, int64_t row_stride, bool first, const float* bias) {
  for (int t0 = 0; t0 < TOKENS; t0 += VECTORS * LANES) {
    floats acc[GRAIN][VECTORS];
    UNROLL for (int r = 0; r < GRAIN; r++)
      UNROLL for (int t = 0; t < VECTORS; t++)
        acc[r][t] = first ? (floats{} + (bias ? bias[r] : 0.0f)) : *(const floats*)(sums + r * row_stride + t0 + t * LANES);
    for (int e = 0; e < count; e++) {
      const float* from = x + (int64_t)columns[e] * TOKENS + t0;
      floats in[VECTORS];
      UNROLL for (int t = 0; t < VECTORS; t++) in[t] = *(const floats*)(from + t * LANES);
      UNROLL for (int r = 0; r < GRAIN; r++)
        UNROLL for (int t = 0; t < VECTORS; t++) acc[r][t] += values[e * GRAIN + r] * in[t];
    }
    UNROLL for (int r = 0; r < GRAIN; r++)
      UNROLL for (int t = 0; t < VECTORS; t++) *(floats*)(sums + r * row_stride + t0 + t * LANES) = acc[r][t];
  }
}

template <int GRAIN> struct Floats {
  using Panel = float;
  using Value = float;
  static constexpr int VECTORS = AVX512 ? 4 : 8 / GRAIN;
  static INLINE void add(const float* x, const uint16_t* columns, const float* values, int count, float* sums, bool first, bool, const float* bias) {
    add_unit<GRAIN, VECTORS>(x, columns, values, count, sums, TOKENS, first, bias);
  }
};

#if AVX512
// bfloat16: one instruction multiplies pairs and adds them in float32. The columns of a pair need not be neighbours: their tokens are
// interleaved on the way to the registers, and the two shuffles are hidden behind the multiply-adds. Sums of 32 tokens lie in two
// vectors in the order the shuffles leave them; the last tile puts them right while it rounds them to bfloat16, in place.
template <int GRAIN> struct Pairs {
  using Panel = bf16;
  using Value = bf16;
  static constexpr int VECTORS = TOKENS / 32;

  static INLINE void pair(const bf16* x, const uint16_t* columns, const bf16* values, __m512 acc[GRAIN][2 * VECTORS]) {
    const bf16 *a = x + (int64_t)columns[0] * TOKENS, *b = x + (int64_t)columns[1] * TOKENS;
    UNROLL for (int t = 0; t < VECTORS; t++) {
      __m512i p = _mm512_load_si512(a + 32 * t), q = _mm512_load_si512(b + 32 * t);
      __m512bh low = (__m512bh)_mm512_unpacklo_epi16(p, q), high = (__m512bh)_mm512_unpackhi_epi16(p, q);
      UNROLL for (int r = 0; r < GRAIN; r++) {
        uint32_t both = values[r].bits | (uint32_t)values[GRAIN + r].bits << 16;
        if constexpr (GRAIN == 1) memcpy(&both, values, 4);
        __m512bh weight = (__m512bh)_mm512_set1_epi32((int)both);
        acc[r][2 * t] = _mm512_dpbf16_ps(acc[r][2 * t], low, weight);
        acc[r][2 * t + 1] = _mm512_dpbf16_ps(acc[r][2 * t + 1], high, weight);
      }
    }
  }

  static INLINE void add(const bf16* x, const uint16_t* columns, const bf16* values, int count, float* sums, bool first, bool last, const float* bias) {
    __m512 acc[GRAIN][2 * VECTORS];
    UNROLL for (int r = 0; r < GRAIN; r++)
      UNROLL for (int t = 0; t < 2 * VECTORS; t++)
        acc[r][t] = first ? _mm512_set1_ps(bias ? bias[r] : 0.0f) : _mm512_load_ps(sums + r * TOKENS + 16 * t);
    if constexpr (GRAIN == 1) {  // two chains of sums: the instruction takes 6 cycles
      __m512 other[1][2 * VECTORS];
      UNROLL for (int t = 0; t < 2 * VECTORS; t++) other[0][t] = _mm512_setzero_ps();
      for (; count >= 4; count -= 4, columns += 4, values += 4) {
        pair(x, columns, values, acc);
        pair(x, columns + 2, values + 2, other);
      }
      if (count) pair(x, columns, values, acc);
      UNROLL for (int t = 0; t < 2 * VECTORS; t++) acc[0][t] = _mm512_add_ps(acc[0][t], other[0][t]);
    } else {
      for (; count; count -= 2, columns += 2, values += 2 * GRAIN) pair(x, columns, values, acc);
    }
    const __m512i in_order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    UNROLL for (int r = 0; r < GRAIN; r++) {
      UNROLL for (int t = 0; t < 2 * VECTORS && !last; t++) _mm512_store_ps(sums + r * TOKENS + 16 * t, acc[r][t]);
      UNROLL for (int t = 0; t < VECTORS && last; t++) {
        __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(acc[r][2 * t + 1], acc[r][2 * t]);
        _mm512_store_si512((bf16*)(sums + r * TOKENS) + 32 * t, _mm512_permutexvar_epi64(in_order, rounded));
      }
    }
  }
};
#endif

// One row block of the product, for one panel of tokens.
template <class Inner, int GRAIN, class Y>
void multiply_block(const Stream& s, int64_t row_block, const typename Inner::Panel* panel, const typename Inner::Value* values, const float* bias, int64_t tokens, Y* y) {
  float* sums = (float*)scratch((size_t)(s.tile_rows * TOKENS) * 4, 2);
  int64_t num_units = s.units_of(row_block), first_row = row_block * s.tile_rows, col_blocks = s.col_blocks();
  for (int64_t c = 0; c < col_blocks; c++) {
    const uint16_t *units = s.units.data() + s.first_unit(row_block, c), *counts = s.counts.data() + s.first_unit(row_block, c);
    int64_t entry = s.first_entry(row_block, c);
    const uint16_t* columns = s.columns.data() + entry;
    const typename Inner::Value* here = values + entry * GRAIN;
    const typename Inner::Panel* x = panel + c * s.panel_stride() * TOKENS;
    for (int64_t u = 0; u < num_units; u++) {
      int64_t row = units[u] * GRAIN;
      Inner::add(x, columns, here, counts[u], sums + row * TOKENS, c == 0, c == col_blocks - 1, bias ? bias + first_row + row : nullptr);
      columns += counts[u];
      here += (int64_t)counts[u] * GRAIN;
    }
  }
  // pairs leave rounded numbers in the first half of each row of sums
  if constexpr (sizeof(typename Inner::Panel) == 2)
    turn((const bf16*)sums, 2 * TOKENS, s.rows_of(row_block), tokens, y + first_row, s.rows);
  else
    turn(sums, TOKENS, s.rows_of(row_block), tokens, y + first_row, s.rows);
}

template <class Inner, int GRAIN, class X> void multiply(const Stream& s, const X* x, int64_t tokens, const float* bias, X* y, int threads) {
  using Panel = typename Inner::Panel;
  auto* values = (const typename Inner::Value*)s.values.data();
  int64_t size = s.panel_rows() * TOKENS, num_panels = (tokens + TOKENS - 1) / TOKENS;
  auto fill = [&](int64_t p, Panel* panel) {
    int64_t first = p * TOKENS, here = tokens - first < TOKENS ? tokens - first : TOKENS;
    fill_panel<TOKENS>(x + first * s.cols, s.cols, here, s.cols, s.tile_cols, s.paired, panel);
  };
  auto block = [&](int64_t row_block, int64_t p, const Panel* panel) {
    int64_t first = p * TOKENS, here = tokens - first < TOKENS ? tokens - first : TOKENS;
    multiply_block<Inner, GRAIN>(s, row_block, panel, values, bias, here, y + first * s.rows);
  };
  if (threads == 1 || num_panels >= 4 * threads) {  // a panel is used while it lies in its thread's second-level cache
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t p = 0; p < num_panels; p++) {
      Panel* panel = (Panel*)scratch((size_t)size * sizeof(Panel), 0);
      fill(p, panel);
      for (int64_t r = 0; r < s.row_blocks(); r++) block(r, p, panel);
    }
  } else {  // few tokens: the row blocks are shared out too
    Panel* panels = (Panel*)scratch((size_t)(num_panels * size) * sizeof(Panel), 1);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < num_panels; p++) fill(p, panels + p * size);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t item = 0; item < num_panels * s.row_blocks(); item++)
      block(item % s.row_blocks(), item / s.row_blocks(), panels + item / s.row_blocks() * size);
  }
}

}  // namespace

#if AVX512
template <int GRAIN> using Halves = Pairs<GRAIN>;
#else
template <int GRAIN> using Halves = Floats<GRAIN>;
#endif

// Take over the values of the dense weight that the stream was made of; dead weights are not read.
API void rs_load_f32(Stream* s, const float* weight, int threads) { load<float, float>(*s, weight, threads); }
API void rs_load_bf16(Stream* s, const bf16* weight, int threads) { load<bf16, Halves<1>::Value>(*s, weight, threads); }

// x: [tokens, cols]; bias: [rows] float32 or null; y: [tokens, rows], written. cols > 0, and the weight is loaded.
API void rs_multiply_f32(const Stream* s, const float* x, int64_t tokens, const float* bias, float* y, int threads) {
  if (s->grain == 4) return multiply<Floats<4>, 4>(*s, x, tokens, bias, y, threads);
  if (s->grain == 2) return multiply<Floats<2>, 2>(*s, x, tokens, bias, y, threads);
  multiply<Floats<1>, 1>(*s, x, tokens, bias, y, threads);
}
API void rs_multiply_bf16(const Stream* s, const bf16* x, int64_t tokens, const float* bias, bf16* y, int threads) {
  if (s->grain == 4) return multiply<Halves<4>, 4>(*s, x, tokens, bias, y, threads);
  if (s->grain == 2) return multiply<Halves<2>, 2>(*s, x, tokens, bias, y, threads);
  multiply<Halves<1>, 1>(*s, x, tokens, bias, y, threads);
}
