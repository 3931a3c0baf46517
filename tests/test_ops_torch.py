"""Proves the ops as PyTorch sees them: gradients of both orders, torch.library's own checks, torch.compile."""

import itertools
import random

import numpy as np
import pytest
import torch
from op_tools import (
    BF16,
    CALLS,
    F16,
    F32,
    F64,
    PROCESS,
    TINY,
    assert_same_bits,
    assert_within,
    bounds,
    call_of,
    column,
    exact,
    lay_out,
    randn,
    random_table,
    unit,
)

import fastdiff as fd
from fastdiff.noise import Stream, normal
from fastdiff.ops import reference
from fastdiff.ops.forward import BOUND

VP = PROCESS["vp"][0]

# ---- gradients ------------------------------------------------------------------------------


def leaf(shape, seed, dtype=F64):
    return randn(shape, seed, dtype).requires_grad_()


PLACE = {"seed": 3, "step": 2}
NO_Q = torch.tensor([float(letter != "q") for letter in BOUND], dtype=F64)
GRADIENTS = {
    "add_noise": lambda s: (fd.ops.add_noise, (leaf(s, 0), leaf(s[:1], 1), leaf(s[:1], 2), leaf(s, 3))),
    "add_noise drawn": lambda s: (
        lambda *given: fd.ops.add_noise(*given, **PLACE),
        (leaf(s, 0), leaf(s[:1], 1), leaf(s[:1], 2)),
    ),
    "diffusion_loss": lambda s: (
        fd.ops.diffusion_loss,
        (leaf(s, 0), leaf(s, 1), leaf(s[:1], 2), leaf(s[:1], 3), leaf(s[:1], 4), leaf(s, 5)),
    ),
    "diffusion_loss drawn": lambda s: (
        lambda *given: fd.ops.diffusion_loss(*given, **PLACE),
        (leaf((s[0], 2 * s[1], *s[2:]), 0), leaf(s, 1), leaf(s[:1], 2), leaf(s[:1], 3), leaf(s[:1], 4)),
    ),
    "diffusion_loss of the output": lambda s: (
        lambda output: fd.ops.diffusion_loss(output, randn(s, 1, F64), *randn((3, s[0]), 2, F64), **PLACE),
        (leaf((s[0], 2 * s[1], *s[2:]), 0),),
    ),
    "diffusion_loss hybrid": lambda s: (
        # q = 0: the bound does not know the prediction, which gets no gradient of it.
        lambda output: fd.ops.diffusion_loss(
            output, randn(s, 1, F64), *randn((3, s[0]), 2, F64), bound=bounds(s[0], 5) * NO_Q, **PLACE
        ),
        (leaf((s[0], 2 * s[1], *s[2:]), 0),),
    ),
    "guide": lambda s: (fd.ops.guide, (leaf(s, 0), leaf(s, 1), leaf(s[:1], 2))),
    "affine_step": lambda s: (
        lambda x, output, h, anchor, z: fd.ops.affine_step(
            x, output, random_table(3, 0, F64, True), 1, history=(h,), anchor=anchor, noise=z
        )[:2],
        (leaf(s, 0), leaf((s[0], 2 * s[1], *s[2:]), 1), leaf(s, 2), leaf(s, 3), leaf(s, 4)),
    ),
    "group_norm_silu": lambda s: (
        lambda x, w, b, scale_, shift: fd.ops.group_norm_silu(x, 2, w, b, scale=scale_, shift=shift),
        (leaf(s, 0), leaf(s[1:2], 1), leaf(s[1:2], 2), leaf(s[:2], 3), leaf(s[:2], 4)),
    ),
    "group_norm": lambda s: (lambda x: fd.ops.group_norm_silu(x, 2, activation="none"), (leaf(s, 0),)),
}


