// The live elements of a matrix taken out of it, and put back: what is sent over a wire and what a checkpoint holds.
#include "bits.h"

namespace {

template <class T> int64_t take_all(const T* dense, const uint8_t* bits, int64_t rows, int64_t cols, int64_t nnz, T* live, int threads) {
  return for_live(Blocks(bits, rows, cols), nnz, threads, [&](const Block& block, int64_t at) {
    T found[BLOCK + SPARE<T>];
    int n = take(block, dense + block.start, found);
    memcpy((void*)(live + at), found, (size_t)n * sizeof(T));
    return n;
  });
}

template <class T> int64_t put_all(const T* live, const uint8_t* bits, int64_t rows, int64_t cols, int64_t nnz, T* dense, int threads) {
  return for_live(Blocks(bits, rows, cols), nnz, threads, [&](const Block& block, int64_t at) {
    T here[BLOCK + SPARE<T>];
    int n = block.num_live();
    memcpy((void*)here, live + at, (size_t)n * sizeof(T));
    put(block, here, dense + block.start);
    return n;
  });
}

}  // namespace

// dense: [rows, cols], bits: [rows, ceil(cols / 8)], live: [nnz]. They return how many live; if they are not nnz, nothing is done.
API int64_t rs_take_4(const float* dense, const uint8_t* bits, int64_t rows, int64_t cols, int64_t nnz, float* live, int threads) {
  return take_all(dense, bits, rows, cols, nnz, live, threads);
}
API int64_t rs_take_2(const bf16* dense, const uint8_t* bits, int64_t rows, int64_t cols, int64_t nnz, bf16* live, int threads) {
  return take_all(dense, bits, rows, cols, nnz, live, threads);
}
API int64_t rs_put_4(const float* live, const uint8_t* bits, int64_t rows, int64_t cols, int64_t nnz, float* dense, int threads) {
  return put_all(live, bits, rows, cols, nnz, dense, threads);
}
API int64_t rs_put_2(const bf16* live, const uint8_t* bits, int64_t rows, int64_t cols, int64_t nnz, bf16* dense, int threads) {
  return put_all(live, bits, rows, cols, nnz, dense, threads);
}
