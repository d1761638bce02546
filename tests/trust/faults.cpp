// Faults that sanitizers must find where the library is run under them: a read past the end of a tensor, and a race.

#include <cstdint>

extern "C" {

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));

__attribute__((visibility("default"))) float past_the_end(const float* data, int64_t size) { return data[size]; }

__attribute__((visibility("default"))) int32_t overflowing(int32_t value) { return value + 1; }

static void count(void* data) {
  for (int k = 0; k < 1000; ++k) ++*static_cast<int64_t*>(data);
}

__attribute__((visibility("default"))) int64_t racing() {
  int64_t counter = 0;
  GOMP_parallel(count, &counter, 3, 0);
  return counter;
}

}  // extern "C"
