// A CUDA device on the host, as far as the kernels of csrc/cuda/norm.cu need one: every thread of a cluster is a fiber
// that runs until it waits for others. Shared memory is NaN before a block starts and as soon as it has ended, a block
// runs as far as it comes before another does, and fibers go on in either order: a barrier that is missing shows
// in one of the orders. A wait that nobody ends is reported, and so are a write beyond shared memory and a launch that a
// device would refuse.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __CUDA_ARCH__ 900
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }

// ---- the device -----------------------------------------------------------------------------

namespace emulated {

// What the device has; order: 1 runs the fibers from the first to the last, -1 from the last to the first, 0 none.
struct Device {
  int most = 232448, whole = 233472, multiprocessors = 132, clusters = 1, compiled = 90, order = 1;
};
struct Launched {
  int64_t blocks = 0;
  int launches = 0, ranks = 0, threads = 0, bytes = 0, channels = 0, tiles = 0;
  const char* problem = "";
};
inline Device device;
inline Launched launched;

// Whoever waits goes on when all have come.
struct Barrier {
  int size = 0, here = 0;
  int64_t times = 0;
};

constexpr size_t FENCE = 1024;  // bytes behind a block's shared memory, which nobody may write

struct Block {
  std::vector<uint4> memory;
  size_t bytes = 0;
  unsigned left = 0;  // fibers that have not ended
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<float> lanes;
};

struct Fiber {
  ucontext_t context;  // of its start; from then on it is left and entered by jumps, which ask nothing of the system
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  unsigned thread = 0, block = 0;
  int rank = 0;
  bool started = false, done = false;
  const Barrier* waits = nullptr;
  int64_t until = 0;
};

inline std::vector<Block> blocks;
inline Barrier cluster;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* current = nullptr;
inline ucontext_t start;
inline jmp_buf scheduler;
inline std::function<void()> body;

inline void leave() {
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  swapcontext(&start, &fiber.context);
}

inline void wait(Barrier& barrier) {
  const int64_t now = barrier.times;
  if (++barrier.here == barrier.size) {
    barrier.here = 0, ++barrier.times;
    return;
  }
  current->waits = &barrier, current->until = now + 1;
  leave();
}

inline void forget(Block& block) { std::memset(block.memory.data(), 0xFF, block.bytes); }

inline bool fenced(const Block& block) {
  const char* behind = reinterpret_cast<const char*>(block.memory.data()) + block.bytes;
  for (size_t i = 0; i < FENCE; ++i)
    if (behind[i] != 0x55) return false;
  return true;
}

inline void enter() {
  body();
  current->done = true;
  Block& block = blocks[size_t(current->rank)];
  if (!--block.left) forget(block);
  leave();
}

// Runs all fibers to their ends, each block as far as it comes before the next; false where all that are left wait for
// each other.
inline bool run(int ranks, size_t threads) {
  const auto in_order = [](size_t i, size_t count) { return device.order > 0 ? i : count - 1 - i; };
  const auto pass = [&](size_t rank) {
    bool moved = false;
    for (size_t i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers[rank * threads + in_order(i, threads)];
      if (fiber.done || (fiber.waits && fiber.waits->times < fiber.until)) continue;
      moved = true, fiber.waits = nullptr;
      resume(fiber);
    }
    return moved;
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = 0; i < size_t(ranks); ++i)
      while (pass(in_order(i, size_t(ranks)))) moved = true;
  }
  for (size_t i = 0; i < size_t(ranks) * threads; ++i)
    if (!fibers[i]->done) return false;
  return true;
}

