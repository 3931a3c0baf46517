// Threads that call the CPU kernels at once, each with results of its own: `threads none CALLS` compares them with the
// results of one thread, and must run under ThreadSanitizer in silence. `threads race CALLS` plants a race, one memory
// for the results of all, which must be reported.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

using namespace fastdiff;

namespace {

constexpr int THREADS = 8;
constexpr int64_t SAMPLES = 3, ELEMENTS = 37, WHOLE = SAMPLES * ELEMENTS, RESULTS = 4, ROWS = 2;
using Result = std::vector<float>;  // room for the results of any op

Result values(int64_t count, float first) {
  Result made(count);
  for (int64_t i = 0; i < count; ++i) made[i] = std::sin(first + float(i));
  return made;
}

const Result first = values(WHOLE, 1), second = values(WHOLE, 2), third = values(WHOLE, 3);
const Result table = values(ROWS * LETTERS, 4), each = values(SAMPLES, 5);
const std::vector<uint16_t> narrow(WHOLE, 0x3FC0);  // 1.5 in bfloat16
const std::vector<uint32_t> words(WHOLE * 4, 0x9E3779B9u);

Space space() {
  Space made;
  made.samples = SAMPLES, made.elements = ELEMENTS, made.dims = 1, made.size[0] = ELEMENTS;
  return made;
}

template <typename T>
Operand operand(const T* data, Type type = Type::f32) {
  Operand made;
  made.data = reinterpret_cast<char*>(const_cast<T*>(data));
  made.type = type, made.flat = type == Type::f32;
  made.sample = ELEMENTS, made.stride[0] = 1;
  return made;
}

Scalar per_sample() {
  Scalar made;
  made.each = each.data(), made.stride = 1;
  return made;
}

Noise drawn() {
  Noise made;
  made.drawn = made.numbered = true;
  made.seed.value = -7, made.step.value = 3, made.stream = 2;
  made.element = operand<float>(nullptr);
  return made;
}

void normal(float* result) {
  Normal op;
  op.space = space(), op.noise = drawn(), op.result = operand(result);
  baseline.normal(op, 1);
}

void add_noise(float* result) {
  AddNoise op;
  op.space = space(), op.noise = drawn(), op.alpha = op.sigma = per_sample();
  op.x0 = operand(first.data()), op.result = operand(result);
  baseline.add_noise(op, 1);
}

void guide(float* result) {
  Guide op;
  op.space = space(), op.scale = per_sample();
  op.cond = operand(narrow.data(), Type::bf16), op.uncond = operand(first.data()), op.result = operand(result);
  baseline.guide(op, 1);
}

void affine_step(float* result) {
  AffineStep op;
  op.space = space(), op.noise = drawn(), op.table = table.data(), op.rows = ROWS;
  op.x = operand(first.data()), op.output = operand(narrow.data(), Type::bf16), op.uncond = operand(second.data());
  op.history[0] = op.history[1] = operand(third.data()), op.anchor = operand(second.data());
  op.next = operand(result), op.x0 = operand(result + WHOLE), op.push = operand(result + 2 * WHOLE);
  op.next_anchor = operand(result + 3 * WHOLE);
  baseline.affine_step(op, 1);
}

void diffusion_loss(float* result) {
  DiffusionLoss op;
  op.space = space(), op.noise = drawn(), op.f = op.g = op.weight = per_sample();
  op.output = operand(first.data()), op.x0 = operand(second.data());
  op.loss = result;
  baseline.diffusion_loss(op, 1);
}

void philox(float* result) {
  baseline.philox(words.data(), words.data(), reinterpret_cast<uint32_t*>(result), WHOLE);
}

void (*const OPS[])(float*) = {normal, add_noise, guide, affine_step, diffusion_loss, philox};
constexpr int64_t COUNT = sizeof OPS / sizeof *OPS;

bool same(const Result& a, const Result& b) { return !memcmp(a.data(), b.data(), a.size() * sizeof(float)); }

}  // namespace

int main(int count, char** arguments) {
  const bool race = count > 1 && arguments[1] == std::string("race");
  const int64_t calls = count > 2 ? std::atoll(arguments[2]) : 1000;
  std::vector<Result> alone(COUNT, Result(RESULTS * WHOLE));
  for (int64_t op = 0; op < COUNT; ++op) OPS[op](alone[op].data());
  std::atomic<int64_t> wrong{0};
  Result shared(RESULTS * WHOLE);
  std::vector<std::thread> team;
  for (int64_t thread = 0; thread < THREADS; ++thread)
    team.emplace_back([&, thread] {
      Result own(RESULTS * WHOLE);
      Result& result = race ? shared : own;
      for (int64_t i = 0; i < calls; ++i) {
        const int64_t op = (thread + i) % COUNT;
        std::fill(result.begin(), result.end(), 0.0f);
        OPS[op](result.data());
        wrong += !same(result, alone[op]);
      }
    });
  for (std::thread& thread : team) thread.join();
  return wrong && !race ? 2 : 0;
}