@pytest.mark.parametrize("op", GRADIENTS)
@pytest.mark.parametrize("shape", [(2, 4), (1, 2, 3), (2, 4, 2, 3), (1, 4, 2, 1, 2)], ids=str)
def test_gradients(op, shape):
    call, inputs = GRADIENTS[op](shape)
    assert torch.autograd.gradcheck(call, inputs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("op", GRADIENTS)
def test_second_derivatives(op):
    call, inputs = GRADIENTS[op]((2, 2, 3))
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-5, rtol=1e-3)


def test_the_loss_sends_its_gradient_to_the_network_in_the_network_s_dtype(each_backend):
    output = randn((2, 3, 4), 0, BF16).requires_grad_()
    x0, f, g, w = randn((2, 3, 4), 1), torch.zeros(2), torch.ones(2), torch.tensor([1.0, 3.0])
    noise = randn((2, 3, 4), 2)
    fd.ops.diffusion_loss(output, x0, f, g, w, noise).sum().backward()
    truth = column(w, x0) * 2 * (exact(output) - exact(noise)) / 12
    assert output.grad.dtype == BF16
    # The residual is rounded, and the gradient that is made of it.
    assert_within(output.grad, truth, (2.1 * unit(BF16) + 8 * unit(F32)) * np.abs(truth) + 1e-6)


def loss_formula(output, x0, f, g, weight, noise):
    each = (-1, *(1,) * (x0.ndim - 1))
    target = f.reshape(each) * x0 + g.reshape(each) * noise
    return weight * (output[:, : x0.shape[1]].float() - target).square().flatten(1).mean(1)


RTOL = {F32: 1e-5, F16: 1e-3, BF16: 8e-3}
LOSS_LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])


@LOSS_LAYOUTS
@pytest.mark.parametrize("source", ["given", "drawn"])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_fused_gradient_of_the_loss_is_the_formula_s(layout, source, wide, dtype, each_backend):
    shape = (3, 2, 21, 25)
    output = lay_out(randn((3, 4, 21, 25) if wide else shape, 0, dtype), layout)
    x0, each, grad = lay_out(randn(shape, 1), layout), randn((3, 3), 2), randn((3,), 3)
    noise = normal(shape, **PLACE, stream=Stream.TRAINING)
    more = {"noise": noise} if source == "given" else PLACE
    a, b = output.clone().requires_grad_(), output.clone().requires_grad_()
    fd.ops.diffusion_loss(a, x0, *each, **more).backward(grad)
    loss_formula(b, x0, *each, noise).backward(grad)
    torch.testing.assert_close(a.grad, b.grad, rtol=RTOL[dtype], atol=1e-8 if dtype != F16 else 1e-7)
    assert not a.grad[:, 2:].any()


@LOSS_LAYOUTS
@pytest.mark.parametrize("source", ["given", "drawn"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_hybrid_gradient_is_that_of_its_formula_in_float64(layout, source, dtype, each_backend):
    shape, letters = (3, 2, 21, 25), bounds(3, 5)
    output = lay_out(randn((3, 4, 21, 25), 0, dtype), layout).detach().requires_grad_()
    x0, each, grad = lay_out(randn(shape, 1), layout), randn((3, 3), 2), 100 * randn((3,), 3)
    noise = normal(shape, **PLACE, stream=Stream.TRAINING)
    more = {"noise": noise} if source == "given" else PLACE
    (ours,) = torch.autograd.grad(fd.ops.diffusion_loss(output, x0, *each, bound=letters, **more), output, grad)
    wide, *rest = (t.detach().double() for t in (output, x0, *each, letters, noise))
    loss = torch.empty(3, dtype=F64)
    reference.diffusion_loss(wide.requires_grad_(), *rest, loss)
    (truth,) = torch.autograd.grad(loss, wide, grad.double())
    atol = 4e-6 * float(truth.abs().max())
    torch.testing.assert_close(ours.double(), truth, rtol=10 * RTOL[F32] if dtype == F32 else RTOL[dtype], atol=atol)


@pytest.mark.parametrize("size", [1.0, 65536.0])
def test_a_residual_in_half_precision_neither_underflows_nor_overflows(size, each_backend):
    shape, each = (2, 3, 256, 256), (torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6]), torch.tensor([1.0, 5.0]))
    output, x0, noise = randn(shape, 0, F16).requires_grad_(), randn(shape, 1), randn(shape, 2)
    fd.ops.diffusion_loss(output, x0, *each, noise).backward(torch.full((2,), size))
    target = column(each[0], x0) * exact(x0) + column(each[1], x0) * exact(noise)
    scale = 2 * size * column(each[2], x0) / x0[0].numel()
    truth = scale * (exact(output) - target)
    rounding = scale * (8 * unit(F32) * (np.abs(exact(output)) + np.abs(target) + 1) + TINY[F16])
    assert_within(output.grad, truth, 2.1 * unit(F16) * np.abs(truth) + rounding + TINY[F16])
    assert output.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["narrow", "wide", "hybrid"])
