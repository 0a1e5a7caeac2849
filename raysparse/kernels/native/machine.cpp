// What this build is, what this CPU can run, and scratch memory.
#include "native.h"
#include <sys/mman.h>

// "avx512", "avx2" or "baseline": the name of this library's instruction set.
API const char* rs_variant() { return AVX512 ? "avx512" : LANES == 8 ? "avx2" : "baseline"; }

// The best variant that the CPU (and the system, for its registers) supports. Callable in the baseline build on any machine.
API const char* rs_best_variant() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return "avx2";
#endif
  return "baseline";
}

void* scratch(size_t bytes, int slot) {
#if defined(__SANITIZE_ADDRESS__)
  constexpr size_t page = 64;
  constexpr bool exact = true;  // new memory for each call, of this size: an access beyond it is seen
#else
  constexpr size_t page = 2u << 20;
  constexpr bool exact = false;
#endif
  struct Memory {
    void* start[8] = {};
    size_t size[8] = {};
    ~Memory() {
      for (void* p : start) free(p);
    }
  };
  static thread_local Memory memory;
  if (!memory.start[slot] || memory.size[slot] < bytes || exact) {
    free(memory.start[slot]);
    memory.size[slot] = exact ? bytes : (bytes + page - 1) / page * page;
    if (posix_memalign(&memory.start[slot], page, memory.size[slot] ? memory.size[slot] : 1)) abort();
    if (exact) memset(memory.start[slot], 0xff, bytes);  // NaNs
#if defined(MADV_HUGEPAGE)
    if (!exact) madvise(memory.start[slot], memory.size[slot], MADV_HUGEPAGE);
#endif
  }
  return memory.start[slot];
}
