// fastdiff._C: tensors in, kernels run. Shapes, dtypes and devices are checked once more here, whatever the caller
// did, so that no argument can make a kernel read or write outside a tensor.
#include <algorithm>

#include "cpu/kernels.h"
#include "plan.h"
#if defined(FASTDIFF_CUDA)
#include "cuda/kernels.h"
#endif

namespace fastdiff {
namespace {

const Kernels* kernels = &baseline;

// Launches an op on the current stream.
template <typename Op, typename Cuda>
void launch(const Op& op, Device device, Cuda on_cuda) {
#if defined(FASTDIFF_CUDA)
  void* stream = nullptr;
  if (api->current_stream(CUDA, device.index, &stream) != 0) throw py::error_already_set();
  const int error = on_cuda(op, device.index, stream);
  if (error == cuda::TOO_LARGE) refuse("the groups are too large for a multiprocessor");
  if (error) throw std::runtime_error(std::string("CUDA: ") + cuda::message(error));
#else
  (void)op, (void)device, (void)on_cuda;
  refuse("this build of fastdiff._C has no CUDA kernels");
#endif
}

// Runs an op where its tensors are: on the CPU without the interpreter's lock, or on the current stream.
template <typename Op, typename Cuda>
void run(const Op& op, Device device, int threads, void (*on_cpu)(const Op&, int), Cuda on_cuda) {
  if (op.space.samples == 0) return;
  if (device.type != CPU) return launch(op, device, on_cuda);
  py::gil_scoped_release unlocked;
  on_cpu(op, std::max(threads, 1));
}

#if defined(FASTDIFF_CUDA)
#define ON_CUDA(op) cuda::op
#else
#define ON_CUDA(op) nullptr
#endif

void normal_(py::handle result, py::handle noise, int threads) {
  Normal op;
  const Tensor lead = tensor_of(result, "result");
  Plan plan(lead, true, 0);
  if (!is_address(noise)) refuse("normals need an address (seed, step, sample, stream)");
  plan.add(op.result, result, "result");
  plan.add_noise(op.noise, noise);
  for (int d = 0; d < lead.ndim; ++d)
    if (lead.shape[d] > 1 && lead.strides[d] == 0) refuse("result is expanded");
  op.space = plan.space(true, &op.noise);
  run(op, plan.device(), threads, kernels->normal, ON_CUDA(normal));
}

void add_noise_(py::handle x0, py::handle alpha, py::handle sigma, py::handle noise, py::handle result, int threads) {
  AddNoise op;
  Plan plan(tensor_of(result, "result"), is_address(noise));
  plan.add(op.x0, x0, "x0");
  plan.add_noise(op.noise, noise);
  op.alpha = plan.scalar(alpha, "alpha"), op.sigma = plan.scalar(sigma, "sigma");
  plan.add_result(op.result, result, "out", {&op.x0, &op.noise.given});
  op.space = plan.space(!op.alpha.each && !op.sigma.each, &op.noise);
  run(op, plan.device(), threads, kernels->add_noise, ON_CUDA(add_noise));
}

void guide_(py::handle cond, py::handle uncond, py::handle scale, py::handle result, int threads) {
  Guide op;
  Plan plan(tensor_of(result, "result"));
  plan.add(op.cond, cond, "cond");
  plan.add(op.uncond, uncond, "uncond");
  op.scale = plan.scalar(scale, "scale");
  plan.add_result(op.result, result, "out", {&op.cond, &op.uncond});
  op.space = plan.space(!op.scale.each);
  run(op, plan.device(), threads, kernels->guide, ON_CUDA(guide));
}

// `output` may hold twice the channels: the prediction and the fractions of a learned-range variance.
bool is_wide(py::handle output, const Tensor& lead) {
  const Tensor tensor = tensor_of(output, "output");
  return lead.ndim > 1 && tensor.ndim == lead.ndim && tensor.shape[1] == 2 * lead.shape[1] && tensor.shape[1] != 0;
}

void affine_step_(py::handle x, py::handle output, py::handle table, py::handle row, py::handle uncond,
                  py::tuple history, py::handle anchor, py::handle noise, py::tuple results, int threads) {
  AffineStep op;
  const Tensor lead = tensor_of(x, "x");
  Plan plan(lead, is_address(noise));
  plan.add(op.x, x, "x");
  const bool wide = is_wide(output, lead);
  plan.add(op.output, output, "output", 0, wide);
  if (wide) plan.add(op.fraction, output, "output", 1, wide);
  plan.add_optional(op.uncond, uncond, "uncond", 0, wide);
  if (history.size() > 3) refuse("history holds at most three vectors");
  for (size_t i = 0; i < history.size(); ++i) plan.add(op.history[i], history[i], "history");
  plan.add_optional(op.anchor, anchor, "anchor");
  if (!absent(noise)) plan.add_noise(op.noise, noise);
  const Tensor rows = tensor_of(table, "table");
  op.rows = rows.ndim ? rows.shape[0] : 0;
  if (op.rows < 1) refuse("table must have at least one row");
  op.table = plan.array(table, {op.rows, LETTERS}, "table");
  op.row = plan.index(row, "row");
  if (results.size() != 5) refuse("results are (x, x0, pushed, anchor, input)");
  const Operand* h = op.history;
  plan.add_result(op.next, results[0], "out.x", {&op.x});
  plan.add_result(op.x0, results[1], "out.x0");
  plan.add_result(op.push, results[2], "out.history", {h, h + 1, h + 2});
  plan.add_result(op.next_anchor, results[3], "out.anchor", {&op.anchor});
  plan.add_result(op.input, results[4], "out.input");
  if (absent(results[0]) || absent(results[2]) != (history.size() == 0) || absent(results[3]) != absent(anchor))
    refuse("out must hold x, and history and anchor where the step is given them");
  for (const Operand* state : {&op.x, &op.next, &op.x0, &op.push, &op.next_anchor})
    if (state->data && state->type != Type::f32) refuse("the state must be float32");
  const int64_t indices = !op.row.each ? 1 : plan.device().type == CPU ? plan.samples() : 0;
  for (int64_t i = 0; i < indices; ++i)
    if (of_sample(op.row, i) < 0 || of_sample(op.row, i) >= op.rows) refuse("row is outside the table");
  op.space = plan.space(!op.row.stride, &op.noise);
  run(op, plan.device(), threads, kernels->affine_step, ON_CUDA(affine_step));
}

// The bounds of the samples, or null.
const Bound* bounds(Plan& plan, py::handle bound, bool wide) {
  if (absent(bound)) return nullptr;
  if (!wide && plan.elements()) refuse("a bound needs an output of twice the channels");
  return reinterpret_cast<const Bound*>(plan.array(bound, {plan.samples(), BOUND_LETTERS}, "bound"));
}

// `residual` may be None. `sums` are float32 [N, chunks] on a CUDA device, where the blocks of a sample meet.
void diffusion_loss_(py::handle output, py::handle x0, py::handle f, py::handle g, py::handle weight,
                     py::handle bound, py::handle noise, py::handle loss, py::handle residual, py::handle slope,
                     py::handle sums, int threads) {
  DiffusionLoss op;
  const Tensor lead = tensor_of(x0, "x0");
  Plan plan(lead, is_address(noise));
  const bool wide = is_wide(output, lead);
  plan.add(op.x0, x0, "x0");
  plan.add(op.output, output, "output", 0, wide);
  plan.add_noise(op.noise, noise);
  op.f = plan.scalar(f, "f"), op.g = plan.scalar(g, "g"), op.weight = plan.scalar(weight, "weight");
  op.bound = bounds(plan, bound, wide);
  if (op.bound) plan.add(op.fraction, output, "output", 1, wide);
  plan.add_result(op.residual, residual, "residual");
  plan.add_result(op.slope, slope, "slope");
  if (absent(bound) && !absent(slope)) refuse("there is no slope without a bound");
  op.loss = plan.array(loss, {plan.samples()}, "loss", true);
  if (plan.device().type == CUDA)
    op.sums = plan.array(sums, {plan.samples(), chunks(plan.elements())}, "sums", true);
  op.space = plan.space(false);
  run(op, plan.device(), threads, kernels->diffusion_loss, ON_CUDA(diffusion_loss));
}

void add_affine(GroupNorm& op, Plan& plan, const Tensor& lead, int64_t groups, py::handle weight, py::handle bias,
                py::handle scale, py::handle shift) {
  op.samples = plan.samples(), op.channels = lead.shape[1], op.groups = groups;
  if (groups < 1 || op.channels % groups) refuse("groups must divide the channels");
  op.positions = op.channels ? plan.elements() / op.channels : 0;
  plan.add_vector(op.weight, weight, "weight", false), plan.add_vector(op.bias, bias, "bias", false);
  plan.add_vector(op.scale, scale, "scale", true), plan.add_vector(op.shift, shift, "shift", true);
}

void run_norm(GroupNorm& op, Plan& plan, int threads) {
  if (op.x.type == Type::f64) refuse("float64 is for the reference");
  for (const Operand* other : {&op.residual, &op.grad, &op.result, &op.sum})
    if (other->data && other->type != op.x.type) refuse("the tensors differ in dtype");
  Space space;
  op.channels_last = plan.dense(space);
  if (op.samples == 0 || space.elements == 0) return;
  if (plan.device().type != CPU) return launch(op, plan.device(), ON_CUDA(group_norm));
  py::gil_scoped_release unlocked;
  kernels->group_norm(op, std::max(threads, 1));
}

void group_norm_silu_(py::handle x, int64_t groups, py::handle weight, py::handle bias, float eps, py::handle scale,
                      py::handle shift, py::handle residual, bool silu, py::handle result, py::handle sum,
                      py::handle moments, int threads) {
  GroupNorm op;
  const Tensor lead = tensor_of(x, "x");
  Plan plan(lead);
  plan.add(op.x, x, "x");
  plan.add_optional(op.residual, residual, "residual");
  add_affine(op, plan, lead, groups, weight, bias, scale, shift);
  op.eps = eps, op.silu = silu;
  plan.add_result(op.result, result, "result");
  plan.add_result(op.sum, sum, "sum");
  if (absent(result)) refuse("result must be a tensor");
  if (!absent(moments)) op.moments = plan.array(moments, {op.samples, groups, 2}, "moments", true);
  run_norm(op, plan, threads);
}

void group_norm_silu_backward_(py::handle grad, py::handle x, py::handle moments, int64_t groups, py::handle weight,
                               py::handle bias, py::handle scale, py::handle shift, bool silu, py::handle more,
                               py::handle result, py::handle sums, int threads) {
  GroupNorm op;
  const Tensor lead = tensor_of(x, "x");
  Plan plan(lead);
  plan.add(op.x, x, "x");
  plan.add(op.grad, grad, "grad");
  plan.add_optional(op.residual, more, "the sum's gradient");
  add_affine(op, plan, lead, groups, weight, bias, scale, shift);
  op.silu = silu;
  op.moments = plan.array(moments, {op.samples, groups, 2}, "moments");
  plan.add_result(op.result, result, "result");
  op.sums = plan.array(sums, {op.samples, op.channels, 2}, "sums", true);
  if (absent(result)) refuse("result must be a tensor");
  run_norm(op, plan, threads);
}

const uint32_t* words_of(const py::buffer_info& info, int64_t width, int64_t count) {
  if (info.format != py::format_descriptor<uint32_t>::format() || info.ndim != 2 || info.shape[1] != width ||
      info.shape[0] != count || info.strides[1] != 4 || info.strides[0] != 4 * width)
    refuse("counters, keys and words must be contiguous uint32 [n, 4], [n, 2], [n, 4]");
  return static_cast<const uint32_t*>(info.ptr);
}

void philox_(py::buffer counters, py::buffer keys, py::buffer words) {
  const py::buffer_info c = counters.request(), k = keys.request(), w = words.request(true);
  const int64_t count = c.ndim == 2 ? c.shape[0] : 0;
  kernels->philox(words_of(c, 4, count), words_of(k, 2, count), const_cast<uint32_t*>(words_of(w, 4, count)), count);
}

bool supported(const Kernels* level) {
#if defined(FASTDIFF_LEVELS)
  if (level == &avx512) return __builtin_cpu_supports("x86-64-v4");
  if (level == &avx2) return __builtin_cpu_supports("x86-64-v3");
#endif
  return level == &baseline;
}

#if defined(FASTDIFF_LEVELS)
const Kernels* const LEVELS[] = {&avx512, &avx2, &baseline};
#else
const Kernels* const LEVELS[] = {&baseline};
#endif

void use(const std::string& name) {
  for (const Kernels* level : LEVELS)
    if (name == level->name && supported(level)) {
      kernels = level;
      return;
    }
  refuse("no instruction set " + name + " here");
}

}  // namespace
}  // namespace fastdiff

