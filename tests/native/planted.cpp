// Bugs planted in calls of the CPU kernels, which the sanitizers must report: `planted read|write|overflow|misaligned`.
// `planted none` makes the same calls without a bug and must pass in silence.
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"

using namespace fastdiff;

namespace {

constexpr int64_t SAMPLES = 2, ELEMENTS = 1500;  // more than a tile

Operand flat(std::vector<float>& memory) {
  Operand operand;
  operand.data = reinterpret_cast<char*>(memory.data());
  operand.flat = true;
  operand.sample = ELEMENTS, operand.stride[0] = 1;
  return operand;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string bug = count > 1 ? arguments[1] : "none";
  const size_t whole = SAMPLES * ELEMENTS;
  std::vector<float> cond(bug == "read" ? whole - 1 : whole, 1.0f), uncond(whole + 1, 2.0f);
  std::vector<float> result(bug == "write" ? whole - 1 : whole);
  Guide op;
  op.space.samples = SAMPLES, op.space.elements = ELEMENTS, op.space.dims = 1, op.space.size[0] = ELEMENTS;
  op.cond = flat(cond), op.uncond = flat(uncond), op.result = flat(result);
  op.scale.value = 3.0f;
  if (bug == "misaligned") op.uncond.data += 1;
  if (bug == "overflow") op.space.samples = INT64_MAX;  // times the tiles of a sample
  baseline.guide(op, 1);
  return result[0] == -1.0f ? 0 : 2;  // 2 + 3 (1 - 2)
}
