// The ops on the CPU, in passes over tiles.
#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "norm.h"
#include "tiles.h"

namespace fastdiff {
namespace {

void normal(const Normal& op, int threads) {
  for_tiles(op.space, threads, false, false, [&](const Tile& tile) {
    Buffer buffer;
    const bool whole = op.result.flat && op.noise.element.flat && !op.noise.together && tile.count % 4 == 0 &&
                       !op.space.streamed;
    if (whole) {
      draw(flat(op.result, tile), uint32_t(tile.begin / 4), tile.count / 4, counter(op.noise, tile.sample));
    } else {
      store(op.space, op.result, tile, noise_of(op.space, op.noise, tile, buffer));
    }
  });
}

void add_noise(const AddNoise& op, int threads) {
  const bool down = in_the_way(op.space, {&op.result}, {&op.x0, &op.noise.given});
  const bool direct = !op.noise.drawn && all_flat({&op.result, &op.x0, &op.noise.given});
  for_tiles(op.space, threads, down, direct, [&](const Tile& tile) {
    Buffer bx, bz, by;
    const float alpha = of_sample(op.alpha, tile.sample), sigma = of_sample(op.sigma, tile.sample);
    const float* x0 = fetch(op.space, op.x0, tile, bx);
    const float* z = noise_of(op.space, op.noise, tile, bz);
    const Sink y = sink(op.space, op.result, tile, by);
    emit<1>(tile, &y, [=](int64_t i, auto put) { put(0, alpha * x0[i] + sigma * z[i]); });
    store(op.space, op.result, tile, y.to);
  });
}

void guide(const Guide& op, int threads) {
  const bool down = in_the_way(op.space, {&op.result}, {&op.cond, &op.uncond});
  const bool direct = all_flat({&op.result, &op.cond, &op.uncond});
  for_tiles(op.space, threads, down, direct, [&](const Tile& tile) {
    Buffer bc, bu, by;
    const float scale = of_sample(op.scale, tile.sample);
    const float* cond = fetch(op.space, op.cond, tile, bc);
    const float* uncond = fetch(op.space, op.uncond, tile, bu);
    const Sink y = sink(op.space, op.result, tile, by);
    emit<1>(tile, &y, [=](int64_t i, auto put) { put(0, uncond[i] + scale * (cond[i] - uncond[i])); });
    store(op.space, op.result, tile, y.to);
  });
}

inline float clamp(float x, float bound) { return x < -bound ? -bound : x > bound ? bound : x; }

// What one pass over a tile reads; all but x and output may be absent.
struct Sources {
  const float *x, *output, *uncond, *history, *noise;
};

// What one pass over a tile has, beside x, the output and x': as bits, so that they choose among its forms.
enum Part : unsigned { UNCOND = 1, HISTORY = 2, NOISE = 4, X0 = 8, PUSH = 16, ALL = 31 };

// Guidance, conversion, clamp and update in one pass, to x', x0 and the push. Everything of an element is read before
// anything is written: results may lie over arguments.
template <unsigned PARTS>
void combine(const Row& r, const Tile& tile, const Sources& s, const Sink& next_to, const Sink& x0_to,
             const Sink& push_to) {
  const float *x = s.x, *output = s.output, *uncond = s.uncond, *history = s.history, *noise = s.noise;
  const float w = r.w, p = r.p, q = r.q, clip = r.clip, a = r.a, b = r.b, c = r.c[0], std = r.s, u = r.u, v = r.v;
  constexpr bool has_x0 = PARTS & X0, has_push = PARTS & PUSH;
  const Sink to[3] = {next_to, has_x0 ? x0_to : push_to, push_to};
  emit<1 + has_x0 + has_push>(tile, to, [=](int64_t i, auto put) {
    const float state = x[i];
    float prediction = output[i];
    if (PARTS & UNCOND) prediction = uncond[i] + w * (prediction - uncond[i]);
    const float x0 = clamp(p * state + q * prediction, clip);
    float next = a * state + b * x0;
    if (PARTS & HISTORY) next = next + c * history[i];
    if (PARTS & NOISE) next = next + std * noise[i];
    put(0, next);
    if (has_x0) put(1, x0);
    if (has_push) put(1 + has_x0, u * state + v * x0);
  });
}

using Combine = void (*)(const Row&, const Tile&, const Sources&, const Sink&, const Sink&, const Sink&);

template <unsigned... PARTS>
constexpr std::array<Combine, sizeof...(PARTS)> forms(std::integer_sequence<unsigned, PARTS...>) {
  return {combine<PARTS>...};
}

constexpr auto COMBINE = forms(std::make_integer_sequence<unsigned, ALL + 1>());

// next += std z, std per element where the variance is learned.
inline void add_noise_to(float* next, const AffineStep& op, const Row& r, const Tile& tile, const float* z, Buffer& bv) {
  if (!op.fraction.data) {
    FOR(i, tile.count) next[i] += r.s * z[i];
    return;
  }
  const float* v = fetch(op.space, op.fraction, tile, bv);
  FOR(i, tile.count) {
    const float f = (1.0f + v[i]) / 2.0f;
    next[i] += r.s * exponential((f * r.hi + (1.0f - f) * r.lo) / 2.0f) * z[i];
  }
}

// The anchor's share of x'; the next anchor is left in the buffer.
inline void add_anchor_to(float* next, const AffineStep& op, const Row& r, const Tile& tile, const float* x,
                          const float* x0, Buffer& buffer) {
  const float* anchor = fetch(op.space, op.anchor, tile, buffer);
  FOR(i, tile.count) next[i] += r.e * anchor[i];
  FOR(i, tile.count) buffer.v[i] = r.k * anchor[i] + r.m * x[i] + r.n * x0[i];
}

// Whether something comes between the first pass over a tile and the noise, or gives it its size.
inline bool noise_is_late(const AffineStep& op) { return op.history[1].data || op.anchor.data || op.fraction.data; }

void affine_tile(const AffineStep& op, const Tile& tile) {
  const Space& space = op.space;
  const int64_t n = tile.count, row = of_sample(op.row, tile.sample);
  if (row < 0 || row >= op.rows) return;
  const Row& r = *reinterpret_cast<const Row*>(op.table + row * LETTERS);
  Buffer bx, bo, bu, bh, bz, ba, bx0, bnext, bpush;
  const bool anchored = op.anchor.data, late = noise_is_late(op), more = late || op.input.data;  // after the first pass
  Sources from = {fetch(space, op.x, tile, bx), fetch(space, op.output, tile, bo),
                  op.uncond.data ? fetch(space, op.uncond, tile, bu) : nullptr,
                  op.history[0].data ? fetch(space, op.history[0], tile, bh) : nullptr, nullptr};
  const float* z = op.noise.drawn || op.noise.given.data ? noise_of(space, op.noise, tile, bz) : nullptr;
  if (!late) from.noise = z;
  // Results are made aside where more is added to them, or read that they may lie over.
  const Sink next_to = sink(space, op.next, tile, bnext, more), x0_to = sink(space, op.x0, tile, bx0, anchored),
             push_to = sink(space, op.push, tile, bpush, more);
  float *next = next_to.to, *x0 = x0_to.to;
  const unsigned parts = (from.uncond ? UNCOND : 0u) | (from.history ? HISTORY : 0u) | (from.noise ? NOISE : 0u) |
                         (op.x0.data || anchored ? X0 : 0u) | (op.push.data ? PUSH : 0u);
  COMBINE[parts](r, tile, from, next_to, x0_to, push_to);
  for (int j = 1; j < 3 && op.history[j].data; ++j) {
    const float* h = fetch(space, op.history[j], tile, bh);
    FOR(i, n) next[i] += r.c[j] * h[i];
  }
  if (anchored) add_anchor_to(next, op, r, tile, from.x, x0, ba);
  if (late && z) add_noise_to(next, op, r, tile, z, bo);
  store(space, op.next, tile, next);
  store(space, op.x0, tile, x0);
  store(space, op.push, tile, push_to.to);
  if (anchored) store(space, op.next_anchor, tile, ba.v);
  if (op.input.data) {
    const float c_in = op.table[std::min(row + 1, op.rows - 1) * LETTERS];
    FOR(i, n) bh.v[i] = c_in * next[i];
    store(space, op.input, tile, bh.v);
  }
}

void affine_step(const AffineStep& op, int threads) {
  const bool down = in_the_way(op.space, {&op.next, &op.x0, &op.push}, {&op.x, &op.output, &op.uncond, op.history});
  const bool direct = !op.noise.drawn && !noise_is_late(op) && !op.input.data &&
                      all_flat({&op.x, &op.output, &op.uncond, op.history, &op.noise.given, &op.next, &op.x0, &op.push});
  for_tiles(op.space, threads, down, direct, [&](const Tile& tile) { affine_tile(op, tile); });
}

// What the loss reads of a tile.
struct LossTile {
  Buffer bo, bx, bz, bv;
  const float *output, *x0, *z, *v = nullptr;
  float f, g;
  Bound k = {};

