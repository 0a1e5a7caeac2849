// What every kernel file shares: the C ABI, element types, vectors of the instruction set, scratch memory.
//
// A vector is GCC's and Clang's vector extension: 16, 8 or 4 floats, whatever the build's instruction set holds in a register. Kernels
// are written once over it; where an instruction set has something better for a step (a transpose, a dot product of bfloat16
// pairs), that step has a version of its own under #if, beside the portable one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define API extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#define AVX512 1
constexpr int LANES = 16;
#elif defined(__AVX2__)
#define AVX512 0
constexpr int LANES = 8;
#else
#define AVX512 0
constexpr int LANES = 4;
#endif

typedef float floats __attribute__((vector_size(LANES * 4), aligned(LANES * 4)));

struct bf16 {
  uint16_t bits;
};

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// Round to nearest, ties to even; a NaN stays a NaN (as torch and vcvtneps2bf16 do).
INLINE void from_float(float x, float* y) { *y = x; }
INLINE void from_float(float x, bf16* y) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    y->bits = (uint16_t)((bits >> 16) | 0x40);
  else
    y->bits = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Memory of the calling thread for one call: it only grows, so that a training step allocates nothing after the first. 2 MB aligned
// and advised to lie on huge pages. Under AddressSanitizer it is of exactly these bytes and new in each call. Slots are the callers'
// business: no kernel calls another that uses the same one.
void* scratch(size_t bytes, int slot);
