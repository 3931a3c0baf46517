// What the compiler does not find by itself, once for each instruction set: Philox for consecutive quads of a sample,
// one quad in each 64-bit lane (the 32-bit product with a constant is then one instruction, its upper half one
// shift), and stores that go past the caches.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "../noise.h"
#include "../operand.h"

namespace fastdiff {
namespace {

constexpr int BLOCK = 64;  // quads made at once

#if defined(__x86_64__)
#if LEVEL_LANES == 8
using Lanes = __m512i;
inline Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
inline Lanes upper(Lanes a) { return _mm512_srli_epi64(a, 32); }
inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Lanes all(uint32_t a) { return _mm512_set1_epi64(a); }
inline void store_past_cache(float* to, Lanes a) { _mm512_stream_si512(reinterpret_cast<Lanes*>(to), a); }
#elif LEVEL_LANES == 4
using Lanes = __m256i;
inline Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
inline Lanes upper(Lanes a) { return _mm256_srli_epi64(a, 32); }
inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
inline Lanes all(uint32_t a) { return _mm256_set1_epi64x(a); }
inline void store_past_cache(float* to, Lanes a) { _mm256_stream_si256(reinterpret_cast<Lanes*>(to), a); }
#else
using Lanes = __m128i;
inline Lanes multiply(Lanes a, Lanes b) { return _mm_mul_epu32(a, b); }
inline Lanes upper(Lanes a) { return _mm_srli_epi64(a, 32); }
inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm_xor_si128(a, _mm_xor_si128(b, c)); }
inline Lanes all(uint32_t a) { return _mm_set1_epi64x(a); }
inline void store_past_cache(float* to, Lanes a) { _mm_stream_si128(reinterpret_cast<Lanes*>(to), a); }
#endif
inline void wait_for_stores() { _mm_sfence(); }  // those past the caches keep no order of their own
#else
using Lanes = uint64_t;
inline Lanes multiply(Lanes a, Lanes b) { return uint64_t(uint32_t(a)) * b; }
inline Lanes upper(Lanes a) { return a >> 32; }
inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return a ^ b ^ c; }
inline Lanes all(uint32_t a) { return a; }
inline void store_past_cache(float* to, Lanes a) { memcpy(to, &a, sizeof a); }
inline void wait_for_stores() {}
#endif

// Which quads of which samples a block is made of.
struct Places {
  alignas(64) uint64_t quad[BLOCK], sample[BLOCK];
};

// words[j][i], the lower half of each: word j of the quad at place i. MANY: of other samples than the counter's.
template <bool MANY>
inline void philox_block(uint64_t (*words)[BLOCK], int count, const Places& places, const Counter& at) {
  constexpr int WIDTH = sizeof(Lanes) / sizeof(uint64_t), GROUP = 4;  // four chains hide the multiplier's latency
  const Lanes m0 = all(0xD2511F53u), m2 = all(0xCD9E8D57u);
  for (int i = 0; i < count; i += WIDTH * GROUP) {
    Lanes c0[GROUP], c1[GROUP], c2[GROUP], c3[GROUP];
    for (int j = 0; j < GROUP; ++j) {
      memcpy(&c0[j], places.quad + i + j * WIDTH, sizeof(Lanes));
      c1[j] = all(at.step), c2[j] = all(at.sample), c3[j] = all(at.stream);
      if (MANY) memcpy(&c2[j], places.sample + i + j * WIDTH, sizeof(Lanes));
    }
    uint32_t k0 = at.key0, k1 = at.key1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Lanes key0 = all(k0), key1 = all(k1);
#pragma GCC unroll 4
      for (int j = 0; j < GROUP; ++j) {
        const Lanes p0 = multiply(c0[j], m0), p2 = multiply(c2[j], m2);
        c0[j] = exclusive_or(upper(p2), c1[j], key0), c1[j] = p2;
        c2[j] = exclusive_or(upper(p0), c3[j], key1), c3[j] = p0;
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int j = 0; j < GROUP; ++j) {
      memcpy(words[0] + i + j * WIDTH, &c0[j], sizeof(Lanes));
      memcpy(words[1] + i + j * WIDTH, &c1[j], sizeof(Lanes));
      memcpy(words[2] + i + j * WIDTH, &c2[j], sizeof(Lanes));
      memcpy(words[3] + i + j * WIDTH, &c3[j], sizeof(Lanes));
    }
  }
}

// PAIRS: how many of a quad's two are wanted.
template <int PAIRS>
inline void normals_of(const uint64_t (*words)[BLOCK], int64_t count, float* z) {
  for (int64_t i = 0; i < count; ++i) {  // 64 bits: -fwrapv, which Python compiles with, keeps narrower ones from lanes
    const Words quad = {{uint32_t(words[0][i]), uint32_t(words[1][i]), uint32_t(words[2][i]), uint32_t(words[3][i])}};
    const Normals drawn = normals(quad);
    for (int j = 0; j < 2 * PAIRS; ++j) z[2 * PAIRS * i + j] = drawn.z[j];
  }
}

// The normals of quads `first` ... `first` + count - 1, 4 count of them.
inline void draw(float* z, uint32_t first, int64_t count, const Counter& at) {
  alignas(64) uint64_t words[4][BLOCK];
  Places places;
  for (int64_t begin = 0; begin < count; begin += BLOCK) {
    const int quads = int(count - begin < BLOCK ? count - begin : BLOCK);
    for (int i = 0; i < BLOCK; ++i) places.quad[i] = uint32_t(first + uint32_t(begin) + i);
    philox_block<false>(words, quads, places, at);
    normals_of<2>(words, quads, z + 4 * begin);
  }
}

// The normals of elements `begin` ... `begin` + count - 1 of samples that follow each other, `noise.together` each.
template <int PAIRS>
inline void draw_together(float* z, const Noise& noise, int64_t begin, int64_t count) {
  constexpr int WIDE = 2 * PAIRS;
  const int64_t size = noise.together, end = begin + count;
  const Counter at = counter(noise, 0);
  alignas(64) uint64_t words[4][BLOCK];
  float drawn[WIDE * BLOCK];
  int64_t first[BLOCK];  // element of the batch that a quad begins with
  Places places = {};
  int64_t sample = begin / size, quad = begin % size / 4;
  while (sample * size + 4 * quad < end) {
    int made = 0;
    for (; made < BLOCK && sample * size + 4 * quad < end; ++made) {
      places.quad[made] = uint64_t(quad), places.sample[made] = id_of_sample(noise, sample);
      first[made] = sample * size + 4 * quad;
      if (4 * ++quad >= size) quad = 0, ++sample;
    }
    philox_block<true>(words, made, places, at);
    normals_of<PAIRS>(words, made, drawn);
    for (int64_t i = 0; i < made; ++i) {  // what a quad has beyond its sample, the next one writes over
      const int64_t from = std::max(first[i], begin), to = std::min(first[i] + WIDE, end);
      float* place = z + (first[i] - begin);
      if (to - from == WIDE)
        memcpy(place, drawn + WIDE * i, WIDE * sizeof(float));
      else
        for (int64_t j = from - first[i]; j < to - first[i]; ++j) place[j] = drawn[WIDE * i + j];
    }
  }
}

}  // namespace
}  // namespace fastdiff
