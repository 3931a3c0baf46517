"""Proves where the ops write: into the tensors given by out= and nowhere else, and what may share memory with them."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_tools import (
    BF16,
    CALLS,
    F16,
    F32,
    F64,
    FENCE,
    PROCESS,
    QUICK,
    THOROUGH,
    assert_same_bits,
    bounds,
    call_of,
    fence,
    flat,
    lay_out,
    memory_format,
    randn,
    random_table,
    same_bits,
)

import fastdiff as fd
from fastdiff import _C
from fastdiff.ops.row import LETTERS

SHAPE = (3, 4, 19, 21)
WRITERS = [op for op in CALLS if not op.startswith("diffusion_loss")]
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def laid_out(call, layout):
    return {k: lay_out(t, layout) if t.ndim > 1 else t for k, t in call.tensors.items()}


def map_parts(result, function):
    """A result with each of its tensors replaced; of the stored vectors only the first is a result."""
    if isinstance(result, torch.Tensor):
        return function(result)
    if type(result) is tuple:
        return tuple(map(function, result))
    step = {"history": tuple(map(function, result.history[:1]))}
    for name in ("x", "x0", "anchor", "input"):
        part = getattr(result, name)
        step[name] = None if part is None else function(part)
    return fd.ops.Step(**step)


# ---- out= -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", WRITERS)
@layouts
@pytest.mark.parametrize("out_layout", ["contiguous", "channels_last"])
def test_out_is_returned_and_holds_what_a_call_without_it_gives(op, layout, out_layout, each_backend):
    call = call_of(op, SHAPE, 1, BF16)
    tensors = laid_out(call, layout)
    clean = call.run(**tensors)
    out = map_parts(clean, lambda t: torch.full_like(t, math.nan, memory_format=memory_format(out_layout, 4)))
    result = call.run(**tensors, out=out)
    assert_same_bits(clean, result)
    if isinstance(out, torch.Tensor):
        assert result is out
    else:
        assert all(getattr(result, name) is getattr(out, name) for name in ("x", "x0", "anchor", "input"))
        assert not out.history or result.history[0] is out.history[0]
        assert all(new is old for new, old in zip(result.history[1:], clean.history[1:], strict=True))


@pytest.mark.parametrize("op", WRITERS)
def test_out_allocates_nothing(op):
    call = call_of(op, SHAPE, 2, BF16)
    with fd.backend("native"):
        out = map_parts(call.run(**call.tensors), torch.empty_like)
        call.run(**call.tensors, out=out)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call.run(**call.tensors, out=out)
    allocated = [(event.name, event.cpu_memory_usage) for event in profile.events() if event.cpu_memory_usage > 0]
    # Ids of samples are looked at, which takes two numbers.
    assert sum(size for _, size in allocated) <= (64 if "drawn" in op else 0), allocated


@pytest.mark.parametrize("op", WRITERS)
def test_autograd_is_told_that_out_was_written(op, each_backend):
    """By the version counter: a backward pass that needs what was there before raises, as for any write in place."""
    call = call_of(op, (2, 3, 5))
    out = map_parts(call.run(**call.tensors), torch.empty_like)
    before = [t._version for t in flat(out)]
    call.run(**call.tensors, out=out)
    assert all(t._version > version for t, version in zip(flat(out), before, strict=True))


def test_parts_that_are_none_are_not_written(each_backend):
    call = call_of("affine_step", SHAPE)
    clean = call.run(**call.tensors)
    out = map_parts(clean, torch.empty_like)._replace(x0=None, input=None)
    result = call.run(**call.tensors, out=out)
    assert result.x0 is None
    assert result.input is None
    assert_same_bits((clean.x, clean.history, clean.anchor), (result.x, result.history, result.anchor))


def test_without_keep_x0_there_is_none(each_backend):
    x, table = randn((2, 3, 5), 0), random_table(2, 0, F32)
    step = fd.ops.affine_step(x, x, table, 0, keep_x0=False)
    assert step.x0 is None
    assert_same_bits(step.x, fd.ops.affine_step(x, x, table, 0).x)


# ---- the next network input -----------------------------------------------------------------


@pytest.mark.parametrize("parts", list(itertools.product([False, True], repeat=5)), ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 91, 67), (3, 2, 5)], ids=str)
def test_a_step_has_the_bits_of_the_reference_whatever_it_is_given_and_asked(parts, shape):
    """Every form of the pass over a tile, over samples of many tiles and of a part of one."""
    guided, multistep, noisy, keep_x0, own = parts
    x, output, uncond, h, z = (randn(shape, i) for i in range(5))
    given = {"uncond": uncond if guided else None, "history": (h,) if multistep else (), "noise": z if noisy else None}
    results = []
    for name in ("reference", "native"):
        history = (torch.empty(shape),) if multistep else ()
        out = fd.ops.Step(torch.empty(shape), torch.empty(shape) if keep_x0 else None, history) if own else None
        with fd.backend(name):
            results.append(fd.ops.affine_step(x, output, random_table(3, 4, F32), 1, **given, keep_x0=keep_x0, out=out))
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("row", [0, 2, torch.tensor(1), torch.tensor([2, 0, 1])], ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), SHAPE, (3, 2, 3, 4, 5)], ids=str)
def test_the_input_is_the_next_row_s_c_in_times_x_rounded_once(dtype, row, shape, each_backend):
    x, output, table = randn(shape, 0), randn(shape, 1, BF16), random_table(3, 2, F32)
    step = fd.ops.affine_step(x, output, table, row, input_dtype=dtype, noise=x)
    after = (torch.as_tensor(row) + 1).clamp(max=2)
    c_in = table[after, LETTERS.index("c_in")]
    expected = (c_in.reshape(-1, *(1,) * (len(shape) - 1)) * step.x).to(dtype)
    assert_same_bits(step.input, expected)
    assert step.input.is_contiguous()
    if len(shape) == 4:  # another format, where it is asked for
        given = torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)
        step = fd.ops.affine_step(x, output, table, row, noise=x, out=fd.ops.Step(torch.empty(shape), input=given))
        assert step.input is given
        assert_same_bits(given, expected)


# ---- memory that is shared ------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5), SHAPE, (65, 3, 3, 3)], ids=str)
def test_results_may_lie_over_what_they_are_made_of(layout, shape, each_backend):
    for op, name in (
        ("add_noise", "x0"),
        ("add_noise", "noise"),
        ("add_noise drawn", "x0"),
        ("guide", "cond"),
        ("guide", "uncond"),
    ):
        call = call_of(op, shape)
        tensors = laid_out(call, layout)
        clean = call.run(**tensors)
        assert_same_bits(clean, call.run(**tensors, out=tensors[name]))
        assert_same_bits(clean, tensors[name])


@layouts
@pytest.mark.parametrize("op", ["affine_step", "affine_step drawn", "affine_step learned"])
@pytest.mark.parametrize("over", ["x", "h1", "h2", "h3", "anchor", "x h3 anchor"])
@pytest.mark.parametrize("seed", [0, 1], ids=["one_row", "row_per_sample"])
def test_a_step_may_lie_over_its_state(op, over, layout, seed, each_backend):
    call = call_of(op, SHAPE, seed, BF16)
    tensors = laid_out(call, layout)
    clean = call.run(**tensors)
    clean = map_parts(clean, torch.clone)
    out = map_parts(clean, torch.empty_like)
    for name in over.split():
        t = tensors[name]
        out = out._replace(**({"history": (t,)} if name.startswith("h") else {name: t}))
    result = call.run(**tensors, out=out)
    assert_same_bits(clean, map_parts(result, lambda t: t))


@pytest.mark.parametrize("op", ["ddim_step", "ddim_step drawn", "posterior_step", "posterior_step learned"])
@layouts
def test_a_solver_step_may_lie_over_its_state(op, layout, each_backend):
    call = call_of(op, SHAPE, 3, BF16)
    tensors = laid_out(call, layout)
    clean = call.run(**tensors)
    out = map_parts(clean, torch.empty_like)._replace(x=tensors["x"])
    assert_same_bits(clean, call.run(**tensors, out=out))


def test_what_is_one_tensor_may_be_named_by_views_of_it(each_backend):
    call = call_of("affine_step", SHAPE)
    clean = call.run(**call.tensors)
    out = map_parts(clean, torch.empty_like)._replace(x=call.tensors["x"].view(SHAPE), anchor=call.tensors["anchor"][:])
    assert_same_bits(clean, call.run(**call.tensors, out=out))


def test_one_tensor_in_many_roles_may_be_written_over(each_backend):
    """All vectors are one tensor, in whose place one result lies: it is read for the last time before that."""
    x, output, table = randn(SHAPE, 0), randn(SHAPE, 1), random_table(1, 0, F32)

    def run(x, out):
        step = fd.ops.affine_step(x, output, table, 0, uncond=x, history=(x, x), anchor=x, noise=x, out=out)
        return step._replace(history=step.history[:1])

    clean = run(x, None)
    for part in ("x", "anchor", "history"):
        same = x.clone()
        over = (same,) if part == "history" else same
        assert_same_bits(clean, run(same, map_parts(clean, torch.empty_like)._replace(**{part: over})))


MEMORY = torch.zeros(400)


def of(start, *shape):
    shape = shape or (2, 3, 4)
    return MEMORY[start : start + math.prod(shape)].view(shape)


X, Y, Z, H1, H2, A = (of(30 * i) for i in range(6))
NEW, NEW16 = of(300), of(300, 1, 4, 4)
TABLE = random_table(2, 0, F32)
OVER = of(301, 1, len(LETTERS))
S, VP = fd.ops.Step, PROCESS["vp"][0]


def step(out, **more):
    return fd.ops.affine_step(X, Y, TABLE, 0, out=out, **more)


def full(out):
    return step(out, uncond=Z, history=(H1, H2), anchor=A, noise=of(180))


REFUSED = {
    "guide: part of cond": (lambda: fd.ops.guide(X, Y, 1.0, out=of(1)), "out shares"),
    "guide: part of uncond": (lambda: fd.ops.guide(X, Y, 1.0, out=of(31)), "out shares"),
    "guide: cond turned": (lambda: fd.ops.guide(of(0, 2, 2, 2), Y[:, :2, :2], 1.0, out=of(0, 2, 2, 2).mT), "out"),
    "guide: expanded": (lambda: fd.ops.guide(X, Y, 1.0, out=NEW[:1].expand(2, 3, 4)), "out must be contig"),
    "guide: sliced": (lambda: fd.ops.guide(X, Y, 1.0, out=of(300, 2, 3, 8)[..., ::2]), "out must be contig"),
    "guide: dtype": (lambda: fd.ops.guide(X, Y, 1.0, out=NEW.double()), "out must be torch.float32"),
    "guide: shape": (lambda: fd.ops.guide(X, Y, 1.0, out=of(300, 2, 3, 5)), "out must have"),
    "guide: no tensor": (lambda: fd.ops.guide(X, Y, 1.0, out=[1.0]), "out must be a tensor"),
    "guide: meta": (lambda: fd.ops.guide(X, Y, 1.0, out=NEW.to("meta")), "out"),
    "add_noise: part of x0": (lambda: fd.ops.add_noise(X, 1, 1, Y, out=of(1)), "out shares"),
    "add_noise: x0 turned": (
        lambda: fd.ops.add_noise(of(0, 1, 4, 4), 1, 1, of(60, 1, 4, 4), out=of(0, 1, 4, 4).mT),
        "out",
    ),
    "add_noise: part of noise": (lambda: fd.ops.add_noise(X, 1, 1, Y, out=of(31)), "out shares"),
    "add_noise: expanded": (lambda: fd.ops.add_noise(X, 1, 1, Y, out=NEW[:, :1].expand(2, 3, 4)), "out must be contig"),
    "add_noise: dtype": (lambda: fd.ops.add_noise(X, 1, 1, Y, out=NEW.half()), "out must be torch.float32"),
    "add_noise: shape": (lambda: fd.ops.add_noise(X, 1, 1, Y, out=of(300, 3, 2, 4)), "out must have"),
    "step: over the table": (lambda: fd.ops.affine_step(X, Y, OVER, 0, out=S(of(300))), "out.x shares"),
    "step: x asks for a gradient": (lambda: step(S(torch.zeros(2, 3, 4).requires_grad_())), "out.x requires a grad"),
    "guide: out asks for a gradient": (
        lambda: fd.ops.guide(X, Y, 1.0, out=torch.zeros(2, 3, 4).requires_grad_()),
        "out requires a grad",
    ),
    "step: a tensor": (lambda: step(NEW), "out must be a Step"),
    "step: a tuple": (lambda: step((NEW,)), "out must be a Step"),
    "step: part of x": (lambda: step(S(of(1))), "out.x shares"),
    "step: over output": (lambda: step(S(Y)), "out.x shares"),
    "step: part of output": (lambda: step(S(of(29))), "out.x shares"),
    "step: x0 over x": (lambda: step(S(NEW, X)), "out.x0 shares"),
    "step: x0 over output": (lambda: step(S(NEW, Y)), "out.x0 shares"),
    "step: x0 over the new x": (lambda: step(S(NEW, NEW)), "out.x"),
    "step: x0 over part of the new x": (lambda: step(S(NEW, of(303))), "out.x"),
    "step: x expanded": (lambda: step(S(NEW[:1].expand(2, 3, 4))), "out.x must be contig"),
    "step: x0 shape": (lambda: step(S(NEW, of(330, 2, 3, 5))), "out.x0 must have"),
    "step: x0 dtype": (lambda: step(S(NEW, of(330).half())), "out.x0 must be torch.float32"),
    "step: x missing": (lambda: step(S(None)), "out"),
    "step: input over x": (lambda: step(S(NEW, None, (), None, X)), "out.input shares"),
    "step: input over output": (lambda: step(S(NEW, None, (), None, Y)), "out.input shares"),
    "step: input integers": (lambda: step(S(NEW, None, (), None, of(330).long())), "out.input"),
    "step: history not given": (lambda: step(S(NEW, None, (of(330),))), "history and anchor"),
    "step: anchor not given": (lambda: step(S(NEW, None, (), of(330))), "history and anchor"),
    "full: history left out": (lambda: full(S(NEW, None, (), A)), "history and anchor"),
    "full: anchor left out": (lambda: full(S(NEW, None, (H2,))), "history and anchor"),
    "full: x over h1": (lambda: full(S(H1, None, (H2,), A)), "out.x shares"),
    "full: x over the anchor": (lambda: full(S(A, None, (H2,), of(330))), "out.x shares"),
    "full: x over uncond": (lambda: full(S(Z, None, (H2,), A)), "out.x shares"),
    "full: x over noise": (lambda: full(S(of(180), None, (H2,), A)), "out.x shares"),
    "full: history over x": (lambda: full(S(NEW, None, (X,), A)), "out.history shares"),
    "full: history over part of h2": (lambda: full(S(NEW, None, (of(121),), A)), "out.history shares"),
    "full: anchor over x": (lambda: full(S(NEW, None, (H2,), X)), "out.anchor shares"),
    "full: anchor over history": (lambda: full(S(NEW, None, (H2,), H1)), "out.anchor shares"),
    "full: anchor over part of itself": (lambda: full(S(NEW, None, (H2,), of(151))), "out.anchor shares"),
    "full: history and anchor in one": (lambda: full(S(NEW, None, (of(330),), of(330))), "out"),
    "full: x0 over noise": (lambda: full(S(NEW, of(180), (H2,), A)), "out.x0 shares"),
    "ddim: x0 over x": (lambda: fd.ops.ddim_step(X, Y, *VP, out=S(NEW, X)), "out.x0 shares"),
    "posterior: x over noise": (
        lambda: fd.ops.posterior_step(X, Y, *VP, noise=Z, out=S(Z)),
        "out.x shares",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_results_that_cannot_be_written_are_refused_by_name(case, each_backend):
    call, message = REFUSED[case]
    MEMORY.copy_(torch.arange(400.0))
    with pytest.raises(fd.InputError, match=message):
        call()
    assert torch.equal(MEMORY, torch.arange(400.0)), "nothing was written"


# ---- red zones ------------------------------------------------------------------------------


def loss_call(shape, seed, network):
    """A loss through the extension itself, which writes into tensors it is given: what runs, its tensors, results."""
    tensors = call_of("diffusion_loss", shape, seed, network).tensors
    output, bound = tensors["output"], bounds(shape[0], seed) if seed % 2 else None

    def run(output, x0, f, g, weight, noise, out):
        _C.diffusion_loss(output, x0, f, g, weight, bound, noise, *out, *[None] * (4 - len(out)), 1)
        return out

    kept = torch.empty(shape, dtype=output.dtype), torch.empty(shape)
    return run, tensors, (torch.empty(shape[0]), *kept[: 1 if bound is None else 2])


def check_red_zones(op, shape, seed, network, layout, out_layout):
    """From inputs between fences of NaN into results of NaN between fences of 7: the bits of a call without fences."""
    if op == "loss":
        run, tensors, result = loss_call(shape, seed, network)
        more = {"out": result}
    else:
        run, tensors, *_ = call_of(op, shape, seed, network)
        more = {}
    tensors = {k: lay_out(t, layout) if t.ndim > 1 else t for k, t in tensors.items()}
    clean = run(**tensors, **more)
    memories = []

    def fenced(t):
        form = memory_format(out_layout if t.ndim > 1 else "contiguous", t.ndim)
        view, memory = fence(torch.full_like(t, math.nan, memory_format=form), 7.0)
        memories.append(memory)
        return view

    result = run(**{k: fence(t, math.nan)[0] for k, t in tensors.items()}, out=map_parts(clean, fenced))
    assert_same_bits(map_parts(clean, lambda t: t), map_parts(result, lambda t: t))
    for memory in memories:
        assert (memory[:FENCE] == 7).all()
        assert (memory[-FENCE:] == 7).all()


ZONES = {
    "shape": st.lists(st.integers(1, 9), min_size=1, max_size=4).flatmap(
        lambda inner: st.sampled_from([0, 1, 2, 3, 5]).map(lambda n: (n, *inner))
    )
    | st.integers(1000, 1100).map(lambda size: (2, size))
    | st.integers(25, 45).map(lambda side: (1, 3, side, 19)),
    "seed": st.integers(0, 2**31),
    "network": st.sampled_from([F32, BF16, F16]),
    "layout": st.sampled_from(["contiguous", "channels_last", "sliced", "transposed", "expanded"]),
    "out_layout": st.sampled_from(["contiguous", "channels_last"]),
}
FENCED = [*WRITERS, "loss"]


@pytest.mark.parametrize("op", FENCED)
@QUICK
@given(case=st.fixed_dictionaries(ZONES))
def test_red_zones(op, case):
    with fd.backend("native"):
        check_red_zones(op, **case)


@pytest.mark.slow
@pytest.mark.parametrize("op", FENCED)
@THOROUGH
@given(case=st.fixed_dictionaries(ZONES))
def test_red_zones_at_length(op, case):
    with fd.backend("native"):
        check_red_zones(op, **case)


def test_a_fence_that_is_touched_is_seen():
    view, memory = fence(torch.zeros(2, 3), 7.0)
    assert same_bits(view, torch.zeros(2, 3))
    memory[FENCE + 6] = 0
    assert not (memory[-FENCE:] == 7).all()
    assert len(flat((view, memory))) == 2
