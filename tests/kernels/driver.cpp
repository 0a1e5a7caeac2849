// The C ABI without Python: streams of drawn masks against loops over the definition. For machines that are emulated.
// Prints how many products were right; the exit status is 1 if one was not.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

struct Stream;
extern "C" {
const char* rs_variant();
Stream* rs_stream_new(const uint8_t* packed, int64_t rows, int64_t cols, int use, int two_bytes);
void rs_stream_free(Stream* s);
int rs_stream_grain(const Stream* s);
void rs_load_f32(Stream* s, const float* weight, int threads);
void rs_load_bf16(Stream* s, const uint16_t* weight, int threads);
void rs_multiply_f32(const Stream* s, const float* x, int64_t tokens, const float* bias, float* y, int threads);
void rs_multiply_bf16(const Stream* s, const uint16_t* x, int64_t tokens, const float* bias, uint16_t* y, int threads);
void rs_gradient_f32(const Stream* s, const float* x, const float* dy, int64_t tokens, float* out, int threads);
void rs_gradient_bf16(const Stream* s, const uint16_t* x, const uint16_t* dy, int64_t tokens, uint16_t* out, int threads);
}

namespace {

uint64_t state = 1;
double uniform() {  // [0, 1), by a linear congruential generator (Knuth's MMIX)
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (double)(state >> 11) / 9007199254740992.0;
}

// Of each element type: conversion, rounding unit, functions.
struct Float {
  using Type = float;
  static constexpr double UNIT = 1.2e-7;
  static float make(double x) { return (float)x; }
  static double value(float x) { return x; }
  static constexpr auto load = rs_load_f32;
  static constexpr auto multiply = rs_multiply_f32;
  static constexpr auto gradient = rs_gradient_f32;
};
struct Half {
  using Type = uint16_t;
  static constexpr double UNIT = 1.0 / 256;
  static uint16_t make(double x) {
    float y = (float)x;
    uint32_t bits;
    memcpy(&bits, &y, 4);
    return (uint16_t)(bits >> 16);
  }
  static double value(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
  }
  static constexpr auto load = rs_load_bf16;
  static constexpr auto multiply = rs_multiply_bf16;
  static constexpr auto gradient = rs_gradient_bf16;
};

int right = 0, wrong = 0;

// found[i, j] against the sum over k of a[i, k] b[k, j], where live.
template <class E, class A, class B, class Live>
void check(const char* what, const std::vector<typename E::Type>& found, int64_t n, int64_t m, int64_t inner, A a, B b, Live live) {
  bool good = true;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < m; j++) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < inner; k++)
        if (live(i, k, j)) sum += a(i, k) * b(k, j), size += std::fabs(a(i, k) * b(k, j));
      double error = std::fabs(E::value(found[(size_t)(i * m + j)]) - sum);
      good = good && error <= E::UNIT * std::fabs(sum) + 1.2e-7 * (double)(inner + 2) * size;
    }
  (good ? right : wrong)++;
  if (!good) printf("wrong: %s, %ld x %ld over %ld\n", what, (long)n, (long)m, (long)inner);
}

template <class E> std::vector<typename E::Type> drawn(int64_t n) {
  std::vector<typename E::Type> x((size_t)n);
  for (auto& value : x) value = E::make(2 * uniform() - 1);
  return x;
}

template <class E> void run(int64_t rows, int64_t cols, int64_t tokens, double density, int64_t grain) {
  using T = typename E::Type;
  std::vector<uint8_t> mask((size_t)(rows * cols)), bits((size_t)(rows * ((cols + 7) / 8)));
  for (int64_t r = 0; r < rows; r += grain)
    for (int64_t c = 0; c < cols; c++) {
      bool on = uniform() < density;
      for (int64_t i = r; i < r + grain && i < rows; i++) {
        mask[(size_t)(i * cols + c)] = on;
        if (on) bits[(size_t)(i * ((cols + 7) / 8) + c / 8)] |= (uint8_t)(1 << c % 8);
      }
    }
  auto weight = drawn<E>(rows * cols), x = drawn<E>(tokens * cols), dy = drawn<E>(tokens * rows);
  auto at = [&](int64_t r, int64_t c) { return mask[(size_t)(r * cols + c)] ? E::value(weight[(size_t)(r * cols + c)]) : 0.0; };
  auto in_x = [&](int64_t t, int64_t c) { return E::value(x[(size_t)(t * cols + c)]); };
  auto in_dy = [&](int64_t t, int64_t r) { return E::value(dy[(size_t)(t * rows + r)]); };
  auto always = [](int64_t, int64_t, int64_t) { return true; };
  for (int use = 0; use < 3; use++) {
    Stream* stream = rs_stream_new(bits.data(), rows, cols, use, sizeof(T) == 2);
    std::vector<T> found[2];
    for (int threads = 1; threads <= 2; threads++) {
      auto& out = found[threads - 1];
      out.resize((size_t)(use == 0 ? tokens * rows : use == 1 ? tokens * cols : rows * cols));
      if (use < 2) E::load(stream, weight.data(), threads);
      if (use == 0) E::multiply(stream, x.data(), tokens, nullptr, out.data(), threads);
      if (use == 1) E::multiply(stream, dy.data(), tokens, nullptr, out.data(), threads);
      if (use == 2) E::gradient(stream, x.data(), dy.data(), tokens, out.data(), threads);
    }
    if (memcmp(found[0].data(), found[1].data(), found[0].size() * sizeof(T))) wrong++, printf("wrong: two threads, use %d\n", use);
    if (use == 0) check<E>("forward", found[0], tokens, rows, cols, in_x, [&](int64_t c, int64_t r) { return at(r, c); }, always);
    if (use == 1) check<E>("input gradient", found[0], tokens, cols, rows, in_dy, at, always);
    if (use == 2)
      check<E>("weight gradient", found[0], rows, cols, tokens, [&](int64_t r, int64_t t) { return in_dy(t, r); }, in_x,
               [&](int64_t r, int64_t, int64_t c) { return mask[(size_t)(r * cols + c)] != 0; });
    rs_stream_free(stream);
  }
}

}  // namespace

int main() {
  const int64_t sizes[][2] = {{1, 1}, {7, 5}, {64, 64}, {68, 130}, {257, 31}, {36, 389}, {260, 200}};
  const int64_t tokens[] = {1, 31, 64, 65, 130};
  const double densities[] = {0, 0.1, 0.25, 1};
  int n = 0;
  for (auto [rows, cols] : sizes)
    for (int64_t grain : {1, 2, 4})
      for (int i = 0; i < 2; i++, n++) {
        run<Float>(rows, cols, tokens[n % 5], densities[n % 4], grain);
        run<Half>(rows, cols, tokens[(n + 2) % 5], densities[(n + 1) % 4], grain);
      }
  printf("%s: %d right, %d wrong\n", rs_variant(), right, wrong);
  return wrong > 0;
}
