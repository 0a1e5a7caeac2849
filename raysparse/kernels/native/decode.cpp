// y = x W^T + b for a few tokens, as in decoding: the weight comes from memory once, packed, and is expanded in registers.
//
// A weight is stored in one of three ways: as one bit a weight and the live weights in order; as a 16-bit column and a value for each
// live weight; dense. Elements are float, bfloat16, or int8 with a scale for each row. A dead weight takes no part: what it would
// have multiplied may be infinite.
//
// With int8 the activations of a token become integers of 16 bits in two signed bytes, q = 256 high + low. Sums of their products
// are exact, so all builds give the same bits, and a dot product of bytes costs two instructions for 64 weights.
#include "lanes.h"
#include "tokens.h"

// As Python holds it, pointers to its tensors.
template <class V> struct Weight {
  int64_t rows, cols;
  const uint8_t* bits;      // [rows, words() * 8], lowest bit first, zero beyond cols
  const uint16_t* columns;  // of each live weight, ascending in a row; where there are no bits
  const int32_t* starts;    // [rows + 1]: first live weight of each row; null: dense
  const V* values;          // the live weights of all rows and 64 bytes more; dense: [rows, cols] and nothing more
  const float* scale;       // [rows], of int8
  int64_t few;              // int8: no word of 64 bits has more than 32 set
  int64_t words() const { return (cols + 63) / 64; }
  bool dense() const { return !starts; }
};

