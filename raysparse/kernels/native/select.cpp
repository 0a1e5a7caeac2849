// Exact selection of the largest keys, one digit at a time, the most significant first.
//
// A key is the lower 31 bits of an element: a random number, or the absolute value of a float32, whose bits order as it does. Once it
// is known, or guessed, among which digits the last chosen key lies, elements above them are chosen, those below are out, and those
// between are listed (`rs_choose`); then the next digits of the list are looked at (`rs_count_digits`, `rs_refine`).
#include "native.h"
#include <vector>

namespace {

constexpr int BLOCK = 64;
constexpr int MAX_BITS = 11;

INLINE uint32_t key_of(int32_t element) { return (uint32_t)element & 0x7fffffffu; }

// Part `part` of so many consecutive ones of n elements starts here.
int64_t start_of(int64_t n, int part, int parts) { return n / parts * part + n % parts * part / parts; }

// Where nobody looks: ineligible elements are counted there, which is faster than a branch. There are several such places because an
// increment waits for one just before it in the same place.
constexpr int NOWHERE = 1 << MAX_BITS, PLACES = 16;

template <bool ALL>
INLINE void count_block(const int32_t* keys, const uint8_t* eligible, int width, int shift, uint32_t last, uint32_t* table) {
  uint16_t digits[BLOCK];
  for (int j = 0; j < width; j++) {  // vectors
    uint16_t digit = (uint16_t)(key_of(keys[j]) >> shift & last);
    digits[j] = ALL || (eligible[j] & 1) ? digit : (uint16_t)(NOWHERE + j % PLACES);
  }
  for (int j = 0; j < width; j++) table[digits[j]]++;
}

template <bool ALL>
void count_digits(const int32_t* keys, const uint8_t* eligible, int64_t n, int shift, uint32_t last, int64_t* counts) {
  constexpr int64_t MOST = 1 << 30;  // what a table can count; a multiple of BLOCK
  for (int64_t start = 0; start < n; start += MOST) {
    int64_t end = n - start < MOST ? n : start + MOST, i = start;
    uint32_t table[NOWHERE + PLACES] = {};
    for (; i + BLOCK <= end; i += BLOCK) count_block<ALL>(keys + i, ALL ? nullptr : eligible + i, BLOCK, shift, last, table);
    count_block<ALL>(keys + i, ALL ? nullptr : eligible + i, (int)(end - i), shift, last, table);
    for (uint32_t d = 0; d <= last; d++) counts[d] += table[d];
  }
}

struct List {
  std::vector<int64_t> index;
  std::vector<int32_t> keys;
  int64_t chosen = 0;
};

// The elements i, ..., i + width - 1; keys and eligible hold BLOCK of them, a few vectors.
template <bool ALL>
INLINE void choose_block(const int32_t* keys, const uint8_t* eligible, int64_t i, int width, int shift, uint32_t low, uint32_t high,
                         uint8_t* mask, List& list) {
  uint8_t above[BLOCK], between[BLOCK], num_above = 0, num_between = 0;
  for (int j = 0; j < BLOCK; j++) {
    uint32_t digit = key_of(keys[j]) >> shift;
    uint8_t in = ALL ? 1 : eligible[j] & 1;
    above[j] = (uint8_t)(digit > high) & in;
    between[j] = (uint8_t)(digit >= low) & (uint8_t)(digit <= high) & in;
    num_above += above[j];
    num_between += between[j];
  }
  memcpy(mask + i, above, (size_t)width);
  list.chosen += num_above;
  if (!num_between) return;
  uint64_t bits = 0;  // one for each element of the block: a single loop, whose end is guessed wrong but once
  for (int j = 0; j < BLOCK; j += 8) {
    uint64_t eight;
    memcpy(&eight, between + j, 8);
    bits |= (eight * 0x0102040810204080u >> 56) << j;  // byte k of 0 or 1 becomes bit k
  }
  for (; bits; bits &= bits - 1) {
    int j = __builtin_ctzll(bits);
    list.index.push_back(i + j);
    list.keys.push_back(keys[j]);
  }
}

// The elements from `i` on, up to `end`.
template <bool ALL>
void choose(const int32_t* keys, const uint8_t* eligible, int64_t i, int64_t end, int shift, uint32_t low, uint32_t high, uint8_t* mask,
            List& list) {
  for (; i + BLOCK <= end; i += BLOCK) choose_block<ALL>(keys + i, ALL ? nullptr : eligible + i, i, BLOCK, shift, low, high, mask, list);
  if (i == end) return;
  size_t width = (size_t)(end - i);
  int32_t last_keys[BLOCK] = {};
  uint8_t last_eligible[BLOCK] = {};
  memcpy(last_keys, keys + i, width * 4);
  ALL ? memset(last_eligible, 1, width) : memcpy(last_eligible, eligible + i, width);
  choose_block<false>(last_keys, last_eligible, i, (int)width, shift, low, high, mask, list);
}

}  // namespace