inline const char* run_cluster(unsigned first, int ranks, unsigned threads, size_t bytes) {
  constexpr size_t STACK = 64 * 1024;
  const size_t count = size_t(ranks) * threads;
  blocks.assign(size_t(ranks), Block());
  cluster = {int(count)};
  while (fibers.size() < count) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack.reset(new char[STACK]);
  }
  for (int rank = 0; rank < ranks; ++rank) {
    Block& block = blocks[size_t(rank)];
    block.bytes = bytes, block.memory.resize((bytes + FENCE) / sizeof(uint4) + 1);
    std::memset(block.memory.data(), 0x55, bytes + FENCE);
    forget(block);
    block.left = threads, block.barrier.size = int(threads), block.lanes.resize(threads);
    block.warps.assign(threads / 32, Barrier{32});
    for (unsigned thread = 0; thread < threads; ++thread) {
      Fiber& fiber = *fibers[size_t(rank) * threads + thread];
      fiber.thread = thread, fiber.block = first + unsigned(rank), fiber.rank = rank;
      fiber.started = fiber.done = false, fiber.waits = nullptr;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = STACK;
      makecontext(&fiber.context, enter, 0);
    }
  }
  if (!run(ranks, threads)) return "threads wait for ever";
  for (const Block& block : blocks)
    if (!fenced(block)) return "a write beyond shared memory";
  return "";
}

inline Block& block() { return blocks[size_t(current->rank)]; }

struct Thread {
  struct X {
    unsigned Fiber::*field;
    operator unsigned() const { return current->*field; }
  } x;
};

}  // namespace emulated

inline const emulated::Thread threadIdx{{&emulated::Fiber::thread}}, blockIdx{{&emulated::Fiber::block}};

inline uint4* emulated_memory() { return emulated::block().memory.data(); }
inline void __syncthreads() { emulated::wait(emulated::block().barrier); }
inline void __cluster_barrier_arrive() {}
inline void __cluster_barrier_wait() { emulated::wait(emulated::cluster); }

inline void* __cluster_map_shared_rank(const void* place, unsigned rank) {
  char* there = reinterpret_cast<char*>(emulated::blocks[rank].memory.data());
  return there + (static_cast<const char*>(place) - reinterpret_cast<char*>(emulated_memory()));
}

inline float __shfl_xor_sync(unsigned, float x, int distance) {
  emulated::Block& block = emulated::block();
  const unsigned thread = threadIdx.x;
  block.lanes[thread] = x;
  emulated::wait(block.warps[thread / 32]);
  const float other = block.lanes[thread ^ unsigned(distance)];
  emulated::wait(block.warps[thread / 32]);
  return other;
}

// ---- the runtime ----------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrClusterLaunch
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum { cudaSharedmemCarveoutMaxShared = 100, cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = void*;
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulated::Device& d = emulated::device;
  const int values[] = {d.most, d.whole, d.multiprocessors, d.clusters};
  return *value = values[attribute], cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return attributes->ptxVersion = emulated::device.compiled, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() {
  return *emulated::launched.problem ? cudaErrorInvalidConfiguration : cudaSuccess;
}

// `more` is how a call is divided.
template <typename Op, typename More>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Op, More), const Op& op,
                               const More& more) {
  emulated::Launched& told = emulated::launched;
  const int ranks = config->numAttrs ? int(config->attrs->val.clusterDim.x) : 1;
  const unsigned threads = config->blockDim.x;
  ++told.launches, told.blocks += config->gridDim.x, told.ranks = ranks, told.threads = int(threads);
  told.bytes = int(config->dynamicSmemBytes);
  told.channels = more.channels, told.tiles = int((more.share + more.tile - 1) / more.tile);
  const bool refused = ranks > (emulated::device.clusters ? 8 : 1) || config->gridDim.x % unsigned(ranks) || !threads ||
                       threads > 1024 || threads % 32 || told.bytes > emulated::device.most || !config->gridDim.x;
  if (refused) told.problem = "no device takes this launch";
  if (emulated::device.order == 0) return cudaGetLastError();
  emulated::body = [&] { kernel(op, more); };
  for (unsigned first = 0; first < config->gridDim.x && !*told.problem; first += unsigned(ranks))
    told.problem = emulated::run_cluster(first, ranks, threads, config->dynamicSmemBytes);
  return cudaGetLastError();
}