def test_a_graph_that_is_kept_gives_its_gradient_again_and_a_differentiable_one(kind, each_backend):
    x0, each, grad = randn((3, 2, 5), 0), randn((3, 3), 1), randn((3,), 2)
    output = leaf((3, 2 if kind == "narrow" else 4, 5), 3, F32)
    more = {"bound": bounds(3, 5)} if kind == "hybrid" else {}
    loss = fd.ops.diffusion_loss(output, x0, *each, **PLACE, **more)
    (first,) = torch.autograd.grad(loss, output, grad, retain_graph=True)
    before = first.clone()
    (again,) = torch.autograd.grad(loss, output, 2 * grad, retain_graph=True)
    assert torch.equal(first, before)
    assert torch.equal(again, 2 * before)
    (other,) = torch.autograd.grad(loss, output, grad, create_graph=True)
    torch.testing.assert_close(other, before, rtol=1e-5, atol=1e-7)
    (second,) = torch.autograd.grad(other[:, :2].sum(), output)
    truth = (2 * each[2] * grad / 10)[:, None, None].expand(3, 2, 5)
    torch.testing.assert_close(second[:, :2], truth)
    assert not second[:, 2:].any()


def test_a_bound_gets_no_gradient(each_backend):
    output, x0, letters = leaf((3, 4, 5), 0, F32), leaf((3, 2, 5), 1, F32), bounds(3, 5).requires_grad_()
    for data in (x0.detach(), x0):
        fd.ops.diffusion_loss(output, data, *randn((3, 3), 2), bound=letters, **PLACE).sum().backward()
    with torch.no_grad():
        constant = fd.ops.diffusion_loss(output, x0, *randn((3, 3), 2), bound=letters, **PLACE)
    alone = fd.ops.diffusion_loss(output.detach(), x0.detach(), *randn((3, 3), 2), bound=letters, **PLACE)
    assert letters.grad is None
    assert not alone.requires_grad
    assert not constant.requires_grad
    assert output.grad.abs().min() > 0


@pytest.mark.parametrize("more", [{}, PLACE], ids=["given", "drawn"])
def test_a_batch_beyond_the_caches_has_the_bits_of_its_samples(more):
    """There the kernels write past them."""
    output, x0, noise = (randn((16, 3, 220, 256), i) for i in (0, 1, 2))
    each, results = randn((3, 16), 3), []
    for size in (16, 1):
        for ids in torch.arange(16).split(size):
            part = output[ids].requires_grad_()
            place = {**more, "sample": ids} if more else {"noise": noise[ids]}
            loss = fd.ops.diffusion_loss(part, x0[ids], *each[:, ids], **place)
            results += [(loss.detach(), *torch.autograd.grad(loss.sum(), part))]
    whole, *parts = results
    for a, b in zip(whole, zip(*parts, strict=True), strict=True):
        assert_same_bits(a, torch.cat(b))


