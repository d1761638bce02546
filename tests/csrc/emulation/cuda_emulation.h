// CUDA C++ on the CPU: enough of it to run the kernels of csrc/include/bootgrad unchanged, one std::thread per CUDA
// thread.
//
// __syncthreads is a std::barrier of the block, a shuffle is an exchange between two barriers of the warp; a thread
// that returns leaves both. Blocks run one after the other, so __shared__ is a static variable. AddressSanitizer then
// sees every access out of bounds, UndefinedBehaviorSanitizer a misaligned 16-byte load, ThreadSanitizer a missing
// __syncthreads. Not here: tensor cores, asynchronous copies, atomics, dynamic shared memory, warps whose lanes part
// ways before a shuffle.

#pragma once

#include <barrier>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx{0, 0, 0};
inline thread_local dim3 blockIdx{0, 0, 0};

namespace emulation {

constexpr unsigned kWarpSize = 32;

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  std::barrier<> barrier;
  uint64_t slots[kWarpSize] = {};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned first = 0; first < threads; first += kWarpSize) {
      warps.push_back(std::make_unique<Warp>(threads - first < kWarpSize ? threads - first : kWarpSize));
    }
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Block* block = nullptr;

// Run kernel() on `blocks` blocks of `threads` threads, both in one dimension.
inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  for (unsigned b = 0; b < blocks; ++b) {
    Block state(threads);
    std::vector<std::thread> pool;
    for (unsigned t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] {
        threadIdx = {t, 0, 0};
        blockIdx = {b, 0, 0};
        block = &state;
        kernel();
        state.warps[t / kWarpSize]->barrier.arrive_and_drop();
        state.barrier.arrive_and_drop();
      });
    }
    for (std::thread& thread : pool) {
      thread.join();
    }
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::block->barrier.arrive_and_wait(); }

template <typename T>
T __shfl_xor_sync(unsigned /*mask*/, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  emulation::Warp& warp = *emulation::block->warps[threadIdx.x / emulation::kWarpSize];
  const unsigned lane = threadIdx.x % emulation::kWarpSize;
  std::memcpy(&warp.slots[lane], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  std::memcpy(&value, &warp.slots[lane ^ unsigned(lane_mask)], sizeof(T));
  warp.barrier.arrive_and_wait();
  return value;
}
