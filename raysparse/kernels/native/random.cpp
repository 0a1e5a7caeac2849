// Counter-based randomness: splitmix64 (Steele, Lea, Flood, OOPSLA 2014) of index + key, as raysparse.sparsity.counter has it.
#include "native.h"

namespace {

INLINE uint64_t mix(uint64_t index, uint64_t key) {
  uint64_t z = (index + key) * 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

}  // namespace

API void rs_mix(const uint64_t* index, int64_t n, uint64_t key, uint64_t* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i++) out[i] = mix(index[i], key);
}

// The upper 31 bits of the elements first, first + 1, ...
API void rs_random_keys(uint64_t first, int64_t n, uint64_t key, int32_t* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i++) out[i] = (int32_t)(mix(first + (uint64_t)i, key) >> 33);
}