ENTANGLED = {  # what the loss is given, made of two tensors and one number per sample
    "output of x0": lambda a, b, k: ((a * b).tanh(), a, k, k.detach(), k.detach() ** 2, b.detach()),
    "output is x0": lambda a, b, k: (a.sin(), a.sin(), k, k, k, b),
    "one tensor twice": lambda a, b, k: (a, b, k, k, k, a),
    "weight of output": lambda a, b, k: (a, b.detach(), k, k, a.mean((1, 2)).sigmoid(), b),
}


@pytest.mark.parametrize("case", ENTANGLED)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_gradients_stop_at_the_arguments_of_the_loss_where_one_is_made_of_another(case, compiled):
    results = []
    for function in (fd.ops.diffusion_loss, loss_formula):
        leaves = [leaf(s, i, F32) for i, s in enumerate([(3, 2, 5), (3, 2, 5), (3,)])]

        def run(*values, function=function):
            return function(*ENTANGLED[case](*values)).square().sum()

        run = torch.compile(run, backend="aot_eager") if compiled else run
        results.append(torch.autograd.grad(run(*leaves), leaves, allow_unused=True))
    for ours, formula in zip(*results, strict=True):
        assert (ours is None) == (formula is None)
        if ours is not None:
            torch.testing.assert_close(ours, formula, rtol=1e-5, atol=1e-6)


def test_a_batch_of_gradients_and_a_vectorised_jacobian_of_the_loss():
    output, x0, each, z = randn((2, 2, 3), 0), randn((2, 2, 3), 1), randn((3, 2), 2), randn((2, 2, 3), 3)
    ours, formula = (
        torch.autograd.functional.jacobian(lambda o, f=f: f(o, x0, *each, z), output, vectorize=True)
        for f in (fd.ops.diffusion_loss, loss_formula)
    )
    torch.testing.assert_close(ours, formula)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torch_func_over_the_loss():
    output, x0, each, z = randn((2, 2, 3), 0), randn((2, 2, 3), 1), randn((3, 2), 2), randn((2, 2, 3), 3)
    ours, formula = ([], [])
    for f, found in ((fd.ops.diffusion_loss, ours), (loss_formula, formula)):
        value, tangent = torch.func.jvp(lambda o, f=f: f(o, x0, *each, z), (output,), (z,))
        assert value.dtype == tangent.dtype == F32
        found += [value, tangent, torch.func.vmap(lambda o, f=f: f(o, x0, *each, z))(torch.stack((output, z)))]
        found += [torch.func.vmap(torch.func.grad(lambda o, f=f: f(o, x0, *each, z).sum()))(torch.stack((output, z)))]
    for a, b in zip(ours, formula, strict=True):
        torch.testing.assert_close(a, b)


