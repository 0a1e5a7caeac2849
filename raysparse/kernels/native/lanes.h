// A vector of weights, loaded or expanded, and its products with activations: float, bfloat16 and int8 on each instruction set.
#pragma once
#include "native.h"

// `load` takes WIDTH dense weights, `load_some` the first `count` of them, `expand` those whose bits are set; `add` multiplies them by as
// many activations, which for int8 come in two parts; `totals` sums four vectors up.
template <class V> struct Lanes;

#if AVX512
// `expand` merges into a register of dead weights, and the compiler must not see what is in it: on Zen 4 the zero-masked vpexpand
// waits for its destination's old value (6.2 against 2.9 cycles).
INLINE __m512i hidden(__m512i x) {
  asm("" : "+v"(x));
  return x;
}

INLINE void totals(const __m512 s[4], float to[4]) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
  __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
  __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

INLINE void totals(const __m512i s[4], int32_t to[4]) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
  __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti32x8_epi32(abcd, 1));
  _mm_storeu_si128((__m128i*)to, _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

template <> struct Lanes<float> {
  using Vector = __m512;
  using Sum = __m512;
  using Input = float;
  using Total = float;
  static constexpr int WIDTH = 16, PARTS = 1;
  static INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static INLINE Vector load_some(const float* p, int64_t count) { return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p); }
  static INLINE __m512i dead() { return hidden(_mm512_setzero_si512()); }
  static INLINE Vector expand(__m512i dead, uint64_t bits, const float* p) {
    return _mm512_mask_expand_ps((__m512)dead, (__mmask16)bits, _mm512_loadu_ps(p));
  }
  static INLINE Sum add(Sum s, Vector w, const float* x) { return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), s); }
};

template <> struct Lanes<bf16> {
  using Vector = __m512i;
  using Sum = __m512;
  using Input = bf16;
  using Total = float;
  static constexpr int WIDTH = 32, PARTS = 1;
  static INLINE Vector load(const bf16* p) { return _mm512_loadu_si512(p); }
  static INLINE Vector load_some(const bf16* p, int64_t count) { return _mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p); }
  static INLINE __m512i dead() { return hidden(_mm512_setzero_si512()); }
  static INLINE Vector expand(__m512i dead, uint64_t bits, const bf16* p) {
    return _mm512_mask_expand_epi16(dead, (__mmask32)bits, _mm512_loadu_si512(p));
  }
  static INLINE Sum add(Sum s, Vector w, const bf16* x) { return _mm512_dpbf16_ps(s, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x)); }
};

template <> struct Lanes<uint8_t> {
  using Vector = __m512i;
  using Sum = __m512i;
  using Input = int8_t;
  using Total = int32_t;  // at most 255 * 128 * 65,536 columns: fits
  static constexpr int WIDTH = 64, PARTS = 2;
  static constexpr bool OFFSET = true;  // a byte is multiplied as 0 to 255, as vpdpbusd takes it, not as -128 to 127
  static INLINE Vector load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static INLINE Vector load_some(const uint8_t* p, int64_t count) {
    return _mm512_mask_loadu_epi8(_mm512_set1_epi8(-128), (1ull << count) - 1, p);
  }
  static INLINE __m512i dead() { return hidden(_mm512_set1_epi8(-128)); }
  static INLINE Vector expand(__m512i dead, uint64_t bits, const uint8_t* p) {
    return _mm512_mask_expand_epi8(dead, bits, _mm512_loadu_si512(p));
  }
  // At most 32 of them: a load of 64 bytes mostly meets two cache lines, and that takes longer than expanding.
  static INLINE Vector expand_few(__m512i dead, uint64_t bits, const uint8_t* p) {
    return _mm512_mask_expand_epi8(dead, bits, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)));
  }
  static INLINE Sum add(Sum s, Vector w, const int8_t* x) { return _mm512_dpbusd_epi32(s, w, _mm512_loadu_si512(x)); }
};
#else
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(LANES * 4)));

template <class Sum, class Total> INLINE void totals(const Sum s[4], Total to[4]) {
  for (int i = 0; i < 4; i++) {
    to[i] = 0;
    for (int j = 0; j < LANES; j++) to[i] += s[i][j];
  }
}

template <class V> struct Lanes {  // float, bf16
  using Vector = floats;
  using Sum = floats;
  using Input = float;
  using Total = float;
  static constexpr int WIDTH = LANES, PARTS = 1;
  static INLINE Vector load(const V* p) { return load_some(p, LANES); }
  static INLINE Vector load_some(const V* p, int64_t count) {
    floats w = {};
    for (int64_t i = 0; i < count; i++) w[i] = to_float(p[i]);
    return w;
  }
  static INLINE Sum add(Sum s, Vector w, const float* x) {
    floats y;
    memcpy(&y, x, sizeof y);
    return s + w * y;
  }
};

template <> struct Lanes<uint8_t> {
  using Vector = ints;
  using Sum = ints;
  using Input = int32_t;
  using Total = int32_t;
  static constexpr int WIDTH = LANES, PARTS = 2;
  static constexpr bool OFFSET = false;
  static INLINE Vector load(const uint8_t* p) { return load_some(p, LANES); }
  static INLINE Vector load_some(const uint8_t* p, int64_t count) {
    ints w = {};
    for (int64_t i = 0; i < count; i++) w[i] = p[i] - 128;
    return w;
  }
  static INLINE Sum add(Sum s, Vector w, const int32_t* x) {
    ints y;
    memcpy(&y, x, sizeof y);
    return s + w * y;
  }
};
#endif
