// Queries and the keys that each sees: in pieces, tiles of queries and chunks of keys. And a head's rows as floats.
#pragma once
#include "native.h"

constexpr int TILE = 2 * LANES;  // queries
constexpr int CHUNK = 64;        // keys

// [batch, heads, length, width], strides in elements; width is contiguous.
struct Tensor {
  void* start;
  int64_t batch, head, row;
};

// Class c < step has the queries c, c + step, c + 2 step ... Query q of it sees the keys first + c + j * stride with low[q] <= j < high[q].
// Within a class neither low nor high ever falls.
struct Piece {
  int64_t step, first, stride;
  const int32_t *low, *high;  // [length]
};

struct Problem {
  int64_t batch, heads, shared, length, width;  // shared: query heads that have one key head
  float scale;
  Tensor query, key, value, out, out_grad, query_grad, key_grad, value_grad;
  float* log_sum;         // [batch, heads, length]: natural logarithm of each query's sum of e^score
  const Piece* pieces;    // of no query do two show the same key; the first of each head shows every query a key
  const int32_t* ranges;  // [heads, 2]: pieces of a head, from and to
};

// Consecutive queries of a class, one a lane. Lanes without a query look like the last one.
struct Tile {
  int64_t query, step, count;  // the first one's position, from one to the next, how many
  int64_t key, stride;         // position of key 0, from one to the next
  int64_t begin, end;          // keys that any query sees
  alignas(64) int32_t low[TILE], high[TILE];

  Tile(const Piece& piece, int64_t c, int64_t first_query, int64_t length)
      : query(first_query), step(piece.step), key(piece.first + c), stride(piece.stride) {
    int64_t rest = (length - query + step - 1) / step;
    count = rest < TILE ? rest : TILE;
    for (int l = 0; l < TILE; l++) {
      int64_t q = at(l < count ? l : count - 1);
      low[l] = piece.low[q], high[l] = piece.high[q];
    }
    begin = low[0], end = high[TILE - 1];
  }
  int64_t at(int64_t lane) const { return query + lane * step; }
};

// Keys of a tile, at most CHUNK, that one and the same of its two vectors sees, or both: `lanes` from `lane` on.
struct Chunk {
  int64_t key, count, lane, lanes;
  bool whole;  // every lane sees every key

  Chunk(const Tile& t, int64_t from) : key(from) {
    int64_t first_ends = t.high[LANES - 1], second_begins = t.low[LANES];
    bool two = t.count > LANES, first = key < first_ends, second = two && key >= second_begins;
    int64_t end = key + CHUNK < t.end ? key + CHUNK : t.end;
    if (first && first_ends < end) end = first_ends;
    if (two && !second && second_begins < end) end = second_begins;
    count = end - key;
    lane = first ? 0 : LANES, lanes = (first ? LANES : 0) + (second ? LANES : 0);
    whole = lanes && key >= t.low[lane + lanes - 1] && end <= t.high[lane];
  }
};

// Every tile that sees anything, and whether it is of the first piece.
template <class Visit> void for_tiles(const Problem& p, int64_t head, Visit visit) {
  for (int part = p.ranges[2 * head]; part < p.ranges[2 * head + 1]; part++) {
    const Piece& piece = p.pieces[part];
    for (int64_t c = 0; c < piece.step && c < p.length; c++)
      for (int64_t query = c; query < p.length; query += TILE * piece.step)
        if (Tile t(piece, c, query, p.length); t.begin < t.end) visit(t, part == p.ranges[2 * head]);
  }
}

template <class Visit> void for_chunks(const Tile& t, Visit visit) {
  for (int64_t key = t.begin; key < t.end;) {
    Chunk chunk(t, key);
    visit(chunk);
    key += chunk.count;
  }
}

INLINE void clear(float* x, int64_t count) { memset(x, 0, (size_t)count * sizeof(float)); }

// What a thread works in for one head: rows of `padded` floats, whole vectors, zeros beyond `width`.
struct Memory {
  int64_t width, padded;
  float* next;

  Memory(int64_t width, int64_t rows, int64_t more) : width(width), padded((width + LANES - 1) / LANES * LANES) {
    next = (float*)scratch((size_t)(rows * padded + more) * sizeof(float), 0);
  }
  float* some(int64_t count) {
    float* start = next;
    next += count;
    return start;
  }
  float* rows(int64_t count) {
    float* start = some(count * padded);
    clear(start, count * padded);
    return start;
  }
};

template <class T> INLINE T* row_of(const Tensor& t, int64_t batch, int64_t head, int64_t row) {
  return (T*)t.start + batch * t.batch + head * t.head + row * t.row;
}

// Positions first, first + step ... of a head, times `scale`. In most models they lie apart, too far for the processor to foresee the
// next one: rows are asked for before their turn.
template <class T>
void take(const Problem& p, const Tensor& t, int64_t batch, int64_t head, int64_t first, int64_t step, int64_t count, float scale, float* to, int64_t to_row) {
  constexpr int64_t AHEAD = 16;
  for (int64_t i = 0; i < count; i++, to += to_row) {
    if (int64_t later = first + (i + AHEAD) * step; later < p.length)
      for (int64_t d = 0; d < p.width; d += 64 / (int64_t)sizeof(T)) __builtin_prefetch(row_of<T>(t, batch, head, later) + d);
    const T* from = row_of<T>(t, batch, head, first + i * step);
    for (int64_t d = 0; d < p.width; d++) to[d] = scale * to_float(from[d]);
  }
}

// A whole head's rows, times `scale`, into a tensor.
template <class T>
void give(const Problem& p, const float* from, int64_t from_row, float scale, const Tensor& t, int64_t batch, int64_t head) {
  for (int64_t i = 0; i < p.length; i++, from += from_row) {
    T* to = row_of<T>(t, batch, head, i);
    for (int64_t d = 0; d < p.width; d++) from_float(scale * from[d], to + d);
  }
}
