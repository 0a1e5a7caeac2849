// Masks of one bit a weight, lowest bit of a byte first, every row padded to whole bytes; and the live weights, row by row, without the
// others.
#pragma once
#include "native.h"

constexpr int BLOCK = 1024;  // weights that are looked at together

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

// Elements that `take` and `put` touch behind the live ones of their buffer.
template <class T> constexpr int SPARE = 64 / sizeof(T);

#if AVX512
INLINE __m512i gathered(uint64_t bits, const float* from) { return _mm512_maskz_compress_epi32((__mmask16)bits, _mm512_loadu_si512(from)); }
INLINE __m512i gathered(uint64_t bits, const bf16* from) { return _mm512_maskz_compress_epi16((__mmask32)bits, _mm512_loadu_si512(from)); }
INLINE __m512i spread(uint64_t bits, const float* from) { return _mm512_maskz_expand_epi32((__mmask16)bits, _mm512_loadu_si512(from)); }
INLINE __m512i spread(uint64_t bits, const bf16* from) { return _mm512_maskz_expand_epi16((__mmask32)bits, _mm512_loadu_si512(from)); }

// Set bits among the first so many.
INLINE int before(uint64_t word, int bits) { return __builtin_popcountll(bits ? word << (64 - bits) : 0); }
#endif

// The live ones of a block's elements, one after the other. `live` has SPARE more. Returns how many.
template <class T> int take(const Block& block, const T* dense, T* live) {
  int n = 0, start = 0;
#if AVX512
  for (; start + 64 <= block.size; start += 64) {
    uint64_t word = block.word(start);
    UNROLL for (int i = 0; i < 64; i += SPARE<T>)
      _mm512_storeu_si512(live + n + before(word, i), gathered(word >> i, dense + start + i));
    n += __builtin_popcountll(word);
  }
#endif
  for (; start < block.size; start += 64)
    for (uint64_t word = block.word(start); word; word &= word - 1) live[n++] = dense[start + __builtin_ctzll(word)];
  return n;
}

// The inverse, with zeros between. `live` has SPARE more.
template <class T> void put(const Block& block, const T* live, T* dense) {
  int start = 0;
#if AVX512
  for (; start + 64 <= block.size; start += 64) {
    uint64_t word = block.word(start);
    UNROLL for (int i = 0; i < 64; i += SPARE<T>)
      _mm512_storeu_si512(dense + start + i, spread(word >> i, live + before(word, i)));
    live += __builtin_popcountll(word);
  }
#endif
  memset((void*)(dense + start), 0, (size_t)(block.size - start) * sizeof *dense);
  for (; start < block.size; start += 64)
    for (uint64_t word = block.word(start); word; word &= word - 1) dense[start + __builtin_ctzll(word)] = *live++;
}

// Calls f(block, live weights before it) for all blocks, a thread a stretch of them; f returns how many live in the block. Returns how many
// weights live; if they are not nnz, nothing is called.
template <class F> int64_t for_live(const Blocks& blocks, int64_t nnz, int threads, const F& f) {
  int64_t num_live = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : num_live)
  for (int64_t b = 0; b < blocks.count(); b++) num_live += blocks[b].num_live();
  if (num_live != nnz) return num_live;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; t++) {
    int64_t first = blocks.start_of(t, threads), end = blocks.start_of(t + 1, threads), at = 0;
    for (int64_t b = 0; b < first; b++) at += blocks[b].num_live();
    for (int64_t b = first; b < end; b++) at += f(blocks[b], at);
  }
  return num_live;
}
