// A step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) in one pass over a parameter:
//
//     m = beta1 m + (1 - beta1) g
//     v = beta2 v + (1 - beta2) g g
//     p = (1 - lr decay) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
//
// of all its weights, of those that live by a mask of one bit each, or of those with moments for them alone. Memory is what it waits
// for: a mask in the same pass is nearly free, and moments that are not there are not moved.
#include "native.h"

struct Rates {
  float keep;           // 1 - lr decay
  float beta1, rest1;   // rest: 1 - beta
  float beta2, rest2;
  float root_scale;     // 1 / sqrt(1 - beta2^t)
  float eps;
  float step;           // lr / (1 - beta1^t)
};

namespace {

constexpr int BLOCK = 1024;  // weights that are masked or gathered at a time

typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(LANES * 4)));

INLINE floats load(const float* x) {
  floats y;
  memcpy(&y, x, sizeof y);
  return y;
}
INLINE void store(float* x, floats y) { memcpy(x, &y, sizeof y); }

INLINE floats root(floats x) {
#if AVX512
  return _mm512_sqrt_ps(x);
#else
  UNROLL for (int l = 0; l < LANES; l++) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}

// a b + c, in one operation where there is such a one. That is said here and not left to the compiler, which may see it in one copy of
// an expression and not in another: a number must depend neither on its place in a tensor nor on which of the steps it is in.
INLINE floats multiply_add(floats a, floats b, floats c) {
#if AVX512
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FP_FAST_FMAF)
  UNROLL for (int l = 0; l < LANES; l++) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return c;
#else
  return a * b + c;
#endif
}

INLINE floats all(float x) { return x - floats{}; }

// x where the bits are set, else 0.
INLINE floats live(floats x, uint64_t bits) {
#if AVX512
  return _mm512_maskz_mov_ps((__mmask16)bits, x);
#else
  ints bit;
  UNROLL for (int l = 0; l < LANES; l++) bit[l] = 1 << l;
  return (floats)((ints)x & (((int32_t)bits & bit) != 0));
#endif
}

template <bool MASKED>
INLINE void advance_vector(float* p, const float* g, float* m, float* v, uint64_t bits, const Rates& r) {
  floats gradient = MASKED ? live(load(g), bits) : load(g);
  floats first = multiply_add(all(r.beta1), load(m), r.rest1 * gradient);
  floats second = multiply_add(all(r.beta2), load(v), r.rest2 * (gradient * gradient));
  floats size = multiply_add(root(second), all(r.root_scale), all(r.eps));
  floats weight = multiply_add(all(-r.step), first / size, r.keep * load(p));
  store(m, first);
  store(v, second);
  store(p, MASKED ? live(weight, bits) : weight);
}

// Bits of the elements i, ..., i + n - 1, n <= LANES, where i is a multiple of LANES; further bits may be set too.
INLINE uint64_t bits_of(const uint8_t* bits, int64_t i, int64_t n) {
  uint64_t found = (uint64_t)(bits[i / 8] >> i % 8);
  return n > 8 ? found | (uint64_t)bits[i / 8 + 1] << 8 : found;
}

template <bool MASKED>
void advance(float* p, const float* g, float* m, float* v, const uint8_t* bits, int64_t n, const Rates& rates) {
  const Rates r = rates;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) advance_vector<MASKED>(p + i, g + i, m + i, v + i, MASKED ? bits_of(bits, i, LANES) : 0, r);
  if (i == n) return;
  size_t bytes = (size_t)(n - i) * sizeof *p;
  float rest[4][LANES] = {};  // a whole vector too, so that the last weights are computed as the others are
  memcpy(rest[0], p + i, bytes);
  memcpy(rest[1], g + i, bytes);
  memcpy(rest[2], m + i, bytes);
  memcpy(rest[3], v + i, bytes);
  advance_vector<MASKED>(rest[0], rest[1], rest[2], rest[3], MASKED ? bits_of(bits, i, n - i) : 0, r);
  memcpy(p + i, rest[0], bytes);
  memcpy(m + i, rest[2], bytes);
  memcpy(v + i, rest[3], bytes);
}

// At most BLOCK consecutive weights of a row, from a byte of the mask on.
struct Block {
  int64_t start;
  int size;
  const uint8_t* bits;

  // Of the elements i, ..., i + 63, as far as there are so many; i is a multiple of 64 and less than size.
  uint64_t word(int i) const {
    uint64_t found = 0;
    if (size - i >= 64) {
      memcpy(&found, bits + i / 8, 8);
      return found;
    }
    memcpy(&found, bits + i / 8, (size_t)(size - i + 7) / 8);
    return found & ~0ull >> (64 - (size - i));
  }
  int num_live() const {
    int n = 0;
    for (int i = 0; i < size; i += 64) n += __builtin_popcountll(word(i));
    return n;
  }
};