namespace {

constexpr int PREFETCH = 2048;  // bytes ahead

// ---- rows -------------------------------------------------------------------------------------------------------------------------

template <class V> struct DenseRow {
  static constexpr int WIDTH = Lanes<V>::WIDTH, VECTORS = 64 / WIDTH;
  static constexpr bool EXPANDED = false;
  const V* values;
  int64_t cols;
  INLINE void word(int64_t w, typename Lanes<V>::Vector to[VECTORS]) {
    const V* from = values + 64 * w;
    int64_t left = cols - 64 * w;
    UNROLL for (int i = 0; i < VECTORS; i++, left -= WIDTH) {
      if (left >= WIDTH)
        to[i] = Lanes<V>::load(from + i * WIDTH);
      else
        to[i] = Lanes<V>::load_some(left > 0 ? from + i * WIDTH : values, left > 0 ? left : 0);
    }
  }
};

#if AVX512
template <class V, bool FEW> struct BitsRow {
  static constexpr int WIDTH = Lanes<V>::WIDTH, VECTORS = 64 / WIDTH;
  static constexpr bool EXPANDED = true;
  const uint8_t* bits;
  const V* values;
  __m512i dead;
  INLINE void word(int64_t w, typename Lanes<V>::Vector to[VECTORS]) {
    uint64_t word;
    memcpy(&word, bits + 8 * w, 8);
    __builtin_prefetch((const char*)values + PREFETCH);
    if (sizeof(V) > 1) __builtin_prefetch((const char*)values + PREFETCH + 64);
    UNROLL for (int i = 0; i < VECTORS; i++) {
      uint64_t before = i ? word & ((1ull << (i * WIDTH % 64)) - 1) : 0, mine = word >> (i * WIDTH % 64);
      asm("" : "+r"(mine));  // shifts of mask registers, which a compiler takes otherwise, compete with vpexpand
      const V* from = values + __builtin_popcountll(before);  // counted anew: no vector waits for the one before
      if constexpr (FEW)
        to[i] = Lanes<V>::expand_few(dead, mine, from);
      else
        to[i] = Lanes<V>::expand(dead, mine, from);
    }
    values += __builtin_popcountll(word);
  }
};
#endif

// Rows of a weight times T tokens. x: [PARTS, all tokens, words * 64], from this group's first token on.
//
// SHARED rows go side by side and share the loads of the activations, where many tokens make the arithmetic dear. Otherwise one goes after
// the other, for memory gives one stream at twice the rate of two; only their sums are added up together.
template <class V, int T, int ROWS, bool SHARED, class Row, class Out>
INLINE void dot(Row rows[ROWS], int64_t words, const typename Lanes<V>::Input* x, int64_t part, const Out& out) {
  using L = Lanes<V>;
  constexpr int COUNT = ROWS * T * L::PARTS, ALL = (COUNT + 3) / 4 * 4, SIDE = SHARED ? ROWS : 1;
  constexpr int CHAINS = Row::VECTORS > 1 && T <= 2 ? 2 : 1;  // few sums would wait for their own last addition
  typename L::Sum sums[CHAINS][ALL];                          // [ROWS, T, PARTS]
  UNROLL for (int i = 0; i < CHAINS * ALL; i++) sums[i / ALL][i % ALL] = typename L::Sum{};
  UNROLL for (int first = 0; first < ROWS; first += SIDE) {
    // a row of 768 columns has but twelve words: the loop itself counts
    _Pragma("GCC unroll 4") for (int64_t w = 0; w < words; w++) {
      typename L::Vector weights[SIDE][Row::VECTORS];
      UNROLL for (int r = 0; r < SIDE; r++) rows[first + r].word(w, weights[r]);
      UNROLL for (int i = 0; i < Row::VECTORS; i++)
        UNROLL for (int t = 0; t < T; t++)
          UNROLL for (int p = 0; p < L::PARTS; p++)
            UNROLL for (int r = 0; r < SIDE; r++) {
              typename L::Sum& sum = sums[i % CHAINS][((first + r) * T + t) * L::PARTS + p];
              sum = L::add(sum, weights[r][i], x + p * part + (t * words + w) * 64 + i * L::WIDTH);
            }
    }
  }
  if constexpr (CHAINS > 1)
    UNROLL for (int i = 0; i < ALL; i++) sums[0][i] += sums[CHAINS - 1][i];
  typename L::Total found[ALL];
  UNROLL for (int i = 0; i < ALL; i += 4) totals(sums[0] + i, found + i);
  for (int r = 0; r < ROWS; r++) out(r, found + r * T * L::PARTS);
}

// A number for each token of a group.
template <class S, int T> struct Group {
  typedef S Type __attribute__((vector_size(T * sizeof(S)), aligned(sizeof(S)), may_alias));
  static INLINE S get(const Type& x, int t) { return x[t]; }
};
template <class S> struct Group<S, 1> {
  typedef S Type;
  static INLINE S get(S x, int) { return x; }
};

// Live weight by live weight. x: [cols, T], of this group.
template <class V, int T, class S, class Out>
INLINE void dot_listed(const uint16_t* columns, const V* values, int64_t count, const S* x, int64_t many, const Out& out) {
  using Sums = typename Group<S, T>::Type;
  const Sums* inputs = (const Sums*)x;
  Sums a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    uint64_t four;  // one load for four columns: loads are what bounds this loop
    memcpy(&four, columns + i, 8);
    a += inputs[(uint16_t)four] * (S)to_number(values[i]);
    b += inputs[(uint16_t)(four >> 16)] * (S)to_number(values[i + 1]);
    c += inputs[(uint16_t)(four >> 32)] * (S)to_number(values[i + 2]);
    d += inputs[four >> 48] * (S)to_number(values[i + 3]);
  }
  for (; i < count; i++) a += inputs[columns[i]] * (S)to_number(values[i]);
  asm("" : "+m"(a), "+m"(b));  // a compiler that sees one sum here makes vectors of four scattered activations, at twice the time
  a = (a + b) + (c + d);
  UNROLL for (int t = 0; t < T; t++)
    if (t < many) out(t, Group<S, T>::get(a, t));
}

// Columns of the set bits.
INLINE void list(const uint8_t* bits, int64_t words, uint16_t* columns) {
  for (int64_t w = 0; w < words; w++) {
    uint64_t word;
    memcpy(&word, bits + 8 * w, 8);
    for (; word; word &= word - 1) *columns++ = (uint16_t)(64 * w + __builtin_ctzll(word));
  }
}
template <class V> INLINE const uint16_t* columns_of(const Weight<V>& w, int64_t row) {
  if (!w.bits) return w.columns + w.starts[row];
  uint16_t* columns = (uint16_t*)scratch((size_t)w.cols * 2 + 64, 1);
  list(w.bits + row * w.words() * 8, w.words(), columns);
  return columns;
}