def test_every_gradient_in_float32_is_the_formula_s(each_backend):
    def inputs():
        return [leaf(s, i, F32) for i, s in enumerate([(3, 2, 5), (3, 2, 5), (3,), (3,), (3,), (3, 2, 5)])]

    first, second = inputs(), inputs()
    fd.ops.diffusion_loss(*first).sum().backward()
    loss_formula(*second).sum().backward()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    x0, alpha, sigma, noise = first[1], first[2], first[3], first[5]
    ours = torch.autograd.grad(fd.ops.add_noise(x0, alpha, sigma, noise).sin().sum(), (x0, alpha, sigma, noise))
    formula = (alpha[:, None, None] * x0 + sigma[:, None, None] * noise).sin().sum()
    for a, b in zip(ours, torch.autograd.grad(formula, (x0, alpha, sigma, noise)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_under_autograd_is_differentiable_and_no_other():
    x, output, table = leaf((2, 3, 4), 0, F32), leaf((2, 3, 4), 1, F32), random_table(2, 2, F32)
    with fd.backend("auto"):
        step = fd.ops.affine_step(x, output, table, 0)
        by_guidance = fd.ops.guide(x, output, 2.0)
    (step.x.sum() + by_guidance.sum()).backward()
    with torch.no_grad(), fd.backend("native"):
        assert_same_bits(step.x.detach(), fd.ops.affine_step(x, output, table, 0).x)
        assert_same_bits(by_guidance.detach(), fd.ops.guide(x, output, 2.0))
    assert x.grad.abs().min() > 0
    assert output.grad.abs().max() > 0


@pytest.mark.parametrize("which", ["x", "output", "uncond", "h1", "anchor", "noise"])
def test_a_gradient_that_native_has_not_is_refused(which):
    call = call_of("affine_step", (2, 3, 4))
    call.tensors[which].requires_grad_()
    with fd.backend("native"), pytest.raises(fd.InputError, match="gradient"):
        call.run(**call.tensors)
    with fd.backend("native"), torch.no_grad():
        call.run(**call.tensors)
    with fd.backend("auto"):
        assert call.run(**call.tensors).x.requires_grad
    if which == "x":
        with fd.backend("native"), pytest.raises(fd.InputError, match="gradient"):
            fd.ops.guide(call.tensors["x"], call.tensors["output"], 1.0)


# ---- torch.library --------------------------------------------------------------------------

OPS = torch.ops.fastdiff
SIZES, WIDE = (3, 2, 4, 5), (3, 4, 4, 5)
CHECKS = ("schema", "autograd_registration", "faketensor", "aot_dispatch_static", "aot_dispatch_dynamic")


def noise_of(source, layout="contiguous"):
    """Noise as the schemas take it: none, given, at one address, at one per sample."""
    given = lay_out(randn(SIZES, 9), layout) if source == "given" else None
    each = [torch.tensor(v) if source == "addresses" else None for v in ([1, 2, 3], [4, 5, 6], [7, 8, 9])]
    return given, [5, 2, 0] if source in ("drawn", "addresses") else [], *each


def leaves(grad, *tensors):
    return [t.requires_grad_(grad) for t in tensors]


def numbers(each, *seeds):
    """Float32 numbers per sample, or float64 ones for all of them, as the contracts pass them on."""
    return [randn((3,), i) if each else randn((), i, F64) for i in seeds]


def sample_add_noise(layout, source, each, grad, dtype):
    return *leaves(grad, lay_out(randn(SIZES, 0, dtype), layout), *numbers(each, 2, 3)), *noise_of(source, layout)


def loss_inputs(form, layout="contiguous", source="given", grad=False, dtype=F32):
    """Arguments of the loss; its output is as x0, or twice as wide with a bound of its second half or without."""
    output = lay_out(randn(SIZES if form == "narrow" else WIDE, 1, dtype), layout)
    leaves(grad, output)
    given = leaves(grad and source == "given", lay_out(randn(SIZES, 0), layout), *numbers(True, 2, 3, 4))
    kept = grad and source != "given"  # then only the output needs a gradient
    return output, *given, bounds(3, 5) if form == "bounded" else None, *noise_of(source, layout), kept


def sample_guide(layout, each, dtype, into):
    cond, uncond = (lay_out(randn(SIZES, i, dtype), layout) for i in (0, 1))
    return cond, uncond, *numbers(each, 2), lay_out(torch.empty(SIZES, dtype=dtype), into)


def sample_affine_step(layout, source, each, parts):
    wide = parts in ("learned", "full")
    x, anchor, h1, h2 = (lay_out(randn(SIZES, i), layout) for i in range(4))
    output, uncond = (lay_out(randn(WIDE if wide else SIZES, i), layout) for i in (4, 5))
    new = [torch.empty(SIZES) for _ in range(4)]
    more = (None, [], None), (new[0], None, None, None, None)
    if parts == "guided":
        more = (uncond, [h1], None), (new[0], new[1], new[2], None, None)
    if parts == "full":
        more = (uncond, [h1, h2], anchor), (*new, lay_out(torch.empty(SIZES, dtype=BF16), "channels_last"))
    row = 0 if each else 1, torch.tensor([0, 2, 1]) if each else None
    return x, output, random_table(3, 0, F32, wide), *row, *more[0], *noise_of(source, layout), *more[1]


def sample_group_norm(layout, parts, silu, grad, dtype):
    c = SIZES[1]
    x, residual = (lay_out(randn(SIZES, i, dtype), layout) for i in range(2))
    given = {"w": randn((c,), 2), "b": randn((c,), 3), "s": randn((3, c), 4), "h": randn((3, c), 5), "r": residual}
    leaves(grad, x, *(given[part] for part in parts))
    w, b, s, h, r = (given[part] if part in parts else None for part in "wbshr")
    return x, 1, w, b, 1e-5, s, h, r, silu


def sample_group_norm_backward(layout, parts, silu, dtype):
    x, groups, w, b, _, s, h, more, _ = sample_group_norm(layout, parts, silu, False, dtype)
    grad = lay_out(randn(SIZES, 6, dtype), layout)
    return grad, x, randn((3, groups, 2), 7).abs(), groups, w, b, s, h, silu, more


PARTS = ("", "wb", "wbsh", "r", "wbshr")
LAID, SOURCES, EACH = ("contiguous", "channels_last", "sliced"), ("given", "drawn", "addresses"), (False, True)
COMBINED = {  # op: its inputs, by every combination of the choices
    "add_noise": (sample_add_noise, LAID, SOURCES, EACH, (False, True), (F32, BF16)),
    "diffusion_loss": (loss_inputs, ("narrow", "wide", "bounded"), LAID, SOURCES, (False, True), (F32, BF16)),
    "guide": (sample_guide, LAID, EACH, (F32, F16, F64), LAID[:2]),
    "group_norm_silu": (sample_group_norm, LAID, PARTS, EACH, EACH, (F32, BF16, F64)),
    "group_norm_silu_backward": (sample_group_norm_backward, LAID, PARTS, EACH, (F32, BF16, F64)),
    "affine_step": (sample_affine_step, LAID, (None, *SOURCES), EACH, ("alone", "learned", "guided", "full")),
}


def combinations():
    """All of them are slow, but for eight of an op."""
    for op, (inputs, *choices) in COMBINED.items():
        every = list(itertools.product(*choices))
        random.Random(op).shuffle(every)
        for i, choice in enumerate(every):
            name = " ".join(map(str, (op, *choice)))
            yield pytest.param(op, lambda f=inputs, c=choice: f(*c), id=name, marks=[pytest.mark.slow] * (i >= 8))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
@pytest.mark.parametrize(("op", "inputs"), list(combinations()))
def test_opcheck(op, inputs):
    verdict = torch.library.opcheck(getattr(OPS, op), inputs(), test_utils=[f"test_{check}" for check in CHECKS])
    assert verdict == dict.fromkeys((f"test_{check}" for check in CHECKS), "SUCCESS")


# ---- torch.compile --------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("op", [op for op in CALLS if "backward" not in op])
def test_compiled_is_eager(op):
    call = call_of(op, (2, 3, 5, 7), 1, BF16)
    with fd.backend("native"):
        expected = call.run(**call.tensors)
        compiled = torch.compile(call.run, fullgraph=True, backend="aot_eager")
        assert_same_bits(expected, compiled(**call.tensors))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("backend", "kind"),
    [("aot_eager", "narrow"), ("inductor", "narrow"), ("aot_eager", "wide"), ("aot_eager", "hybrid")],
)
def test_a_compiled_training_step_has_eager_s_loss_and_gradient(backend, kind):
    x0, weight = randn((3, 2, 5, 7), 0), leaf((2 if kind == "narrow" else 4, 2, 1, 1), 1, F32)
    each, bound = torch.ones(3), bounds(3, 5) if kind == "hybrid" else None

    def train(x0, weight, step):
        x = fd.ops.add_noise(x0, 0.8 * each, 0.6 * each, seed=1, step=step)
        output = torch.nn.functional.conv2d(x, weight).sin()
        return fd.ops.diffusion_loss(output, x0, 0 * each, each, each, bound=bound, seed=1, step=step).mean()

    compiled = torch.compile(train, fullgraph=True, backend=backend)
    for step in (0, 1):
        expected = train(x0, weight, step)
        (slope,) = torch.autograd.grad(expected, weight)
        loss = compiled(x0, weight, step)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], slope)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_sampling_step_compiled_by_inductor():
    x, uncond, table = randn((2, 3, 8, 8), 0), randn((2, 3, 8, 8), 1), random_table(4, 2, F32)

    def sample(x, uncond, row):
        output = fd.ops.guide(x.sin(), uncond, 2.0)
        step = fd.ops.affine_step(x, output, table, row, seed=3, input_dtype=BF16)
        return fd.ops.ddim_step(step.x, step.input, *VP).x + 1

    with fd.backend("native"):
        compiled = torch.compile(sample, fullgraph=True, backend="inductor")
        for row in (torch.tensor([0, 2]), torch.tensor([3, 1])):
            torch.testing.assert_close(compiled(x, uncond, row), sample(x, uncond, row), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", ["affine_step", "guide"])
def test_a_compiled_step_under_autograd_is_differentiable(op):
    x, output, table = leaf((2, 3, 4), 0, F32), randn((2, 3, 4), 1), random_table(2, 2, F32)

    def run(x):
        x = x.sin()
        return (
            fd.ops.affine_step(x, output, table, 1).x if op == "affine_step" else fd.ops.guide(x, output, 2.0)
        ).sum()

    (slope,) = torch.autograd.grad(run(x), x)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], slope)


