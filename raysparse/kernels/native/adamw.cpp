// A step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) in one pass over a parameter:
//
//     m = beta1 m + (1 - beta1) g
//     v = beta2 v + (1 - beta2) g g
//     p = (1 - lr decay) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
//
// of all its weights, of those that live by a mask of one bit each, or of those with moments for them alone. Memory is what it waits
// for: a mask in the same pass is nearly free, and moments that are not there are not moved.
#include "bits.h"

struct Rates {
  float keep;           // 1 - lr decay
  float beta1, rest1;   // rest: 1 - beta
  float beta2, rest2;
  float root_scale;     // 1 / sqrt(1 - beta2^t)
  float eps;
  float step;           // lr / (1 - beta1^t)
};

namespace {

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
  if (n <= 8) return (uint64_t)(bits[i / 8] >> i % 8);
  uint16_t found;
  memcpy(&found, bits + i / 8, 2);
  return found;
}

template <bool MASKED>
void advance(float* p, const float* g, float* m, float* v, const uint8_t* bits, int64_t n, const Rates& rates) {
  const Rates r = rates;
  int64_t i = 0;
  for (; MASKED && i + 64 <= n; i += 64) {
    uint64_t word;
    memcpy(&word, bits + i / 8, 8);
    UNROLL for (int j = 0; j < 64; j += LANES) advance_vector<MASKED>(p + i + j, g + i + j, m + i + j, v + i + j, word >> j, r);
  }
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
  return for_live(Blocks(bits, rows, cols), nnz, threads, [&](const Block& block, int64_t at) {
    float weights[BLOCK + SPARE<float>], gradients[BLOCK + SPARE<float>];
    int here = take(block, p + block.start, weights);
    take(block, g + block.start, gradients);
    advance<false>(weights, gradients, m + at, v + at, nullptr, here, *rates);
    put(block, weights, p + block.start);
    return here;
  });
}