// ---- all rows ---------------------------------------------------------------------------------------------------------------------

INLINE float joined(const float total[1]) { return total[0]; }
INLINE int64_t joined(const int32_t total[2]) { return 256 * (int64_t)total[0] + total[1]; }

// Rows `row` to `end`, as many at a time as fill the registers, T tokens.
template <class V, int T, class Make, class Out>
INLINE void dot_rows(int64_t row, int64_t end, const Make& make, int64_t words, const typename Lanes<V>::Input* x, int64_t part, const Out& out) {
  constexpr int SIDE = T * Lanes<V>::PARTS;
  using Row = decltype(make(row));
  constexpr bool SHARED = Row::EXPANDED && T == 8 && SIDE == 8;
  constexpr int ROWS = SHARED ? 2 : SIDE < 4 ? 4 / SIDE : 1;
  for (; row + ROWS <= end; row += ROWS) {
    Row rows[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) rows[r] = make(row + r);
    dot<V, T, ROWS, SHARED>(rows, words, x, part, [&](int r, const auto* totals) { out(row + r, totals); });
  }
  for (; row < end; row++) {
    Row one[1] = {make(row)};
    dot<V, T, 1, false>(one, words, x, part, [&](int, const auto* totals) { out(row, totals); });
  }
}

// Each row's outputs are one thread's, added up in their order: the same bits for any number of threads.
template <class V, class Out> void multiply(const Weight<V>& w, const typename Lanes<V>::Input* x, int64_t tokens, const Out& out, int threads) {
  int64_t words = w.words(), part = padded(tokens) * words * 64;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = 0; n < w.rows; n += 4)
    groups(tokens, [&](auto size, int64_t first, int64_t many) {
      int64_t end = n + 4 < w.rows ? n + 4 : w.rows;
      const auto* from = x + first * words * 64;
      auto to = [&](int64_t row, const auto* totals) {
        for (int64_t t = 0; t < many; t++) out(first + t, row, joined(totals + t * Lanes<V>::PARTS));
      };
#if AVX512
      auto packed = [&](auto few) {
        return [&](int64_t row) { return BitsRow<V, few>{w.bits + row * words * 8, w.values + w.starts[row], Lanes<V>::dead()}; };
      };
      if constexpr (sizeof(V) == 1)
        if (w.few) return dot_rows<V, size>(n, end, packed(std::true_type()), words, from, part, to);
      if (!w.dense()) return dot_rows<V, size>(n, end, packed(std::false_type()), words, from, part, to);
#endif
      dot_rows<V, size>(n, end, [&](int64_t row) { return DenseRow<V>{w.values + row * w.cols, w.cols}; }, words, from, part, to);
    });
}

template <class V, class S, class Out> void multiply_listed(const Weight<V>& w, const S* x, int64_t tokens, const Out& out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = 0; n < w.rows; n++) {
    const uint16_t* columns = columns_of(w, n);
    groups(tokens, [&](auto size, int64_t first, int64_t many) {
      auto to = [&](int64_t t, auto total) { out(first + t, n, total); };
      dot_listed<V, size>(columns, w.values + w.starts[n], w.starts[n + 1] - w.starts[n], x + first * w.cols, many, to);
    });
  }
}

template <class V> bool listed(const Weight<V>& w) { return !w.dense() && (!w.bits || !AVX512); }

// V and activations are of one type: float or bf16.
template <class V> void decode(const Weight<V>& w, int64_t tokens, const V* x, const V* bias, V* y, int threads) {
  using Input = typename Lanes<V>::Input;
  auto out = [&](int64_t token, int64_t row, float total) { from_float(bias ? total + to_float(bias[row]) : total, y + token * w.rows + row); };
  int64_t stride = w.words() * 64, all = padded(tokens);
  if (listed(w) || (!w.dense() && magnitude(x, tokens * w.cols) >= NOT_FINITE)) {
    float* turned = (float*)scratch((size_t)(all * w.cols) * 4 + 64, 0);
    turn(x, tokens, w.cols, turned);
    return multiply_listed(w, turned, tokens, out, threads);
  }
  Input* inputs = (Input*)scratch((size_t)(all * stride) * sizeof(Input) + 64, 0);
  memset((void*)inputs, 0, (size_t)(all * stride) * sizeof(Input));
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t k = 0; k < w.cols; k++) from_float(to_float(x[t * w.cols + k]), inputs + t * stride + k);
  multiply(w, inputs, tokens, out, threads);
}

