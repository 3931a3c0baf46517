// How a group norm is divided over clusters, blocks and tiles of shared memory, for what a device has.
#pragma once

#include <algorithm>
#include <climits>
#include <map>
#include <mutex>
#include <numeric>
#include <utility>

#include "device.h"

namespace fastdiff::cuda {
namespace {

constexpr int THREADS = 256, WARP = 32, MOST_RANKS = 8;

// How a call is divided, the same for every block. A word is what a thread moves at once: neighbouring elements.
struct Tiling {
  int64_t first;      // sample of the first block
  int channels;       // of a cluster: whole groups
  int ranks;          // blocks of a cluster
  int64_t share;      // positions of a block
  int tile;           // of them are in shared memory at a time
  int threads;        // a power of two
  int across, down;   // threads side by side along a row of words, and rows at a time
  int slots, fold;    // partial sums of a cell, and the channels of a cell as a power of two
  int words, bytes;   // of a tile, and of all shared memory
};

// Numbers that the two passes keep beside a tile, for each group and for each channel.
constexpr int FORWARD_GROUP = 7, FORWARD_CHANNEL = 2, BACKWARD_GROUP = 6, BACKWARD_CHANNEL = 4;

// What a device gives the blocks of a kernel.
struct Limits {
  int most, each;  // bytes of shared memory that a block can have, and should have for others to fit beside it
  int multiprocessors, ranks;
};

int limits_of(const void* kernel, bool backward, int device, Limits& limits) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Limits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find({kernel, device});
  if (at != known.end()) {
    limits = at->second;
    return cudaSuccess;
  }
  int whole = 0, clusters = 0;
  cudaFuncAttributes attributes;
  const cudaError_t errors[] = {
      cudaDeviceGetAttribute(&limits.most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      cudaDeviceGetAttribute(&whole, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
      cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
      cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device),
      cudaFuncGetAttributes(&attributes, kernel),
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.most),
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared)};
  for (const cudaError_t error : errors)
    if (error != cudaSuccess) return error;
  limits.each = std::min(limits.most, whole / (backward ? 2 : 3) - 1024);  // the system takes 1024 of each block's
  limits.ranks = clusters && attributes.ptxVersion >= 90 ? MOST_RANKS : 1;  // code made for less than 9.0 has none
  known[{kernel, device}] = limits;
  return cudaSuccess;
}

int power_of_two(int64_t least, int most) {
  int power = 1;
  while (power < least && power < most) power *= 2;
  return power;
}

// How words of `count` elements are laid out on a device.
struct Layout {
  bool last;
  int count, word, size;  // elements and bytes of a word in shared memory, bytes of an element in device memory
};

// The division into so many channels and ranks, with so many positions to a tile; 0 for all of a rank.
Tiling tiling_of(const GroupNorm& op, const Layout& layout, int channels, int ranks, int64_t tile = 0) {
  const auto whole = [&](int64_t n) { return layout.last ? n : (n + layout.count - 1) / layout.count * layout.count; };
  const bool backward = op.grad.data;
  const int width = int(op.channels / op.groups), groups = channels / width;
  Tiling t = {};
  t.channels = channels, t.ranks = ranks, t.share = whole((op.positions + ranks - 1) / ranks);
  tile = whole(std::min(tile ? tile : t.share, t.share));
  const int64_t words = tile * channels / layout.count;
  t.bytes = INT_MAX;
  if (words > INT_MAX / 64) return t;  // more than any shared memory
  t.tile = int(tile), t.words = int(words);
  t.threads = std::max(WARP, power_of_two(words, THREADS));
  if (layout.last) {
    t.across = std::min(channels / layout.count, t.threads);
    t.down = t.slots = int(std::min<int64_t>(t.threads / t.across, tile));
    for (int d = 2; !backward && d <= layout.count && width % d == 0; d *= 2) ++t.fold;
  } else {
    const int most = power_of_two(tile / layout.count, t.threads);
    t.across = std::min(most, WARP);
    while (t.across < most && int64_t(t.across) * channels < t.threads) t.across *= 2;
    t.down = t.threads / t.across, t.slots = std::max(1, t.across / WARP);
  }
  const int64_t numbers = 2 * int64_t(t.slots) * (channels >> t.fold) +
                          int64_t(channels) * (backward ? BACKWARD_CHANNEL : FORWARD_CHANNEL) +
                          int64_t(groups) * (backward ? BACKWARD_GROUP : FORWARD_GROUP);
  const int64_t bytes = words * layout.word * (backward ? 2 : 1) + numbers * int64_t(sizeof(float));
  t.bytes = int(std::min<int64_t>(bytes, INT_MAX));
  return t;
}

// Channels-last, rows are as wide as they can be, and ranks divide them; contiguous, where a group is one run already,
// ranks are as few as they can be. A tile is all of a rank, unless nothing makes that fit.
bool divide(const GroupNorm& op, const Layout& layout, const Limits& limits, Tiling& best) {
  const int64_t width = op.channels / op.groups, least = layout.last ? std::lcm<int64_t>(width, layout.count) : width;
  if (op.channels > INT_MAX / 16) return false;
  const int parts = int(op.channels / least), ranks = power_of_two(op.positions, limits.ranks);
  const auto row = [&](int part) { return op.channels / part * layout.size; };
  const auto blocks = [&](int part, int r) { return op.samples * part * r; };
  const auto fits = [&](int part, int r, int budget, int least_row) {
    if (parts % part) return false;
    if (layout.last ? part > 1 && row(part) < least_row : part < parts && blocks(part, r) < 2 * limits.multiprocessors)
      return false;
    best = tiling_of(op, layout, int(op.channels / part), r);
    return best.bytes <= budget;
  };
  const auto any_fits = [&](int budget, int least_row) {
    if (layout.last)
      for (int part = 1; part <= parts; ++part)
        for (int r = 1; r <= ranks; r *= 2)
          if (fits(part, r, budget, least_row)) return true;
    if (!layout.last)
      for (int r = 1; r <= ranks; r *= 2)
        for (int part = 1; part <= parts; ++part)
          if (fits(part, r, budget, least_row)) return true;
    return false;
  };
  for (const int least_row : {64, 32})
    for (const int budget : {limits.each, limits.most}) {
      if (!any_fits(budget, least_row)) continue;
      // Few and large blocks leave multiprocessors without work.
      while (2 * best.ranks <= ranks && best.words * layout.word > 8192 &&
             blocks(int(op.channels / best.channels), best.ranks) < limits.multiprocessors)
        best = tiling_of(op, layout, best.channels, 2 * best.ranks);
      return true;
    }
  int part = layout.last ? parts : 1;
  while (layout.last && part > 1 && (parts % part || row(part) < 128)) --part;
  for (const int p : {layout.last ? part : parts, parts})
    for (const int budget : {limits.each, limits.most}) {
      best = tiling_of(op, layout, int(op.channels / p), ranks);
      for (int64_t tile = best.share / 2; best.bytes > budget && tile > 0; tile /= 2)
        best = tiling_of(op, layout, best.channels, ranks, tile);
      if (best.bytes <= budget) return true;
    }
  return false;
}

}  // namespace
}  // namespace fastdiff::cuda