  LossTile(const DiffusionLoss& op, const Tile& tile)
      : output(fetch(op.space, op.output, tile, bo)),
        x0(fetch(op.space, op.x0, tile, bx)),
        z(noise_of(op.space, op.noise, tile, bz)),
        f(of_sample(op.f, tile.sample)),
        g(of_sample(op.g, tile.sample)) {
    if (!op.bound) return;
    v = fetch(op.space, op.fraction, tile, bv);
    k = op.bound[tile.sample];
  }

  Divergence divergence(int64_t i) const {
    const float miss = x0[i] - (k.p * (k.alpha * x0[i] + k.sigma * z[i]) + k.q * output[i]);
    return fastdiff::divergence(v[i], k.lo, k.hi, k.b, miss);
  }
};

// Sixteen sums side by side, in float64, whatever the width of the machine, then one: the same bits at every level.
template <typename F>
inline double sum(int64_t n, F value) {
  constexpr int64_t LANES = 16;
  alignas(64) double sums[LANES] = {};
  const int64_t whole = n / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) FOR(j, LANES) sums[j] += double(value(i + j));
  double total = 0;
  for (int64_t j = 0; j < LANES; ++j) total += sums[j];
  for (int64_t i = whole; i < n; ++i) total += double(value(i));
  return total;
}

// Gives the residual its differences and returns where they are to be summed from: a residual that went past the
// caches is not read again.
inline const float* keep_difference(const DiffusionLoss& op, const LossTile& t, const Tile& tile, Buffer& buffer) {
  const float *output = t.output, *x0 = t.x0, *z = t.z;
  const float f = t.f, g = t.g;
  const auto difference = [=](int64_t i) { return output[i] - (f * x0[i] + g * z[i]); };
  const Sink residual = sink(op.space, op.residual, tile, buffer);
  if (residual.past) {
    const Sink both[2] = {residual, {buffer.v, false}};
    emit<2>(tile, both, [=](int64_t i, auto put) {
      const float made = difference(i);
      put(0, made), put(1, made);
    });
    return buffer.v;
  }
  emit<1>(tile, &residual, [=](int64_t i, auto put) { put(0, difference(i)); });
  store(op.space, op.residual, tile, residual.to);
  return residual.to;
}

// Gives the slopes and returns the divergences.
inline const float* keep_slope(const DiffusionLoss& op, const LossTile& t, const Tile& tile, Buffer& buffer) {
  Buffer slopes;
  FOR(i, tile.count) {
    const Divergence made = t.divergence(i);
    buffer.v[i] = made.value, slopes.v[i] = made.slope;
  }
  store(op.space, op.slope, tile, slopes.v);
  return buffer.v;
}

void diffusion_loss(const DiffusionLoss& op, int threads) {
  const int64_t tiles = (op.space.elements + TILE - 1) / TILE;
  std::vector<double> partial(size_t(op.space.samples * tiles));
  const bool down = in_the_way(op.space, {&op.residual}, {&op.output, &op.x0, &op.noise.given});
  for_tiles(op.space, threads, down, false, [&](const Tile& tile) {
    const LossTile t(op, tile);
    Buffer buffer;
    const float* difference = keep_difference(op, t, tile, buffer);
    double loss = of_sample(op.weight, tile.sample) *
                  sum(tile.count, [=](int64_t i) { return difference[i] * difference[i]; });
    if (op.bound) {
      const float* divergence = keep_slope(op, t, tile, buffer);
      loss += t.k.weight * sum(tile.count, [=](int64_t i) { return divergence[i]; });
    }
    partial[size_t(tile.sample * tiles + tile.begin / TILE)] = loss;
  });
  for (int64_t sample = 0; sample < op.space.samples; ++sample) {
    double total = 0;
    for (int64_t i = 0; i < tiles; ++i) total += partial[size_t(sample * tiles + i)];
    op.loss[sample] = float(total / double(op.space.elements));
  }
}

void philox_words(const uint32_t* counters, const uint32_t* keys, uint32_t* words, int64_t count) {
  alignas(64) uint64_t block[4][BLOCK];
  Places places;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* c = counters + 4 * i;
    // Through the lanes the kernels use, each lane in turn.
    const int lane = int(i % BLOCK);
    for (int j = 0; j < BLOCK; ++j) places.quad[j] = c[0] - uint32_t(lane) + uint32_t(j);
    philox_block<false>(block, BLOCK, places, {c[1], c[2], c[3], keys[2 * i], keys[2 * i + 1]});
    for (int j = 0; j < 4; ++j) words[4 * i + j] = uint32_t(block[j][lane]);
  }
}

}  // namespace

const Kernels LEVEL = {LEVEL_NAME, normal, add_noise, guide, affine_step, diffusion_loss, group_norm, philox_words};

}  // namespace fastdiff