void decode_int8(const Weight<uint8_t>& w, int64_t tokens, const float* x, const float* bias, float* y, int threads) {
  using Input = Lanes<uint8_t>::Input;
  int64_t stride = w.words() * 64, all = padded(tokens);
  int32_t* q = (int32_t*)scratch((size_t)(tokens * w.cols) * 4, 0);
  Token* facts = (Token*)scratch((size_t)tokens * sizeof(Token), 2);
  for (int64_t t = 0; t < tokens; t++) facts[t] = quantise(x + t * w.cols, w.cols, q + t * w.cols);
  int64_t surplus = Lanes<uint8_t>::OFFSET && !listed(w) ? 128 : 0;  // of each weight as it is multiplied
  auto out = [&](int64_t token, int64_t row, int64_t total) {
    float sum = (float)((double)(total - surplus * facts[token].sum) * ((double)facts[token].scale * w.scale[row]));
    y[token * w.rows + row] = bias ? sum + bias[row] : sum;
  };
  if (listed(w)) {
    int64_t* turned = (int64_t*)scratch((size_t)(all * w.cols) * 8, 3);
    turn(q, tokens, w.cols, turned);
    return multiply_listed(w, turned, tokens, out, threads);
  }
  Input* inputs = (Input*)scratch((size_t)(2 * all * stride) * sizeof(Input) + 64, 3);
  memset(inputs, 0, (size_t)(2 * all * stride) * sizeof(Input));
  for (int64_t t = 0; t < tokens; t++) split(q + t * w.cols, w.cols, inputs + t * stride, inputs + (all + t) * stride);
  multiply(w, inputs, tokens, out, threads);
}

// Rows first to first + many, dense.
template <class V, class Y> void unpack(const Weight<V>& w, int64_t first, int64_t many, Y* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < many; r++) {
    int64_t row = first + r;
    Y* to = out + r * w.cols;
    const uint16_t* columns = columns_of(w, row);
    memset((void*)to, 0, (size_t)w.cols * sizeof(Y));
    for (int64_t i = w.starts[row]; i < w.starts[row + 1]; i++) {
      float value = to_number(w.values[i]);
      from_float(w.scale ? value * w.scale[row] : value, to + columns[i - w.starts[row]]);
    }
  }
}

}  // namespace

// x: [tokens, cols], y: [tokens, rows]; bias: [rows] or null. cols <= 65,536 but for a dense weight of float or bf16. All is read within its
// bounds; bits, columns and starts must be sound.
API void rs_decode_f32(const Weight<float>* w, const float* bias, int64_t tokens, const float* x, float* y, int threads) {
  decode(*w, tokens, x, bias, y, threads);
}

API void rs_decode_bf16(const Weight<bf16>* w, const bf16* bias, int64_t tokens, const bf16* x, bf16* y, int threads) {
  decode(*w, tokens, x, bias, y, threads);
}

API void rs_decode_u8(const Weight<uint8_t>* w, const float* bias, int64_t tokens, const float* x, float* y, int threads) {
  decode_int8(*w, tokens, x, bias, y, threads);
}

// out: [many, cols]: rows from `first` on of a weight that is not dense.
API void rs_unpack_f32(const Weight<float>* w, int64_t first, int64_t many, float* out, int threads) { unpack(*w, first, many, out, threads); }

API void rs_unpack_bf16(const Weight<bf16>* w, int64_t first, int64_t many, bf16* out, int threads) { unpack(*w, first, many, out, threads); }

API void rs_unpack_u8(const Weight<uint8_t>* w, int64_t first, int64_t many, float* out, int threads) { unpack(*w, first, many, out, threads); }
