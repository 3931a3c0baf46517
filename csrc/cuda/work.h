// What a block of a group norm works on, how its threads share it, and how they add up what they found.
#pragma once

#include "tiling.h"
#include "words.h"

namespace fastdiff::cuda {
namespace {

constexpr unsigned ALL = 0xFFFFFFFFu;

__device__ __forceinline__ uint4* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ uint4 memory[];
  return memory;
#else
  return emulated_memory();
#endif
}

// Until all threads of all blocks of the cluster are here.
__device__ __forceinline__ void meet(int ranks) {
#if __CUDA_ARCH__ >= 900
  if (ranks > 1) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    return;
  }
#endif
  __syncthreads();
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ const float* of_rank(const float* place, int rank, int ranks) {
#if __CUDA_ARCH__ >= 900
  if (ranks > 1) return static_cast<const float*>(__cluster_map_shared_rank(place, unsigned(rank)));
#endif
  return place;
}

__device__ __forceinline__ float warp_sum(float x, int lanes = WARP) {
  for (int distance = lanes / 2; distance; distance /= 2) x += __shfl_xor_sync(ALL, x, distance);
  return x;
}

__device__ __forceinline__ float number(const Operand& operand, int64_t sample, int64_t channel, float otherwise) {
  return operand.data ? load_one(operand, sample * operand.sample + channel * operand.stride[0]) : otherwise;
}

// What a block works on. Channels-last, an item is a word of channels, which a thread keeps while it walks down the
// positions; contiguous, an item is a channel, along whose positions a row of threads walks.
template <typename A, bool LAST>
struct Work {
  static constexpr int COUNT = A::COUNT, CHANNELS = LAST ? COUNT : 1;
  const GroupNorm& op;
  const Tiling& tiling;
  int rank, width, groups, cells, items, item, item_step, step, step_step;
  bool busy;
  int64_t sample, channel, begin, end;  // the first channel; the block's positions

  __device__ __forceinline__ Work(const GroupNorm& op_, const Tiling& tiling_) : op(op_), tiling(tiling_) {
    const int chunks = int(op.channels) / tiling.channels;
    const unsigned cluster = blockIdx.x / unsigned(tiling.ranks);
    rank = int(blockIdx.x % unsigned(tiling.ranks));
    sample = tiling.first + cluster / unsigned(chunks), channel = int64_t(cluster % unsigned(chunks)) * tiling.channels;
    width = int(op.channels / op.groups), groups = tiling.channels / width, cells = tiling.channels >> tiling.fold;
    begin = positions_before(rank), end = positions_before(rank + 1);
    const int along = int(threadIdx.x) % tiling.across, row = int(threadIdx.x) / tiling.across;
    items = tiling.channels / CHANNELS, busy = row < tiling.down;
    item = LAST ? along : row, item_step = LAST ? tiling.across : tiling.down;
    step = LAST ? row : along, step_step = LAST ? tiling.down : tiling.across;
  }

  __device__ __forceinline__ int64_t positions_before(int r) const {
    const int64_t before = r * tiling.share;
    return before < op.positions ? before : op.positions;
  }

  // f(item, whether it is one) for the items of a thread: as often in every thread, for they meet in f.
  template <typename F>
  __device__ __forceinline__ void each_item(F f) const {
    for (int base = 0; base < items; base += item_step) f(base + item, busy && base + item < items);
  }

  // f(i, channel, group) for the channels of an item, counted from the block's first.
  template <typename F>
  __device__ __forceinline__ void each_channel(int at, F f) const {
    int c = at * CHANNELS, group = c / width, next = (group + 1) * width;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i, ++c) {
      if (c == next) ++group, next += width;
      f(i, c, group);
    }
  }

