// Activations of a few tokens: in groups, as integers for int8 weights, turned for kernels that go from live weight to live weight.
#pragma once
#include <type_traits>
#include "native.h"

INLINE float to_number(float x) { return x; }
INLINE float to_number(bf16 x) { return to_float(x); }
INLINE int32_t to_number(uint8_t byte) { return byte - 128; }  // an int8 weight
INLINE int32_t to_number(int32_t x) { return x; }

// Tokens go in groups of 8, the last of 8, 4, 2 or 1; tokens that a group lacks are zeros.
INLINE int64_t group(int64_t tokens) { return tokens > 4 ? 8 : tokens > 2 ? 4 : tokens; }
INLINE int64_t padded(int64_t tokens) { return tokens / 8 * 8 + group(tokens % 8); }

// `call` with the group's size as a constant, its first token, and how many there are.
template <class Call> INLINE void groups(int64_t tokens, const Call& call) {
  for (int64_t first = 0; first < tokens; first += 8) {
    int64_t many = tokens - first < 8 ? tokens - first : 8;
    switch (group(many)) {
      case 1: call(std::integral_constant<int, 1>(), first, many); break;
      case 2: call(std::integral_constant<int, 2>(), first, many); break;
      case 4: call(std::integral_constant<int, 4>(), first, many); break;
      default: call(std::integral_constant<int, 8>(), first, many);
    }
  }
}

// The largest magnitude. Magnitudes are ordered as their bits are, and what is not finite is above all: 0x7f800000 and more.
INLINE uint32_t magnitude(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}
INLINE uint32_t magnitude(const bf16* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits = (uint32_t)(x[i].bits & 0x7fffu) << 16;
    most = bits > most ? bits : most;
  }
  return most;
}
constexpr uint32_t NOT_FINITE = 0x7f800000u;

struct Token {
  float scale;  // NaN where an activation is not finite
  int64_t sum;  // of its integers
};

// x * 32512 / max|x|, rounded: 127 * 256 is the largest that two signed bytes hold. Activations that are all below 1e-34 count as zero.
INLINE Token quantise(const float* x, int64_t count, int32_t* q) {
  uint32_t bits = magnitude(x, count);
  float most;
  memcpy(&most, &bits, 4);
  if (bits >= NOT_FINITE || most < 1e-34f) {
    for (int64_t i = 0; i < count; i++) q[i] = 0;
    return {bits >= NOT_FINITE ? __builtin_nanf("") : 0.0f, 0};
  }
  float inverse = 32512.0f / most;
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i++) {
    q[i] = (int32_t)__builtin_rintf(x[i] * inverse);
    sum += q[i];
  }
  return {most / 32512.0f, sum};
}

// q = 256 high + low, both within a byte.
template <class X> INLINE void split(const int32_t* __restrict q, int64_t count, X* __restrict high, X* __restrict low) {
  for (int64_t i = 0; i < count; i++) {
    low[i] = (X)(int8_t)(uint8_t)q[i];
    high[i] = (X)((q[i] - (int8_t)(uint8_t)q[i]) >> 8);
  }
}

// [tokens, cols] -> [cols, T] of each group.
template <class From, class To> void turn(const From* x, int64_t tokens, int64_t cols, To* to) {
  groups(tokens, [&](auto size, int64_t first, int64_t many) {
    constexpr int T = size;
    for (int64_t k = 0; k < cols; k++)
      for (int64_t t = 0; t < T; t++) to[first * cols + k * T + t] = t < many ? to_number(x[(first + t) * cols + k]) : To(0);
  });
}
