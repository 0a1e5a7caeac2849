// Attention of each query to spans of keys, forward and backward; no other score is computed.
//
// A tile is two vectors of queries, and all that belongs to a query stays in its lane: its scores, their maximum, their sum, its output.
// So softmax needs no sum over lanes, and keys and values come one row at a time, from wherever they lie. What the inner products sum up
// into is transposed: [width, TILE]. Keys are taken in chunks; the output so far fades where larger scores appear (arXiv:2205.14135), and
// a second piece goes on from the output and the sum that the first one left. The backward pass computes the scores again
// (arXiv:2307.08691). Scores are in powers of two: queries are multiplied by log2 e.
#include <cmath>
#include "attention.h"
#include "panel.h"
#include "product.h"

namespace {

constexpr float INFINITE = __builtin_inff(), LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

// The keys and the values of a head, as floats.
template <class T> struct Keys {
  Memory& m;
  float *keys, *values, *key_copy, *value_copy;

  Keys(const Problem& p, int64_t batch, int64_t head, Memory& m)
      : m(m), keys(m.rows(p.length)), values(m.rows(p.length)), key_copy(m.some(CHUNK * m.padded)), value_copy(m.some(CHUNK * m.padded)) {
    take<T>(p, p.key, batch, head, 0, 1, p.length, 1.0f, keys, m.padded);
    take<T>(p, p.value, batch, head, 0, 1, p.length, 1.0f, values, m.padded);
  }
  const float* keys_of(const Tile& t, const Chunk& chunk) const { return gather(keys, t, chunk, key_copy); }
  const float* values_of(const Tile& t, const Chunk& chunk) const { return gather(values, t, chunk, value_copy); }

 private:
  // The rows themselves, or a copy where they lie apart: a cache holds few rows whose distance is a power of two.
  const float* gather(const float* all, const Tile& t, const Chunk& chunk, float* copy) const {
    const float* from = all + (t.key + chunk.key * t.stride) * m.padded;
    if (t.stride == 1) return from;
    for (int64_t j = 0; j < chunk.count; j++) memcpy(copy + j * m.padded, from + j * t.stride * m.padded, (size_t)m.padded * sizeof(float));
    return copy;
  }
};

// Scores of keys that a lane's query does not see become -inf.
void hide(const Tile& t, const Chunk& chunk, float* scores) {
  if (chunk.whole) return;
  for (int64_t l = chunk.lane; l < chunk.lane + chunk.lanes; l += LANES) {
    words low, high;
    memcpy(&low, t.low + l, sizeof low), memcpy(&high, t.high + l, sizeof high);
    for (int64_t j = 0; j < chunk.count; j++) {
      words key = (uint32_t)(chunk.key + j) - words{};
      floats* s = (floats*)(scores + j * TILE + l);
      *s = ((key >= low) & (key < high)) ? *s : floats{} - INFINITE;
    }
  }
}

template <class T> class Forward {
 public:
  Forward(const Problem& p, int64_t batch, int64_t head)
      : p(p), batch(batch), head(head), m(p.width, 3 * p.length + 3 * TILE + 2 * CHUNK, CHUNK * TILE), keys(p, batch, head / p.shared, m) {}

  void run() {
    for_tiles(p, head, [&](const Tile& t, bool first) {
      begin(t, first);
      for_chunks(t, [&](const Chunk& chunk) { add(t, chunk); });
      end(t);
    });
    give<T>(p, out, m.padded, 1.0f, p.out, batch, head);
  }

 private:
  const Problem& p;
  int64_t batch, head;
  Memory m;
  Keys<T> keys;
  float *out = m.rows(p.length), *log_sum = p.log_sum + (batch * p.heads + head) * p.length;
  float *queries = m.rows(TILE), *queries_t = m.rows(TILE), *out_t = m.rows(TILE), *scores = m.some(CHUNK * TILE);
  alignas(64) float most[TILE], sum[TILE];  // the largest score, and the sum of 2^(score - most)

  // From nothing, or from what the pieces before have left.
  void begin(const Tile& t, bool first) {
    take<T>(p, p.query, batch, head, t.query, t.step, t.count, p.scale * LOG2_E, queries, m.padded);
    turn(queries, m.padded, TILE, m.padded, queries_t, TILE);
    for (int l = 0; l < TILE; l++) {
      bool resumes = !first && l < t.count;
      most[l] = resumes ? log_sum[t.at(l)] * LOG2_E : -INFINITE, sum[l] = resumes;
    }
    if (first)
      clear(out_t, TILE * m.padded);
    else
      turn(out + t.query * m.padded, t.step * m.padded, t.count, m.padded, out_t, TILE);
  }

  void add(const Tile& t, const Chunk& chunk) {
    const int64_t lane = chunk.lane;
    multiply<false>(chunk.count, chunk.lanes, p.width, {keys.keys_of(t, chunk), m.padded, 1}, {queries_t + lane, TILE}, {scores + lane, TILE});
    hide(t, chunk, scores);
    for (int64_t l = lane; l < lane + chunk.lanes; l += LANES) soften(chunk, l);
    multiply<true>(m.padded, chunk.lanes, chunk.count, {keys.values_of(t, chunk), 1, m.padded}, {scores + lane, TILE}, {out_t + lane, TILE});
  }

  // Scores of one vector of queries become weights below the largest so far; what was summed up before fades by as much.
  void soften(const Chunk& chunk, int64_t l) {
    floats before = *(floats*)(most + l), top = before, total = {};
    for (int64_t j = 0; j < chunk.count; j++) {
      floats s = *(floats*)(scores + j * TILE + l);
      top = s > top ? s : top;
    }
    floats base = top == -INFINITE ? floats{} : top;  // nothing seen yet
    for (int64_t j = 0; j < chunk.count; j++) {
      floats* s = (floats*)(scores + j * TILE + l);
      *s = power_of_two(*s - base);
      total += *s;
    }
    floats fade = power_of_two(before - base);
    for (int64_t d = 0; d < m.padded; d++) *(floats*)(out_t + d * TILE + l) *= fade;
    *(floats*)(sum + l) = *(floats*)(sum + l) * fade + total;
    *(floats*)(most + l) = top;
  }

  void end(const Tile& t) {
    for (int64_t l = 0; l < TILE; l += LANES) {
      floats share = 1.0f / *(floats*)(sum + l);
      for (int64_t d = 0; d < m.padded; d++) *(floats*)(out_t + d * TILE + l) *= share;
    }
    for (int64_t l = 0; l < t.count; l++) log_sum[t.at(l)] = most[l] * LN_2 + std::log(sum[l]);
    turn(out_t, TILE, m.padded, t.count, out + t.query * m.padded, t.step * m.padded);
  }
};

// All query heads of a key head, for their gradients of keys and values add up.
template <class T> class Backward {
 public:
  Backward(const Problem& p, int64_t batch, int64_t key_head)
      : p(p), batch(batch), key_head(key_head), m(p.width, 5 * p.length + 5 * TILE + 2 * CHUNK, 2 * CHUNK * TILE + p.length),
        keys(p, batch, key_head, m) {}

  void run() {
    for (head = key_head * p.shared; head < (key_head + 1) * p.shared; head++) {
      log_sum = p.log_sum + (batch * p.heads + head) * p.length;
      for_tiles(p, head, [&](const Tile& t, bool first) {
        begin(t, first);
        for_chunks(t, [&](const Chunk& chunk) { add(t, chunk); });
        turn(query_grads_t, TILE, m.padded, t.count, query_grad + t.query * m.padded, t.step * m.padded);
      });
      give<T>(p, query_grad, m.padded, p.scale, p.query_grad, batch, head);
    }
    give<T>(p, key_grad, m.padded, LN_2, p.key_grad, batch, key_head);  // its queries were times log2 e
    give<T>(p, value_grad, m.padded, 1.0f, p.value_grad, batch, key_head);
  }

 private:
  const Problem& p;
  int64_t batch, key_head, head = 0;
  Memory m;
  Keys<T> keys;
  const float* log_sum = nullptr;
  float *query_grad = m.rows(p.length), *key_grad = m.rows(p.length), *value_grad = m.rows(p.length);
  float *queries = m.rows(TILE), *out_grads = m.rows(TILE), *queries_t = m.rows(TILE), *out_grads_t = m.rows(TILE);
  float *query_grads_t = m.rows(TILE), *scores = m.some(CHUNK * TILE), *grads = m.some(CHUNK * TILE);
  float* dots = m.some(p.length);  // of each query's output with the output's gradient
  alignas(64) float log2_sum[TILE] = {}, dot[TILE] = {};

  void begin(const Tile& t, bool first) {
    if (first) sum_dots(t);
    take<T>(p, p.query, batch, head, t.query, t.step, t.count, p.scale * LOG2_E, queries, m.padded);
    take<T>(p, p.out_grad, batch, head, t.query, t.step, t.count, 1.0f, out_grads, m.padded);
    turn(queries, m.padded, TILE, m.padded, queries_t, TILE);
    turn(out_grads, m.padded, TILE, m.padded, out_grads_t, TILE);
    for (int64_t l = 0; l < t.count; l++) log2_sum[l] = log_sum[t.at(l)] * LOG2_E, dot[l] = dots[t.at(l)];
    if (first)
      clear(query_grads_t, TILE * m.padded);
    else
      turn(query_grad + t.query * m.padded, t.step * m.padded, t.count, m.padded, query_grads_t, TILE);
  }

  void sum_dots(const Tile& t) {
    float *outs = queries, *products = query_grads_t;
    take<T>(p, p.out, batch, head, t.query, t.step, t.count, 1.0f, outs, m.padded);
    take<T>(p, p.out_grad, batch, head, t.query, t.step, t.count, 1.0f, out_grads, m.padded);
    for (int64_t l = 0; l < t.count; l++) {
      floats sums = {};
      for (int64_t d = 0; d < m.padded; d += LANES) sums += *(floats*)(outs + l * m.padded + d) * *(floats*)(out_grads + l * m.padded + d);
      *(floats*)(products + l * LANES) = sums;
    }
    for (int64_t l = 0; l < t.count; l++) {
      float total = 0;
      for (int i = 0; i < LANES; i++) total += products[l * LANES + i];
      dots[t.at(l)] = total;
    }
  }

  void add(const Tile& t, const Chunk& chunk) {
    const int64_t lane = chunk.lane, lanes = chunk.lanes, count = chunk.count, padded = m.padded;
    const float *k = keys.keys_of(t, chunk), *v = keys.values_of(t, chunk);
    multiply<false>(count, lanes, p.width, {k, padded, 1}, {queries_t + lane, TILE}, {scores + lane, TILE});
    multiply<false>(count, lanes, p.width, {v, padded, 1}, {out_grads_t + lane, TILE}, {grads + lane, TILE});
    hide(t, chunk, scores);
    for (int64_t l = lane; l < lane + lanes; l += LANES) weigh(chunk, l);
    multiply<true>(padded, lanes, count, {k, 1, padded}, {grads + lane, TILE}, {query_grads_t + lane, TILE});
    const int64_t first = (t.key + chunk.key * t.stride) * padded, row = t.stride * padded;
    const int64_t queries_here = (lane + lanes < t.count ? lane + lanes : t.count) - lane;
    multiply<true>(count, padded, queries_here, {grads + lane, TILE, 1}, {queries + lane * padded, padded}, {key_grad + first, row});
    multiply<true>(count, padded, queries_here, {scores + lane, TILE, 1}, {out_grads + lane * padded, padded}, {value_grad + first, row});
  }

  // Scores of one vector of queries become weights; the gradients of the weights become those of the natural scores.
  void weigh(const Chunk& chunk, int64_t l) {
    floats base = *(floats*)(log2_sum + l), mean = *(floats*)(dot + l);
    for (int64_t j = 0; j < chunk.count; j++) {
      floats *s = (floats*)(scores + j * TILE + l), *g = (floats*)(grads + j * TILE + l);
      *s = power_of_two(*s - base);
      *g = *s * (*g - mean);
    }
  }
};

template <class T> void forward(const Problem& p, int threads) {
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int64_t batch = 0; batch < p.batch; batch++)
    for (int64_t head = 0; head < p.heads; head++) Forward<T>(p, batch, head).run();
}

template <class T> void backward(const Problem& p, int threads) {
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int64_t batch = 0; batch < p.batch; batch++)
    for (int64_t key_head = 0; key_head < p.heads / p.shared; key_head++) Backward<T>(p, batch, key_head).run();
}

}  // namespace

API void rs_attention_forward_f32(const Problem* p, int threads) { forward<float>(*p, threads); }
API void rs_attention_forward_bf16(const Problem* p, int threads) { forward<bf16>(*p, threads); }
API void rs_attention_backward_f32(const Problem* p, int threads) { backward<float>(*p, threads); }
API void rs_attention_backward_bf16(const Problem* p, int threads) { backward<bf16>(*p, threads); }