  // use(load(element of the sample, word of the tile), element, word) for the words of an item in a tile; the loads of
  // BATCH words come before the use of the first.
  template <int BATCH, typename Load, typename Use>
  __device__ __forceinline__ void walk(int at, int64_t from, int count, Load load, Use use) const {
    const int steps = LAST ? count : count / COUNT, pitch = LAST ? items : 1;
    const int64_t first = LAST ? from * op.channels + channel + at * COUNT : (channel + at) * op.positions + from;
    const int stride = LAST ? int(op.channels) : COUNT, word = LAST ? at : at * (tiling.tile / COUNT);
    for (int s = step; s < steps; s += BATCH * step_step) {
      decltype(load(first, word)) held[BATCH];
#pragma unroll
      for (int k = 0; k < BATCH; ++k) {
        const int t = s + k * step_step;
        if (t < steps) held[k] = load(first + int64_t(t) * stride, word + t * pitch);
      }
#pragma unroll
      for (int k = 0; k < BATCH; ++k) {
        const int t = s + k * step_step;
        if (t < steps) use(held[k], first + int64_t(t) * stride, word + t * pitch);
      }
    }
  }

  // Leaves a thread's sums for the channels of an item: those of a cell together, a slot for each row of threads.
  __device__ __forceinline__ void put(float* partial, int at, bool is_item, Values<CHANNELS> x) const {
    if constexpr (LAST) {
#pragma unroll
      for (int d = 1; d < CHANNELS; d *= 2) {
        if (d >> tiling.fold) break;
#pragma unroll
        for (int i = 0; i < CHANNELS; i += 2 * d) x.v[i] += x.v[i + d];
      }
      if (!is_item) return;
      float* to = partial + step * cells + (at * COUNT >> tiling.fold);
#pragma unroll
      for (int i = 0; i < CHANNELS; ++i)
        if (!(i & ((1 << tiling.fold) - 1))) to[i >> tiling.fold] = x.v[i];
    } else {
      const float sum = warp_sum(x.v[0], tiling.across < WARP ? tiling.across : WARP);
      if (is_item && step % WARP == 0) partial[step / WARP * cells + at] = sum;
    }
  }

  __device__ __forceinline__ float slots_of(const float* partial, int cell) const {
    float sum = 0.0f;
    for (int slot = 0; slot < tiling.slots; ++slot) sum += partial[slot * cells + cell];
    return sum;
  }

  // The sums of the cells, in the place of their first slots.
  __device__ __forceinline__ void join_slots(float* partial) const {
    for (int cell = int(threadIdx.x); cell < cells; cell += tiling.threads) partial[cell] = slots_of(partial, cell);
  }

  template <typename F>
  __device__ __forceinline__ void each_group_of_warp(F f) const {
    for (int group = int(threadIdx.x) / WARP; group < groups; group += tiling.threads / WARP) f(group);
  }

  __device__ __forceinline__ bool leads_warp() const { return threadIdx.x % WARP == 0; }

  // The sum of f(i) over some numbers, by a warp.
  template <typename F>
  __device__ __forceinline__ float sum_of_warp(int count, F f) const {
    float sum = 0.0f;
    for (int i = int(threadIdx.x) % WARP; i < count; i += WARP) sum += f(i);
    return warp_sum(sum);
  }

  // What the channels are multiplied by and what is added: w (1 + scale), b (1 + scale) + shift.
  __device__ __forceinline__ void read_affine(float* gain, float* offset) const {
    for (int c = int(threadIdx.x); c < tiling.channels; c += tiling.threads) {
      const float scale = 1.0f + number(op.scale, sample, channel + c, 0.0f);
      gain[c] = number(op.weight, sample, channel + c, 1.0f) * scale;
      offset[c] = fma(number(op.bias, sample, channel + c, 0.0f), scale, number(op.shift, sample, channel + c, 0.0f));
    }
  }

  template <typename F>
  __device__ __forceinline__ void each_tile(F f) const {
    for (int64_t from = begin; from < end; from += tiling.tile)
      f(from, end - from < tiling.tile ? int(end - from) : tiling.tile);
  }

  __device__ __forceinline__ bool kept() const { return end - begin <= tiling.tile; }
};

}  // namespace
}  // namespace fastdiff::cuda