# ---- whoever follows PyTorch's operations ---------------------------------------------------

TABLE = random_table(3, 1, F32)
WATCHED = {
    "guide": lambda x: fd.ops.guide(x, 2 * x, 3.0),
    "add_noise": lambda x: fd.ops.add_noise(x, 0.5, 0.25, 3 * x),
    "affine_step": lambda x: fd.ops.affine_step(x, 2 * x, TABLE, 1).x,
    "ddim_step": lambda x: fd.ops.ddim_step(x, 2 * x, 0.6, 0.8, 0.8, 0.6).x,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, of what it uses itself
@pytest.mark.parametrize("op", WATCHED)
def test_forward_gradients_and_vmap_pass_through(op):
    x, tangent = randn((4, 3, 5), 0), randn((4, 3, 5), 1)
    value, slope = torch.func.jvp(WATCHED[op], (x,), (tangent,))
    step = 2.0**-8
    assert torch.equal(value, WATCHED[op](x))
    change = (WATCHED[op](x + step * tangent) - WATCHED[op](x - step * tangent)) / (2 * step)
    within = (change - slope).abs() <= 1e-2 * slope.abs().max()  # a clamp may bend in between
    assert within.float().mean() >= 0.8
    assert torch.equal(torch.func.vmap(WATCHED[op])(x[:, None]), WATCHED[op](x)[:, None])


@pytest.mark.parametrize("op", WATCHED)
def test_a_trace_holds_the_operation(op):
    x, y = randn((2, 3, 5), 0), randn((2, 3, 5), 1)
    traced = torch.fx.experimental.proxy_tensor.make_fx(WATCHED[op])(x)
    torch.testing.assert_close(traced(y), WATCHED[op](y))


def test_levels_met_in_inference_mode_serve_training_later():
    x = randn((2, 3), 0)
    with torch.inference_mode():
        fd.ops.ddim_step(x, x, 0.28, 0.96, 0.6, 0.8)
    leaf = x.clone().requires_grad_()
    fd.ops.ddim_step(leaf, x, 0.28, 0.96, 0.6, 0.8).x.sum().backward()
    assert leaf.grad is not None


def test_results_that_are_views_to_be_negated_are_refused():
    x = randn((2, 3), 0)
    with fd.backend("native"), pytest.raises(fd.InputError, match="negated"):
        fd.ops.guide(x, x, 2.0, out=torch._neg_view(torch.zeros(2, 3)))
