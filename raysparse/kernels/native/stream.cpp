// Streams are built from the bits of a mask, in milliseconds, whenever a topology changes.
#include "stream.h"
#include "native.h"

namespace {

// The mask of the matrix in 64-bit words, each row padded with zeros.
struct Bits {
  int64_t rows, words;
  std::vector<uint64_t> data;
  Bits(int64_t rows, int64_t cols) : rows(rows), words((cols + 63) / 64), data((size_t)(rows * words)) {}
  uint64_t* row(int64_t r) { return data.data() + r * words; }
  const uint64_t* row(int64_t r) const { return data.data() + r * words; }
};

Bits read_bits(const uint8_t* packed, int64_t rows, int64_t cols) {
  Bits bits(rows, cols);
  int64_t bytes = (cols + 7) / 8;
  for (int64_t r = 0; r < rows; r++) {
    uint64_t* row = bits.row(r);
    for (int64_t b = 0; b < bytes; b++) row[b / 8] |= (uint64_t)packed[r * bytes + b] << (b % 8 * 8);
    if (cols % 64) row[bits.words - 1] &= ~0ull >> (64 - cols % 64);  // what lies past the last column is no one's
  }
  return bits;
}

// 64 x 64 bits by recursive swaps of halves (Warren, Hacker's Delight, section 7-3).
void transpose_64(uint64_t block[64]) {
  uint64_t mask = 0x00000000ffffffffull;
  for (int half = 32; half; half >>= 1, mask ^= mask << half)
    for (int i = 0; i < 64; i = ((i | half) + 1) & ~half) {
      uint64_t swap = ((block[i] >> half) ^ block[i | half]) & mask;
      block[i] ^= swap << half;
      block[i | half] ^= swap;
    }
}

Bits transposed(const Bits& bits, int64_t cols) {
  Bits turned(cols, bits.rows);
  for (int64_t r = 0; r < bits.rows; r += 64)
    for (int64_t w = 0; w < bits.words; w++) {
      uint64_t block[64] = {};
      for (int64_t i = 0; i < 64 && r + i < bits.rows; i++) block[i] = bits.row(r + i)[w];
      transpose_64(block);
      for (int64_t i = 0; i < 64 && w * 64 + i < cols; i++) turned.row(w * 64 + i)[r / 64] = block[i];
    }
  return turned;
}

bool has_grain(const Bits& bits, int grain) {
  if (bits.rows % grain) return false;
  for (int64_t r = 0; r < bits.rows; r += grain)
    for (int i = 1; i < grain; i++)
      if (bits.words && memcmp(bits.row(r), bits.row(r + i), (size_t)bits.words * 8)) return false;
  return true;
}

int64_t count(const Bits& bits) {
  int64_t n = 0;
  for (uint64_t word : bits.data) n += __builtin_popcountll(word);
  return n;
}

// One tile: its units by their number of entries (a counting sort, stable), then their entries.
void append_tile(Stream& s, const Bits& bits, int64_t row_block, int64_t col_block) {
  int64_t first_row = row_block * s.tile_rows, first_col = col_block * s.tile_cols, width = s.cols_of(col_block);
  int64_t first_word = first_col / 64, end_word = first_word + (width + 63) / 64, num_units = s.units_of(row_block);
  std::vector<uint16_t> sizes((size_t)num_units);
  std::vector<int32_t> place((size_t)s.tile_cols + 3);
  for (int64_t u = 0; u < num_units; u++) {
    const uint64_t* row = bits.row(first_row + u * s.grain);
    int n = 0;
    for (int64_t w = first_word; w < end_word; w++) n += __builtin_popcountll(row[w]);
    sizes[(size_t)u] = (uint16_t)(s.paired ? n + n % 2 : n);
    place[sizes[(size_t)u] + 1u]++;
  }
  for (size_t n = 1; n < place.size(); n++) place[n] += place[n - 1];
  size_t start = s.units.size();
  s.units.resize(start + (size_t)num_units);
  s.counts.resize(start + (size_t)num_units);
  for (int64_t u = 0; u < num_units; u++) {
    size_t at = start + (size_t)place[sizes[(size_t)u]]++;
    s.units[at] = (uint16_t)u;
    s.counts[at] = sizes[(size_t)u];
  }
  for (size_t at = start; at < s.units.size(); at++) {
    const uint64_t* row = bits.row(first_row + s.units[at] * s.grain);
    int n = 0;
    for (int64_t w = first_word; w < end_word; w++)
      for (uint64_t word = row[w]; word; word &= word - 1, n++)
        s.columns.push_back((uint16_t)(w * 64 + __builtin_ctzll(word) - first_col));
    if (n < s.counts[at]) s.columns.push_back((uint16_t)width);
  }
  s.tiles.push_back(s.entries());
}

}  // namespace

// What a stream is for.
enum Use { FORWARD = 0, BACKWARD = 1, GRADIENT = 2 };

// The stream of a weight ([rows, cols], row-major) from its mask: [rows, ceil(cols / 8)] bytes, lowest bit first. FORWARD multiplies by
// the weight, BACKWARD by its transpose, GRADIENT is the weight's own gradient. Two-byte weights are multiplied in pairs where the
// instruction set does that.
API Stream* rs_stream_new(const uint8_t* packed, int64_t rows, int64_t cols, int use, int two_bytes) {
  Bits bits = read_bits(packed, rows, cols);
  Stream* s = new Stream();
  s->rows = rows, s->cols = cols, s->row_step = cols, s->col_step = 1;
  if (use == BACKWARD) {
    bits = transposed(bits, cols);
    s->rows = cols, s->cols = rows, s->row_step = 1, s->col_step = cols;
  }
  s->grain = has_grain(bits, 4) ? 4 : has_grain(bits, 2) ? 2 : 1;
  s->paired = two_bytes && AVX512 && use != GRADIENT;
  int64_t nnz = count(bits);
  bool very_sparse = nnz * 5 < rows * cols;  // wider tiles: with few entries in a row, its outputs' way to the cache and back counts more
  s->tile_rows = 256;
  s->tile_cols = use == GRADIENT ? (very_sparse ? 192 : 64) : s->paired ? (very_sparse ? 384 : 256) : (very_sparse ? 192 : 128);
  int64_t units = s->rows / s->grain * s->col_blocks();
  s->units.reserve((size_t)units), s->counts.reserve((size_t)units);
  s->columns.reserve((size_t)(nnz / s->grain + (s->paired ? units : 0)));
  s->tiles.push_back(0);
  for (int64_t r = 0; r < s->row_blocks(); r++)
    for (int64_t c = 0; c < s->col_blocks(); c++) append_tile(*s, bits, r, c);
  if (use != GRADIENT) s->values.resize((size_t)(s->entries() * s->grain) * (s->paired ? sizeof(bf16) : sizeof(float)));
  return s;
}

API void rs_stream_free(Stream* s) { delete s; }

API int rs_stream_grain(const Stream* s) { return s->grain; }

API int64_t rs_stream_bytes(const Stream* s) {
  return (int64_t)(s->units.size() * 4 + s->columns.size() * 2 + s->tiles.size() * 8 + s->values.size());
}