// All weights in blocks; bits: [rows, ceil(cols / 8)].
struct Blocks {
  const uint8_t* bits;
  int64_t rows, cols, in_a_row;

  Blocks(const uint8_t* bits, int64_t rows, int64_t cols) : bits(bits), rows(rows), cols(cols) {
    if (cols % 8 == 0) this->cols *= rows, this->rows = 1;  // rows follow each other without a gap
    in_a_row = (this->cols + BLOCK - 1) / BLOCK;
  }
  int64_t count() const { return rows * in_a_row; }
  int64_t start_of(int part, int parts) const { return count() / parts * part + count() % parts * part / parts; }
  Block operator[](int64_t number) const {
    int64_t row = number / in_a_row, col = number % in_a_row * BLOCK, left = cols - col;
    return {row * cols + col, left < BLOCK ? (int)left : BLOCK, bits + row * ((cols + 7) / 8) + col / 8};
  }
};

// The live weights of a block and their gradients, one after the other, with room for LANES more. Returns how many.
int gather(const Block& block, const float* p, const float* g, float* weights, float* gradients) {
  int n = 0;
  for (int start = 0; start < block.size; start += 64) {
    uint64_t word = block.word(start);
#if AVX512
    for (int i = start; i < start + 64 && i < block.size; i += LANES, word >>= LANES) {
      __mmask16 bits = (__mmask16)word;
      _mm512_storeu_ps(weights + n, _mm512_maskz_compress_ps(bits, _mm512_maskz_loadu_ps(bits, p + i)));
      _mm512_storeu_ps(gradients + n, _mm512_maskz_compress_ps(bits, _mm512_maskz_loadu_ps(bits, g + i)));
      n += __builtin_popcount(bits);
    }
#else
    for (; word; word &= word - 1, n++) {
      int i = start + __builtin_ctzll(word);
      weights[n] = p[i];
      gradients[n] = g[i];
    }
#endif
  }
  return n;
}

// The inverse of `gather`, with zeros between; `weights` has LANES more.
void scatter(const Block& block, const float* weights, float* p) {
#if !AVX512
  memset(p, 0, (size_t)block.size * sizeof *p);
#endif
  for (int start = 0; start < block.size; start += 64) {
    uint64_t word = block.word(start);
#if AVX512
    for (int i = start; i < start + 64 && i < block.size; i += LANES, word >>= LANES) {
      __mmask16 bits = (__mmask16)word, here = block.size - i < LANES ? (__mmask16)((1u << (block.size - i)) - 1) : (__mmask16)0xffff;
      _mm512_mask_storeu_ps(p + i, here, _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(weights)));
      weights += __builtin_popcount(bits);
    }
#else
    for (; word; word &= word - 1) p[start + __builtin_ctzll(word)] = *weights++;
#endif
  }
}

}  // namespace

API void rs_adamw(float* p, const float* g, float* m, float* v, int64_t n, const Rates* rates, int threads) {
  int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; t++) {
    int64_t start = (blocks / threads * t + blocks % threads * t / threads) * BLOCK;
    int64_t end = (blocks / threads * (t + 1) + blocks % threads * (t + 1) / threads) * BLOCK;
    if (end > n) end = n;
    advance<false>(p + start, g + start, m + start, v + start, nullptr, end - start, *rates);
  }
}

// Dead gradients count as 0 and dead weights become 0. bits: [rows, ceil(cols / 8)], lowest first.
API void rs_adamw_masked(float* p, const float* g, float* m, float* v, const uint8_t* bits, int64_t rows, int64_t cols, const Rates* rates,
                         int threads) {
  Blocks blocks(bits, rows, cols);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks.count(); b++) {
    Block block = blocks[b];
    advance<true>(p + block.start, g + block.start, m + block.start, v + block.start, block.bits, block.size, *rates);
  }
}

// The same with moments of the live weights alone, in the order of the weights: m, v: [nnz]. Returns how many live; if they are not nnz,
// nothing is done.
API int64_t rs_adamw_live(float* p, const float* g, float* m, float* v, const uint8_t* bits, int64_t rows, int64_t cols, int64_t nnz,
                          const Rates* rates, int threads) {
  Blocks blocks(bits, rows, cols);
  int64_t num_live = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : num_live)
  for (int64_t b = 0; b < blocks.count(); b++) num_live += blocks[b].num_live();
  if (num_live != nnz) return num_live;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; t++) {
    int64_t first = blocks.start_of(t, threads), end = blocks.start_of(t + 1, threads), at = 0;
    for (int64_t b = 0; b < first; b++) at += blocks[b].num_live();
    for (int64_t b = first; b < end; b++) {
      Block block = blocks[b];
      float weights[BLOCK + LANES], gradients[BLOCK + LANES];
      int here = gather(block, p + block.start, g + block.start, weights, gradients);
      advance<false>(weights, gradients, m + at, v + at, nullptr, here, *rates);
      scatter(block, weights, p + block.start);
      at += here;
    }
  }
  return num_live;
}
