// Tiles: a part of a sample is fetched into float32 (where it is not flat float32 already), computed in simple loops
// over the tile, which stays in the first-level cache, and stored. Threads share the tiles.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "../number.h"
#include "kernels.h"
#include "lanes.h"

namespace fastdiff {
namespace {

constexpr int64_t TILE = 1024;            // elements of a tile at most, a multiple of four
constexpr int64_t LONG = 32768;           // or so many where no buffer is needed
constexpr int64_t WORTH_A_THREAD = 8192;  // elements below which another thread costs more than it brings

struct alignas(64) Buffer {
  float v[TILE];
};

struct Tile {
  int64_t sample, begin, count;
  bool down;  // elements are walked from the last to the first
};

// Calls f(run offset in the operand, position in the tile, length of the run) for runs along the last dimension.
template <typename F>
inline void walk(const Space& space, const Operand& operand, const Tile& tile, F f) {
  int64_t at[MAX_DIMS], offset = tile.sample * operand.sample, rest = tile.begin;
  for (int d = space.dims - 1; d >= 0; --d) {
    at[d] = rest % space.size[d], rest /= space.size[d];
    offset += at[d] * operand.stride[d];
  }
  const int last = space.dims - 1;
  for (int64_t done = 0; done < tile.count;) {
    const int64_t run = std::min(space.size[last] - at[last], tile.count - done);
    f(offset, done, run);
    done += run, at[last] += run, offset += run * operand.stride[last];
    for (int d = last; d > 0 && at[d] == space.size[d]; --d) {
      offset += operand.stride[d - 1] - at[d] * operand.stride[d];
      at[d] = 0, ++at[d - 1];
    }
  }
}

template <typename T, typename F>
inline void gather(const Space& space, const Operand& operand, const Tile& tile, float* to, F convert) {
  const int64_t stride = operand.stride[space.dims - 1];
  walk(space, operand, tile, [&](int64_t offset, int64_t position, int64_t run) {
    const T* from = reinterpret_cast<const T*>(operand.data) + offset;
    float* out = to + position;
    if (stride == 1) {
      for (int64_t i = 0; i < run; ++i) out[i] = convert(from[i]);
    } else {
      for (int64_t i = 0; i < run; ++i) out[i] = convert(from[i * stride]);
    }
  });
}

template <typename T, typename F>
inline void scatter(const Space& space, const Operand& operand, const Tile& tile, const float* from, F convert) {
  const int64_t stride = operand.stride[space.dims - 1];
  walk(space, operand, tile, [&](int64_t offset, int64_t position, int64_t run) {
    T* to = reinterpret_cast<T*>(operand.data) + offset;
    const float* in = from + position;
    if (stride == 1) {
      for (int64_t i = 0; i < run; ++i) to[i] = convert(in[i]);
    } else {
      for (int64_t i = 0; i < run; ++i) to[i * stride] = convert(in[i]);
    }
  });
}

inline float* flat(const Operand& operand, const Tile& tile) {
  return reinterpret_cast<float*>(operand.data) + tile.sample * operand.sample + tile.begin;
}

// The tile of an operand as float32: where it lies, or brought into the buffer.
inline const float* fetch(const Space& space, const Operand& operand, const Tile& tile, Buffer& buffer) {
  if (operand.flat) return flat(operand, tile);
  float* to = buffer.v;
  switch (operand.type) {
    case Type::f32: gather<float>(space, operand, tile, to, [](float x) { return x; }); break;
    case Type::f64: gather<double>(space, operand, tile, to, [](double x) { return float(x); }); break;
    case Type::bf16: gather<uint16_t>(space, operand, tile, to, [](uint16_t x) { return from_bf16(x); }); break;
    case Type::f16: gather<uint16_t>(space, operand, tile, to, [](uint16_t x) { return from_f16(x); }); break;
  }
  return to;
}

// Past the caches: a line that is written whole need not be read first.
inline void stream(float* to, const float* from, int64_t n) {
  constexpr int64_t WIDTH = sizeof(Lanes) / sizeof(float);
  int64_t i = 0;
  for (const bool aligned = reinterpret_cast<uintptr_t>(to) % sizeof(Lanes) == 0; aligned && i + WIDTH <= n; i += WIDTH) {
    Lanes line;
    memcpy(&line, from + i, sizeof line);
    store_past_cache(to + i, line);
  }
  std::copy(from + i, from + n, to + i);
}

// Where a result is computed: in its own memory if that is flat, past the caches where they are too small; else in a
// buffer, from which `store` takes it.
struct Sink {
  float* to;
  bool past;
};

inline Sink sink(const Space& space, const Operand& operand, const Tile& tile, Buffer& buffer, bool aside = false) {
  if (aside || !operand.data || !operand.flat) return {buffer.v, false};
  return {flat(operand, tile), space.streamed};
}

inline void store(const Space& space, const Operand& operand, const Tile& tile, const float* from) {
  if (!operand.data) return;
  if (operand.flat) {
    float* to = flat(operand, tile);
    if (to == from) return;
    if (space.streamed) return stream(to, from, tile.count);
    std::copy(from, from + tile.count, to);
    return;
  }
  switch (operand.type) {
    case Type::f32: scatter<float>(space, operand, tile, from, [](float x) { return x; }); break;
    case Type::f64: scatter<double>(space, operand, tile, from, [](float x) { return double(x); }); break;
    case Type::bf16: scatter<uint16_t>(space, operand, tile, from, [](float x) { return to_bf16(x); }); break;
    case Type::f16: scatter<uint16_t>(space, operand, tile, from, [](float x) { return to_f16(x); }); break;
  }
}

#define FOR(i, n) _Pragma("GCC ivdep") for (int64_t i = 0; i < (n); ++i)

inline bool all_flat(std::initializer_list<const Operand*> operands) {
  return std::all_of(operands.begin(), operands.end(), [](const Operand* each) { return !each->data || each->flat; });
}

// Whether a store is soon followed by loads that agree with it in the last twelve bits of their address, for which the
// processor makes them wait. Tensors that were allocated one after the other lie so; a walk from the last element to
// the first has those loads behind it.
inline bool in_the_way(const Space& space, std::initializer_list<const Operand*> results,
                       std::initializer_list<const Operand*> sources) {
  bool any = false;
  for (const Operand* to : results)
    for (const Operand* from : sources) {
      const int64_t ahead = (to->data - from->data) & 4095;
      any = any || (to->data && from->data && to->flat && from->flat && ahead > 0 && ahead < 2048);
    }
  return any && !space.streamed;
}

constexpr int64_t LINES = 64;  // elements made aside before they are written: a few cache lines

template <int N, typename F>
inline __attribute__((always_inline)) void emit_lines(int64_t begin, int64_t n, const Sink* sinks, const F& f) {
  alignas(64) float made[N][LINES];
  FOR(i, n) f(begin + i, [&](int k, float value) { made[k][i] = value; });
  for (int k = 0; k < N; ++k) {
    if (sinks[k].past) {
      stream(sinks[k].to + begin, made[k], n);
    } else {
      memcpy(sinks[k].to + begin, made[k], size_t(n) * sizeof(float));
    }
  }
}

// Runs f(i, put) for every element of a tile; put(k, value) gives sink k its value. A few lines at a time are made
// aside where results go past the caches, so that reading goes on meanwhile, and on the way down.
template <int N, typename F>
inline __attribute__((always_inline)) void emit(const Tile& tile, const Sink* sinks, const F& f) {
  const int64_t n = tile.count;
  bool past = false;
  for (int k = 0; k < N; ++k) past = past || sinks[k].past;
  const int64_t whole = n / LINES * LINES;
  if (past) {
    for (int64_t begin = 0; begin < whole; begin += LINES) emit_lines<N>(begin, LINES, sinks, f);
    emit_lines<N>(whole, n - whole, sinks, f);
  } else if (tile.down) {
    emit_lines<N>(whole, n - whole, sinks, f);
    for (int64_t begin = whole - LINES; begin >= 0; begin -= LINES) emit_lines<N>(begin, LINES, sinks, f);
  } else {
    float* to[N];
    for (int k = 0; k < N; ++k) to[k] = sinks[k].to;
    FOR(i, n) f(i, [&](int k, float value) { to[k][i] = value; });
  }
}

// The noise of a tile. Quads run along a row-major sample; a walk in another order takes its normals one run of
// four at a time and keeps those it needs.
inline const float* noise_of(const Space& space, const Noise& noise, const Tile& tile, Buffer& buffer) {
  if (!noise.drawn) return fetch(space, noise.given, tile, buffer);
  if (noise.together) {
    (noise.together > 2 ? draw_together<2> : draw_together<1>)(buffer.v, noise, tile.begin, tile.count);
    return buffer.v;
  }
  const Counter at = counter(noise, tile.sample);
  if (noise.element.flat) {
    const int64_t first = tile.begin / 4, quads = (tile.begin + tile.count + 3) / 4 - first;
    draw(buffer.v, uint32_t(first), quads, at);
    return buffer.v;
  }
  // Channels last: the channels are the last dimension, and along the positions before them elements are
  // consecutive. Each channel's run of positions is drawn on its own.
  const int last = space.dims - 1;
  const int64_t channels = space.size[last], plane = noise.element.stride[last];
  const int64_t from = tile.begin / channels, to = (tile.begin + tile.count - 1) / channels + 1;
  float run[TILE + 8];
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t element = c * plane + from, first = element / 4, quads = (c * plane + to + 3) / 4 - first;
    draw(run, uint32_t(first), quads, at);
    for (int64_t p = from; p < to; ++p) {
      const int64_t position = p * channels + c - tile.begin;
      if (position >= 0 && position < tile.count) buffer.v[position] = run[c * plane + p - 4 * first];
    }
  }
  return buffer.v;
}

// The elements of a tile: few where buffers hold them, else many, in equal parts for all threads.
inline int64_t length_of_tiles(const Space& space, int team, bool direct) {
  if (!direct) return TILE;
  const int64_t sharers = space.samples == 1 ? team : 1, whole = sharers * LONG;
  const int64_t tiles = sharers * std::max<int64_t>(1, (space.elements + whole - 1) / whole);
  return std::max(LINES, ((space.elements + tiles - 1) / tiles + LINES - 1) / LINES * LINES);
}

// Runs f(tile) for every tile of every sample. `direct`: it needs no buffer, for all operands are flat.
template <typename F>
inline void for_tiles(const Space& space, int threads, bool down, bool direct, F f) {
  const int64_t worth = space.samples * space.elements / WORTH_A_THREAD;
  const int team = int(std::max<int64_t>(1, std::min<int64_t>(threads, worth)));
  const int64_t length = length_of_tiles(space, team, direct);
  const int64_t tiles = (space.elements + length - 1) / length, total = space.samples * tiles;
  const int64_t share = (total + team - 1) / team;
  // The first thread has the first tiles whichever way it walks, as in PyTorch: they may still be in its cache.
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (int64_t member = 0; member < team; ++member) {
    const int64_t first = member * share, last = std::min(first + share, total);
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = down ? first + last - 1 - i : i, begin = at % tiles * length;
      f(Tile{at / tiles, begin, std::min(length, space.elements - begin), down});
    }
    if (space.streamed) wait_for_stores();
  }
}

}  // namespace
}  // namespace fastdiff
