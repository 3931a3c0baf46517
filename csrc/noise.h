// Which normal belongs to (seed, sample, step, element): Philox4x32-10 (Salmon et al. 2011) and Box-Muller.
//
// Only integer operations, conversions, additions, products and explicit fma are used, in a fixed order: every
// compiler and every device gives the same bits.
#pragma once

#include "platform.h"

namespace fastdiff {

struct Words {
  uint32_t w[4];
};

FD_HD uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }

FD_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high2 = multiply_high(0xCD9E8D57u, c2), low2 = 0xCD9E8D57u * c2;
    c0 = high2 ^ c1 ^ k0;
    c1 = low2;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A value as the sum of a number and a much smaller one.
struct Sum {
  float most, rest;
};

// sqrt(a + rest), a normal, without a root's instruction, which costs a branch on a GPU: Halley's step from an estimate
// of the inverse root leaves 1e-4, Newton's on the root nothing that counts.
FD_HD Sum root(float a, float rest) {
  const float guess = bits_as<float>(0x5F375A86 - (bits_as<int32_t>(a) >> 1)), estimate = a * guess;
  const float off = fma(-estimate, guess, 1.0f), step = off * fma(off, 0.375f, 0.5f);
  const float r = fma(estimate, step, estimate), inverse = fma(guess, step, guess);
  const float lacking = 0.5f * inverse * (fma(-r, r, a) + rest), most = r + lacking;
  return {most, (r - most) + lacking};
}

// sqrt(-2 log u) for u = (2k + 1) 2^-25, k the upper 24 bits of the word.
FD_HD Sum radius(uint32_t word) {
  const int32_t n = int32_t(word >> 8) * 2 + 1;
  // u = 2^(e - 25) (1 + f) with 1 + f in about [2/3, 4/3); n - 2^e and f are exact.
  const int32_t e = (bits_as<int32_t>(float(n)) - 0x3F2AAAAB) >> 23;
  const float f = float(n - power_of_two(e)) * bits_as<float>((127 - e) << 23);
  // log(1 + f) = f + f^2 (f P(f) - 1/2), P minimax on [-1/3, 1/3] to 5e-9 of the logarithm.
  float p = -0x1.0e2eacp-3f;
  p = fma(p, f, 0x1.1df6acp-3f);
  p = fma(p, f, -0x1.f03a52p-4f);
  p = fma(p, f, 0x1.1ef0fep-3f);
  p = fma(p, f, -0x1.55b7f6p-3f);
  p = fma(p, f, 0x1.99ce4ap-3f);
  p = fma(p, f, -0x1.fffe5ep-3f);
  p = fma(p, f, 0x1.55550cp-2f);
  const float bend = f * f * fma(p, f, -0.5f), log1p = f + bend;
  // The logarithm is log + rest: k log 2, in two parts, and log1p, each sum with what it rounds away.
  const float k = float(e - 25), log = fma(k, 0x1.62e430p-1f, log1p);
  const float rest = (fma(k, 0x1.62e430p-1f, -log) + log1p) + fma(k, -0x1.05c610p-29f, (f - log1p) + bend);
  return root(-2.0f * log, -2.0f * rest);
}

struct Pair {
  float first, second;
};

// r cos and r sin of 2 pi word / 2^32.
FD_HD Pair rotate(Sum r, uint32_t word) {
  const uint32_t quadrant = (word + 0x20000000u) >> 30;
  const int32_t turn = int32_t(word - (quadrant << 30));  // within an eighth of a circle of the quadrant's axis
  const float high = float(turn), low = float(turn - int32_t(high));
  const float x = high * 0x1.921fb6p-30f, y = x * x;
  const float x_rest = fma(low, 0x1.921fb6p-30f, fma(high, -0x1.777a5cp-55f, fma(high, 0x1.921fb6p-30f, -x)));
  // The cosine is c + c_rest, the sine x + s_rest.
  const float c = fma(-0.5f, y, 1.0f);
  float c_rest = fma(fma(0x1.9a0234p-16f, y, -0x1.6c0c8cp-10f), y, 0x1.55554ap-5f);
  c_rest = fma(c_rest, y * y, fma(-x, x_rest, fma(-0.5f, y, 1.0f - c)));
  float s_rest = fma(0x1.6cd85ap-19f, y, -0x1.a00f9ep-13f);
  s_rest = fma(fma(s_rest, y, 0x1.111108p-7f), y, -0x1.555556p-3f);
  s_rest = fma(s_rest, x * y, x_rest * c);
  const float cosine = fma(r.most, c, fma(r.most, c_rest, r.rest * c));
  const float sine = fma(r.most, x, fma(r.most, s_rest, r.rest * x));
  const bool odd = quadrant & 1;
  const uint32_t sign_cos = ((quadrant + 1) & 2) << 30, sign_sin = (quadrant & 2) << 30;
  return {bits_as<float>(bits_as<uint32_t>(odd ? sine : cosine) ^ sign_cos),
          bits_as<float>(bits_as<uint32_t>(odd ? cosine : sine) ^ sign_sin)};
}

struct Normals {
  float z[4];
};

FD_HD Normals normals(Words words) {
  const Pair a = rotate(radius(words.w[0]), words.w[1]), b = rotate(radius(words.w[2]), words.w[3]);
  return {{a.first, a.second, b.first, b.second}};
}

}  // namespace fastdiff