// counts: [2^bits], how many eligible elements have which digit, the `bits` (at most 11) above `shift`. eligible: [n], the lowest bit of
// each byte; null: all are.
API void rs_count_digits(const int32_t* keys, const uint8_t* eligible, int64_t n, int shift, int bits, int64_t* counts, int threads) {
  memset(counts, 0, sizeof *counts << bits);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int p = 0; p < threads; p++) {
    int64_t start = start_of(n, p, threads), size = start_of(n, p + 1, threads) - start, mine[1 << MAX_BITS] = {};
    if (eligible)
      count_digits<false>(keys + start, eligible + start, size, shift, (1u << bits) - 1, mine);
    else
      count_digits<true>(keys + start, nullptr, size, shift, (1u << bits) - 1, mine);
#pragma omp critical
    for (int d = 0; d < 1 << bits; d++) counts[d] += mine[d];
  }
}

// mask: [n], 1 where an eligible element's key >> shift is above `high`, else 0. Those in [low, high] are listed: index and keys, in order,
// if they are at most `room`, else nothing is. Returns how many they are; *chosen: how many were set in the mask.
API int64_t rs_choose(const int32_t* keys, const uint8_t* eligible, int64_t n, int shift, uint32_t low, uint32_t high, uint8_t* mask,
                      int64_t* chosen, int64_t* index, int32_t* listed, int64_t room, int threads) {
  std::vector<List> lists((size_t)threads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int p = 0; p < threads; p++) {
    int64_t start = start_of(n, p, threads), end = start_of(n, p + 1, threads);
    if (eligible)
      choose<false>(keys, eligible, start, end, shift, low, high, mask, lists[(size_t)p]);
    else
      choose<true>(keys, nullptr, start, end, shift, low, high, mask, lists[(size_t)p]);
  }
  int64_t length = 0;
  *chosen = 0;
  for (const List& list : lists) {
    size_t size = list.index.size();
    if (size && length + (int64_t)size <= room) {
      memcpy(index + length, list.index.data(), size * sizeof *index);
      memcpy(listed + length, list.keys.data(), size * sizeof *listed);
    }
    length += (int64_t)size;
    *chosen += list.chosen;
  }
  return length;
}

// Elements of a list whose digit is above `digit` are set in the mask (of `size` elements); those on it stay listed, in order. Returns
// how many stay.
API int64_t rs_refine(int64_t* index, int32_t* listed, int64_t length, int shift, int bits, uint32_t digit, uint8_t* mask, int64_t size) {
  int64_t kept = 0;
  for (int64_t i = 0; i < length; i++) {
    uint32_t found = key_of(listed[i]) >> shift & ((1u << bits) - 1);
    if (found > digit && (uint64_t)index[i] < (uint64_t)size) mask[index[i]] = 1;
    if (found == digit) {
      index[kept] = index[i];
      listed[kept++] = listed[i];
    }
  }
  return kept;
}
