// What the checks of the CPU kernels share: memory at its exact size, threads, numbers at random, and comparisons.
//
// Inputs and outputs are allocated at their exact sizes, and scratch memory anew for every call, full of NaNs and with
// gaps between its pieces: an access out of bounds stops the program, and a read of what was never written shows in a
// result. Each call is made on one thread and on three; the results must be the same bits.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "bootgrad/layer.hpp"
#include "bootgrad/plan.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define BOOTGRAD_GAP 64
namespace bootgrad::tested {
inline void forbid(uintptr_t begin, size_t bytes) {
  __asan_poison_memory_region(reinterpret_cast<void*>(begin), bytes);
}
}  // namespace bootgrad::tested
#define ALLOW(p, bytes) __asan_unpoison_memory_region(p, bytes)
#else
#define ALLOW(p, bytes)
#endif

#define BOOTGRAD_ISA tested
#include "bootgrad/kernels.hpp"

using namespace bootgrad;

namespace {

int64_t n_threads = 1;
int failures = 0;

struct Piece {
  void* memory = nullptr;
  size_t bytes = 0;

  void free() {
    ALLOW(memory, bytes);
    std::free(memory);
  }
};

void* scratch(int slot, size_t bytes) {
  struct Slots {
    std::map<int, Piece> pieces;
    ~Slots() {
      for (auto& entry : pieces) entry.second.free();
    }
  };
  thread_local Slots slots;
  Piece& piece = slots.pieces[slot];
  piece.free();
  piece.bytes = (bytes + 63) / 64 * 64 + 64;
  piece.memory = std::aligned_alloc(64, piece.bytes);
  std::memset(piece.memory, 0xff, piece.bytes);
  return piece.memory;
}

void parallel(int64_t threads, void (*work)(void*), void* ctx) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, ctx);
  work(ctx);
  for (auto& thread : others) thread.join();
}

const Runtime runtime{parallel, [] { return n_threads; }, scratch};

uint64_t state = 1;
double uniform() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 11) / 4503599627370496.0 - 1.0;
}

template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr DType dtype = DType::f32;
  static constexpr double sums = 2e-6, elements = 2e-6;
};
template <>
struct Format<double> {
  static constexpr DType dtype = DType::f64;
  static constexpr double sums = 1e-13, elements = 1e-13;
};
template <>
struct Format<bf16> {
  static constexpr DType dtype = DType::bf16;
  static constexpr double sums = 2e-6, elements = 4e-3;  // 2^-8: results in the inputs' type are rounded to it
};
template <>
struct Format<f16> {
  static constexpr DType dtype = DType::f16;
  static constexpr double sums = 2e-6, elements = 5e-4;  // 2^-11
};

using Doubles = std::vector<double>;

template <class T>
double value(T v) {
  return static_cast<double>(tested::widen(v));
}

template <class T>
std::vector<T> draw(int64_t count) {
  std::vector<T> out(static_cast<size_t>(count));
  for (T& v : out) {
    const double u = uniform();
    if constexpr (sizeof(T) == 8)
      v = u;
    else
      tested::narrow(static_cast<float>(u), v);
  }
  return out;
}

template <class T>
void compare(const char* what, const std::vector<T>& got, const Doubles& expected, double tolerance, double scale = 0) {
  for (double e : expected) scale = std::fabs(e) > scale ? std::fabs(e) : scale;
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(std::fabs(value(got[i]) - expected[i]) <= tolerance * scale)) {
      std::printf("%s[%zu]: got %.9g, expected %.9g\n", what, i, value(got[i]), expected[i]);
      ++failures;
      return;
    }
}

}  // namespace