PYBIND11_MODULE(_C, m) {
  using namespace fastdiff;
  const py::object type = py::module_::import("torch").attr("Tensor");
  tensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
  is_neg = py::object(type.attr("is_neg")).release().ptr();
  if (!py::hasattr(type, "__dlpack_c_exchange_api__"))
    throw py::import_error("this torch has no DLPack exchange interface (__dlpack_c_exchange_api__)");
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api || api->header.major != 1 || !api->tensor_from_object) {
    PyErr_Clear();
    throw py::import_error("this torch's DLPack exchange interface is of another version");
  }
  for (const Kernels* level : LEVELS)
    if (supported(level)) {
      kernels = level;
      break;
    }
  m.def("normal", normal_);
  m.def("add_noise", add_noise_);
  m.def("guide", guide_);
  m.def("affine_step", affine_step_);
  m.def("diffusion_loss", diffusion_loss_);
  m.def("chunks", chunks);
  m.def("group_norm_silu", group_norm_silu_);
  m.def("group_norm_silu_backward", group_norm_silu_backward_);
  m.def("philox", philox_);
  m.def("level", [] { return kernels->name; });
  m.def("levels", [] {
    py::list names;
    for (const Kernels* level : LEVELS)
      if (supported(level)) names.append(level->name);
    return names;
  });
  m.def("use", use);
#if defined(FASTDIFF_CUDA)
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
