// CUDA C++ on the CPU: enough of it to run the kernels of csrc/include/bootgrad unchanged, one std::thread per CUDA
// thread.
//
// __syncthreads is a std::barrier of the block, a shuffle is an exchange between two barriers of the warp; a thread
// that returns leaves both. Blocks run one after the other, so __shared__ is a static variable; dynamic shared memory
// is fresh for every block, of the size asked for, and full of NaN. AddressSanitizer then sees every access out of
// bounds, UndefinedBehaviorSanitizer a misaligned 16-byte load, ThreadSanitizer a missing __syncthreads, and a read of
// what was never written spoils the result. Tensor cores are in cuda_mma.h. Not here: asynchronous copies, atomics,
// warps whose lanes part ways before a shuffle.

#pragma once

#include <barrier>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
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
  uint32_t fragments[kWarpSize][6] = {};  // of a matrix product: 4 registers of A, 2 of B
};

struct Block {
  Block(unsigned threads, size_t bytes) : barrier(threads), memory(new (std::align_val_t(16)) unsigned char[bytes]) {
    std::memset(memory.get(), 0xff, bytes);
    for (unsigned first = 0; first < threads; first += kWarpSize) {
      warps.push_back(std::make_unique<Warp>(threads - first < kWarpSize ? threads - first : kWarpSize));
    }
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;

  struct Delete {
    void operator()(unsigned char* bytes) const { operator delete[](bytes, std::align_val_t(16)); }
  };
  std::unique_ptr<unsigned char[], Delete> memory;
};

inline thread_local Block* block = nullptr;

// Run kernel() on `blocks` blocks of `threads` threads, both in one dimension, with `bytes` of dynamic shared memory.
inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel, size_t bytes = 0) {
  for (unsigned b = 0; b < blocks; ++b) {
    Block state(threads, bytes);
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

inline Warp& warp() { return *block->warps[threadIdx.x / kWarpSize]; }

}  // namespace emulation

namespace bootgrad {
inline void* dynamic_shared_memory() { return emulation::block->memory.get(); }
}  // namespace bootgrad

inline void __syncthreads() { emulation::block->barrier.arrive_and_wait(); }

template <typename T>
T __shfl_xor_sync(unsigned /*mask*/, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  emulation::Warp& warp = emulation::warp();
  const unsigned lane = threadIdx.x % emulation::kWarpSize;
  std::memcpy(&warp.slots[lane], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  std::memcpy(&value, &warp.slots[lane ^ unsigned(lane_mask)], sizeof(T));
  warp.barrier.arrive_and_wait();
  return value;
}
