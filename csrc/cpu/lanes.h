// What the compiler does not find by itself, once for each instruction set: Philox for consecutive quads of a sample,
// one quad in each 64-bit lane (the 32-bit product with a constant is then one instruction, its upper half one
// shift), and stores that go past the caches.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

// words[j][i], the lower half of each: word j of quad `first` + i.
inline void philox_block(uint64_t (*words)[BLOCK], uint32_t first, const Counter& at) {
  constexpr int WIDTH = sizeof(Lanes) / sizeof(uint64_t), GROUP = 4;  // four chains hide the multiplier's latency
  alignas(64) uint64_t quads[BLOCK];
  for (int i = 0; i < BLOCK; ++i) quads[i] = uint32_t(first + i);
  const Lanes m0 = all(0xD2511F53u), m2 = all(0xCD9E8D57u);
  for (int i = 0; i < BLOCK; i += WIDTH * GROUP) {
    Lanes c0[GROUP], c1[GROUP], c2[GROUP], c3[GROUP];
    for (int j = 0; j < GROUP; ++j) {
      memcpy(&c0[j], quads + i + j * WIDTH, sizeof(Lanes));
      c1[j] = all(at.step), c2[j] = all(at.sample), c3[j] = all(at.stream);
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

// The normals of quads `first` ... `first` + count - 1, 4 count of them.
inline void draw(float* z, uint32_t first, int64_t count, const Counter& at) {
  alignas(64) uint64_t words[4][BLOCK];
  for (int64_t begin = 0; begin < count; begin += BLOCK) {
    philox_block(words, first + uint32_t(begin), at);
    const int quads = int(count - begin < BLOCK ? count - begin : BLOCK);
    for (int i = 0; i < quads; ++i) {
      const Normals drawn = normals(
          {{uint32_t(words[0][i]), uint32_t(words[1][i]), uint32_t(words[2][i]), uint32_t(words[3][i])}});
      for (int j = 0; j < 4; ++j) z[4 * (begin + i) + j] = drawn.z[j];
    }
  }
}

}  // namespace
}  // namespace fastdiff
