"""Proves the contract around the ops: which backend serves, and one InputError by name for whatever does not fit."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from op_tools import PROCESS
from torch._subclasses import FakeTensorMode

import fastdiff as fd
from fastdiff import backends
from fastdiff.ops.row import make_table

# ---- backends -------------------------------------------------------------------------------


def test_the_reference_serves_everything():
    with fd.backend("reference"):
        text = fd.explain()
        fd.ops.guide(torch.ones(1, 1), torch.ones(1, 1), 1.0)
    for op in backends.OPS:
        line = next(line for line in text.splitlines() if line.startswith(op))
        assert line.split()[1] == "reference"


def test_explain_names_every_op_and_why_not_another_backend():
    with fd.backend("auto"):
        lines = fd.explain().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(backends.OPS)
    assert "auto" in lines[0]
    for line in lines[1:]:
        chosen = line.split()[1]
        assert chosen in ("native", "triton", "reference")
        for other in {"native", "triton"} - {chosen}:
            assert chosen == "native" or f"not {other}: " in line


@pytest.mark.parametrize(("name", "reason"), [("cuda", "reference"), ("", "native"), (None, "native")])
def test_an_unknown_backend_is_refused_with_those_there_are(name, reason):
    with pytest.raises(fd.InputError, match=reason), fd.backend(name):
        pass


def test_a_backend_that_is_not_there_says_why(monkeypatch):
    monkeypatch.setattr(backends, "load", lambda name: (None, "it was not built"))
    with pytest.raises(fd.InputError, match="not available: it was not built"), fd.backend("native"):
        pass


def test_a_backend_that_cannot_serve_a_call_says_why():
    with fd.backend("native"), pytest.raises(fd.InputError, match="float32, not in float64"):
        fd.ops.guide(X.double(), X.double(), 1.0)
    with fd.backend("reference"):
        assert fd.ops.guide(X.double(), X.double(), 1.0).dtype == torch.float64


def test_auto_asks_the_next_backend_where_one_refuses():
    x = torch.arange(256.0).reshape(1, *(2,) * 8)  # of more dimensions than the kernels walk
    with fd.backend("native"), pytest.raises(fd.InputError, match="2 to 7 dimensions"):
        fd.ops.guide(x, x, 1.0)
    negated = torch.randn([2] * 8, dtype=torch.cfloat).conj().imag
    assert torch.equal(fd.ops.guide(negated, 0 * negated, 2.0), 2 * negated)
    results = []
    for name in ("auto", "reference"):
        with fd.backend(name):
            table, small = make_table(1, a=2.0), torch.float8_e4m3fn
            results.append((fd.ops.guide(x, 3 * x, 0.5), fd.ops.affine_step(x, x, table, 0).x))
            results[-1] += (fd.ops.add_noise(x, 0.5, 2, seed=1), fd.noise.normal((2, 3), seed=1, dtype=small).float())
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected) or torch.allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("row", [1, np.int64(1), torch.tensor(1)], ids=repr)
def test_a_row_is_any_whole_number(row, each_backend):
    table = make_table(2, a=torch.tensor([2.0, 3.0])).float()
    assert torch.equal(fd.ops.affine_step(X, X, table, row).x, 3 * X)


def test_a_number_that_asks_for_a_gradient_gets_it(each_backend):
    alpha, sigma, scale = (torch.tensor(value, requires_grad=True) for value in (0.5, 0.25, 2.0))
    noise = torch.ones_like(X)
    fd.ops.add_noise(X, alpha, sigma, noise).sum().backward()
    torch.testing.assert_close(torch.stack((alpha.grad, sigma.grad)), torch.stack((X.sum(), noise.sum())))
    if each_backend == "reference":
        fd.ops.guide(X, noise, scale).sum().backward()
        torch.testing.assert_close(scale.grad, (X - noise).sum())


def fail_under(name):
    with fd.backend(name):
        raise RuntimeError(fd.explain().splitlines()[0])


def test_the_choice_ends_with_its_block_even_by_an_exception():
    with fd.backend("auto"):
        with pytest.raises(RuntimeError, match="choice: reference"):
            fail_under("reference")
        assert "choice: auto" in fd.explain()


# ---- what does not fit ----------------------------------------------------------------------

X = torch.zeros(2, 3, 4)
W = torch.zeros(2)
TABLE = make_table(3)
VP = PROCESS["vp"][0]
LEARNED = torch.zeros(2, 6, 4)


def freed(place=0):
    """A tensor, or a view within one, whose memory was given back."""
    x = torch.zeros(2, 2, 3, 4)[place]
    x.untyped_storage().resize_(0)
    return x


def freed_like(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def nested():
    with warnings.catch_warnings(action="ignore"):
        return torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)])


STRANGE = {
    "a list": [0.0],
    "a number": 1.0,
    "an array": np.zeros((2, 3, 4), np.float32),
    "integers": X.long(),
    "booleans": X.bool(),
    "complex": X + 0j,
    "float8": X.to(torch.float8_e5m2),
    "sparse": X.to_sparse(),
    "meta": X.to("meta"),
    "blocked": X.to_mkldnn(),
    "unsigned": X.to(torch.uint16),
    "text": "x",
    "NaN": math.nan,
    "nested": nested(),
    "freed": freed(),
    "freed view": freed(1),
    "too long": torch.zeros(2, 3, 5),
    "too deep": torch.zeros(2, 3, 4, 1),
    "too many": torch.zeros(3, 3, 4),
    "too flat": torch.zeros(2),
}
ARGUMENTS = {
    "add_noise: x0": lambda v: fd.ops.add_noise(v, 1, 1, seed=0),
    "add_noise: noise": lambda v: fd.ops.add_noise(X, 1, 1, v),
    "loss: output": lambda v: fd.ops.diffusion_loss(v, X, W, W, W, X),
    "loss: x0": lambda v: fd.ops.diffusion_loss(X, v, W, W, W, X),
    "guide: cond": lambda v: fd.ops.guide(v, X, 1.0),
    "guide: uncond": lambda v: fd.ops.guide(X, v, 1.0),
    "affine: x": lambda v: fd.ops.affine_step(v, X, TABLE, 0),
    "affine: output": lambda v: fd.ops.affine_step(X, v, TABLE, 0),
    "affine: h1": lambda v: fd.ops.affine_step(X, X, TABLE, 0, history=(v,)),
    "affine: h3": lambda v: fd.ops.affine_step(X, X, TABLE, 0, history=(X, X, v)),
    "affine: noise": lambda v: fd.ops.affine_step(X, X, TABLE, 0, noise=v),
    "affine: anchor": lambda v: fd.ops.affine_step(X, X, TABLE, 0, anchor=v),
    "affine: uncond": lambda v: fd.ops.affine_step(X, X, TABLE, 0, uncond=v),
    "posterior: output": lambda v: fd.ops.posterior_step(X, v, *VP, noise=X),
    "ddim: x": lambda v: fd.ops.ddim_step(v, X, *VP),
    "norm: x": lambda v: fd.ops.group_norm_silu(v, 1),
    "norm: residual": lambda v: fd.ops.group_norm_silu(X, 3, residual=v),
}
FREE = ("add_noise: x0", "loss: x0", "guide: cond", "affine: x", "ddim: x", "norm: x")  # of any shape

BAD = {
    "add_noise: list": (lambda: fd.ops.add_noise([1.0], 1, 1, X), "x0"),
    "add_noise: integers": (lambda: fd.ops.add_noise(X.long(), 1, 1, X), "x0"),
    "add_noise: complex": (lambda: fd.ops.add_noise(X + 0j, 1, 1, X), "x0"),
    "add_noise: one dimension": (lambda: fd.ops.add_noise(W, 1, 1, W), "x0"),
    "add_noise: meta": (lambda: fd.ops.add_noise(X.to("meta"), 1, 1, seed=0), "x0"),
    "add_noise: noise shape": (lambda: fd.ops.add_noise(X, 1, 1, X[:1]), "noise"),
    "add_noise: noise device": (lambda: fd.ops.add_noise(X, 1, 1, X.to("meta")), "noise"),
    "add_noise: integer noise": (lambda: fd.ops.add_noise(X, 1, 1, X.int()), "noise"),
    "add_noise: noise list": (lambda: fd.ops.add_noise(X, 1, 1, [0.0]), "noise"),
    "add_noise: neither noise nor seed": (lambda: fd.ops.add_noise(X, 1, 1), "noise or seed"),
    "add_noise: both noise and seed": (lambda: fd.ops.add_noise(X, 1, 1, X, seed=0), "noise or seed"),
    "add_noise: alpha length": (lambda: fd.ops.add_noise(X, torch.ones(3), 1, X), "alpha"),
    "add_noise: alpha shape": (lambda: fd.ops.add_noise(X, torch.ones(2, 1), 1, X), "alpha"),
    "add_noise: alpha word": (lambda: fd.ops.add_noise(X, "a", 1, X), "alpha"),
    "add_noise: sigma list": (lambda: fd.ops.add_noise(X, 1, [1.0, 1.0], X), "sigma"),
    "add_noise: sigma none": (lambda: fd.ops.add_noise(X, 1, None, X), "sigma"),
    "add_noise: sample ids": (lambda: fd.ops.add_noise(X, 1, 1, seed=0, sample=[1]), "sample"),
    "add_noise: negative step": (lambda: fd.ops.add_noise(X, 1, 1, seed=0, step=-1), "step"),
    "loss: out shape": (lambda: fd.ops.diffusion_loss(X[:, :1], X, W, W, W, X), "output"),
    "loss: out type": (lambda: fd.ops.diffusion_loss(None, X, W, W, W, X), "output"),
    "loss: integer out": (lambda: fd.ops.diffusion_loss(X.long(), X, W, W, W, X), "output"),
    "loss: f length": (lambda: fd.ops.diffusion_loss(X, X, W[:1], W, W, X), "f must"),
    "loss: g shape": (lambda: fd.ops.diffusion_loss(X, X, W, X, W, X), "g must"),
    "loss: weight device": (lambda: fd.ops.diffusion_loss(X, X, W, W, W.to("meta"), X), "weight"),
    "loss: f a number": (lambda: fd.ops.diffusion_loss(X, X, 0.0, W, W, X), "f must"),
    "loss: weight a number": (lambda: fd.ops.diffusion_loss(X, X, W, W, 1.0, X), "weight"),
    "loss: both noise and seed": (lambda: fd.ops.diffusion_loss(X, X, W, W, W, X, seed=0), "noise or seed"),
    "guide: shape": (lambda: fd.ops.guide(X, X[:1], 1.0), "uncond"),
    "guide: dtype": (lambda: fd.ops.guide(X, X.double(), 1.0), "uncond"),
    "guide: cond integers": (lambda: fd.ops.guide(X.long(), X.long(), 1.0), "cond"),
    "guide: scale length": (lambda: fd.ops.guide(X, X, torch.ones(3)), "scale"),
    "guide: scale word": (lambda: fd.ops.guide(X, X, "strong"), "scale"),
    "affine: half state": (lambda: fd.ops.affine_step(X.half(), X, TABLE, 0), "x must"),
    "affine: out channels": (lambda: fd.ops.affine_step(X, torch.zeros(2, 5, 4), TABLE, 0), "output"),
    "affine: out device": (lambda: fd.ops.affine_step(X, X.to("meta"), TABLE, 0), "output"),
    "affine: uncond shape": (lambda: fd.ops.affine_step(X, X, TABLE, 0, uncond=torch.zeros(2, 6, 4)), "uncond"),
    "affine: table width": (lambda: fd.ops.affine_step(X, X, TABLE[:, 1:], 0), "table"),
    "affine: table device": (lambda: fd.ops.affine_step(X, X, TABLE.to("meta"), 0), "table"),
    "affine: table list": (lambda: fd.ops.affine_step(X, X, [[0.0]], 0), "table"),
    "affine: row too large": (lambda: fd.ops.affine_step(X, X, TABLE, 3), "row"),
    "affine: row negative": (lambda: fd.ops.affine_step(X, X, TABLE, -1), "row"),
    "affine: row fractional": (lambda: fd.ops.affine_step(X, X, TABLE, 0.5), "row"),
    "affine: row dtype": (lambda: fd.ops.affine_step(X, X, TABLE, torch.tensor([0, 1]).int()), "row"),
    "affine: rows length": (lambda: fd.ops.affine_step(X, X, TABLE, torch.tensor([0, 1, 2])), "row"),
    "affine: rows too large": (lambda: fd.ops.affine_step(X, X, TABLE, torch.tensor([0, 3])), "row"),
    "affine: rows negative": (lambda: fd.ops.affine_step(X, X, TABLE, torch.tensor([0, -1])), "row"),
    "affine: history of four": (lambda: fd.ops.affine_step(X, X, TABLE, 0, history=(X, X, X, X)), "history"),
    "affine: h2 shape": (lambda: fd.ops.affine_step(X, X, TABLE, 0, history=(X, X[:1])), "h2"),
    "affine: anchor shape": (lambda: fd.ops.affine_step(X, X, TABLE, 0, anchor=X[:, :1]), "anchor"),
    "affine: noise shape": (lambda: fd.ops.affine_step(X, X, TABLE, 0, noise=X[..., :2]), "noise"),
    "affine: both noise and seed": (lambda: fd.ops.affine_step(X, X, TABLE, 0, noise=X, seed=1), "noise or seed"),
    "ddim: eta above 1": (lambda: fd.ops.ddim_step(X, X, *VP, eta=1.5, noise=X), "eta"),
    "ddim: eta negative": (lambda: fd.ops.ddim_step(X, X, *VP, eta=-0.1, noise=X), "eta"),
    "ddim: eta NaN": (lambda: fd.ops.ddim_step(X, X, *VP, eta=math.nan, noise=X), "eta"),
    "ddim: eta without noise": (lambda: fd.ops.ddim_step(X, X, *VP, eta=0.5), "noise or seed"),
    "ddim: unknown prediction": (lambda: fd.ops.ddim_step(X, X, *VP, prediction="eps"), "prediction"),
    "ddim: no signal": (lambda: fd.ops.ddim_step(X, X, 0.0, 1.0, 0.6, 0.8), "finite"),
    "ddim: no noise": (lambda: fd.ops.ddim_step(X, X, 1.0, 0.0, 1.0, 0.0), "finite"),
    "ddim: level length": (lambda: fd.ops.ddim_step(X, X, torch.ones(3), *VP[1:]), "alpha"),
    "ddim: negative clip": (lambda: fd.ops.ddim_step(X, X, *VP, clip=-1.0), "clip"),
    "ddim: NaN clip": (lambda: fd.ops.ddim_step(X, X, *VP, clip=math.nan), "clip"),
    "ddim: NaN guidance": (lambda: fd.ops.ddim_step(X, X, *VP, uncond=X, guidance_scale=math.nan), "finite"),
    "posterior: without noise": (lambda: fd.ops.posterior_step(X, X, *VP), "noise or seed"),
    "posterior: unknown variance": (lambda: fd.ops.posterior_step(X, X, *VP, variance="learned", noise=X), "variance"),
    "posterior: bf16 state": (lambda: fd.ops.posterior_step(X.bfloat16(), X, *VP, noise=X), "x must"),
    "norm: groups": (lambda: fd.ops.group_norm_silu(X, 2), "groups"),
    "norm: no groups": (lambda: fd.ops.group_norm_silu(X, 0), "groups"),
    "norm: negative groups": (lambda: fd.ops.group_norm_silu(X, -3), "groups"),
    "norm: integers": (lambda: fd.ops.group_norm_silu(X.long(), 3), "x must"),
    "norm: one dimension": (lambda: fd.ops.group_norm_silu(W, 1), "x must"),
    "norm: weight length": (lambda: fd.ops.group_norm_silu(X, 3, torch.ones(2)), "weight"),
    "norm: bias shape": (lambda: fd.ops.group_norm_silu(X, 3, None, torch.ones(1, 3)), "bias"),
    "norm: scale shape": (lambda: fd.ops.group_norm_silu(X, 3, scale=torch.ones(3)), "scale"),
    "norm: shift shape": (lambda: fd.ops.group_norm_silu(X, 3, shift=torch.ones(2, 2)), "shift"),
    "norm: residual shape": (lambda: fd.ops.group_norm_silu(X, 3, residual=X[:, :2]), "residual"),
    "norm: residual dtype": (lambda: fd.ops.group_norm_silu(X, 3, residual=X.double()), "residual"),
    "norm: integer weight": (lambda: fd.ops.group_norm_silu(X, 3, torch.ones(3, dtype=int)), "weight"),
    "norm: uneven groups": (lambda: fd.ops.group_norm_silu(X, 1.5), "groups must be a whole number"),
    "norm: word for groups": (lambda: fd.ops.group_norm_silu(X, "3"), "groups must be a whole number"),
    **{
        f"norm: {name} {kind}": (partial(fd.ops.group_norm_silu, X, 3, **{name: value}), rf"^{name} .*{said}")
        for name, plain in (("weight", torch.ones(3)), ("bias", torch.ones(3)), ("scale", torch.ones(2, 3)))
        for kind, value, said in (
            ("list", plain.tolist(), "list"),
            ("sparse", plain.to_sparse(), "dense"),
            ("freed", freed_like(plain), "freed"),
            ("meta", plain.to("meta"), "on meta"),
            ("complex", plain + 0j, "complex64"),
            ("float8", plain.to(torch.float8_e5m2), "float8"),
        )
    },
    "norm: activation": (lambda: fd.ops.group_norm_silu(X, 3, activation="gelu"), "activation"),
    "affine: integer table": (lambda: fd.ops.affine_step(X, X, TABLE.long(), 0), "table"),
    "affine: no rows": (lambda: fd.ops.affine_step(X, X, TABLE[:0], 0), "table"),
    "affine: table of one dimension": (lambda: fd.ops.affine_step(X, X, TABLE[0], 0), "table"),
    "affine: huge row": (lambda: fd.ops.affine_step(X, X, TABLE, 2**62), "row"),
    "affine: row beyond 64 bits": (lambda: fd.ops.affine_step(X, X, TABLE, 2**70), "row"),
    "affine: row none": (lambda: fd.ops.affine_step(X, X, TABLE, None), "row"),
    "affine: rows in a matrix": (lambda: fd.ops.affine_step(X, X, TABLE, torch.zeros(2, 1).long()), "row"),
    "affine: rows meta": (lambda: fd.ops.affine_step(X, X, TABLE, torch.zeros(2).long().to("meta")), "row"),
    "affine: sample ids": (lambda: fd.ops.affine_step(X, X, TABLE, 0, seed=0, sample=[1, 2, 3]), "sample"),
    "affine: sample negative": (lambda: fd.ops.affine_step(X, X, TABLE, 0, seed=0, sample=[1, -2]), "sample"),
    "affine: seeds": (lambda: fd.ops.affine_step(X, X, TABLE, 0, seed=[1, 2, 3]), "seed"),
    "affine: seed fractional": (lambda: fd.ops.affine_step(X, X, TABLE, 0, seed=0.5), "seed"),
    "affine: step beyond 32 bits": (lambda: fd.ops.affine_step(X, X, TABLE, 0, seed=0, step=2**32), "step"),
    "affine: row true": (lambda: fd.ops.affine_step(X, X, TABLE, True), "row"),
    "guide: scale of text": (lambda: fd.ops.guide(X, X, "2"), "scale"),
    "guide: scale beyond float": (lambda: fd.ops.guide(X, X, 10**400), "scale"),
    "add_noise: sparse levels": (lambda: fd.ops.add_noise(X, torch.ones(2).to_sparse(), 1, X), "alpha"),
    "guide: out transposed": (lambda: fd.ops.guide(X, X, 1, out=torch.empty(2, 4, 3).mT), "out must be contig"),
    "affine: step without seed": (lambda: fd.ops.affine_step(X, X, TABLE, 0, step=3), "give seed"),
    "affine: sample without seed": (lambda: fd.ops.affine_step(X, X, TABLE, 0, sample=[1, 2], noise=X), "give seed"),
    "add_noise: step without seed": (lambda: fd.ops.add_noise(X, 1, 1, X, step=3), "give seed"),
    "add_noise: sample without seed": (lambda: fd.ops.add_noise(X, 1, 1, X, sample=[1, 2]), "give seed"),
    "affine: input dtype": (lambda: fd.ops.affine_step(X, X, TABLE, 0, input_dtype=torch.int32), "input"),
    "affine: x one dimension": (lambda: fd.ops.affine_step(W, W, TABLE, 0), "x must"),
    "posterior: uncond narrow": (lambda: fd.ops.posterior_step(X, LEARNED, *VP, uncond=X, noise=X), "uncond"),
    "posterior: level matrix": (lambda: fd.ops.posterior_step(X, X, torch.ones(2, 1), *VP[1:], noise=X), "alpha"),
    "posterior: level word": (lambda: fd.ops.posterior_step(X, X, "a", *VP[1:], noise=X), "alpha"),
    "posterior: NaN level": (lambda: fd.ops.posterior_step(X, X, math.nan, *VP[1:], noise=X), "finite"),
    "ddim: infinite level": (lambda: fd.ops.ddim_step(X, X, VP[0], math.inf, *VP[2:]), "finite"),
    "ddim: clip zero": (lambda: fd.ops.ddim_step(X, X, *VP, clip=0), "clip"),
    "ddim: clip word": (lambda: fd.ops.ddim_step(X, X, *VP, clip="1"), "clip"),
    **{
        f"{step.__name__}: level {i} {value}": (partial(step, X, X, *VP[:i], value, *VP[i + 1 :], noise=X), "finite")
        for step in (fd.ops.ddim_step, fd.ops.posterior_step)
        for i in range(4)
        for value in (math.nan, math.inf, -math.inf)
    },
    "table: unknown letter": (lambda: make_table(2, z=1.0), "letter"),
    "table: infinite letter": (lambda: make_table(2, a=math.inf), "coefficient a"),
    "table: NaN letter": (lambda: make_table(2, s=torch.tensor([0.0, math.nan])), "coefficient s"),
}

BAD |= {
    f"{argument} {kind}": (partial(call, value), rf"\b{argument.split()[-1]}\b")
    for argument, call in ARGUMENTS.items()
    for kind, value in STRANGE.items()
    if not (argument in FREE and kind in ("too long", "too deep", "too many"))
}
assert len(BAD) >= 200


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_by_name(case, each_backend):
    call, message = BAD[case]
    with pytest.raises(fd.InputError, match=message):
        call()


def fake():
    with FakeTensorMode():
        return torch.zeros(2, 3, 4)


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("without", [freed, fake])
def test_tensors_without_memory_are_refused(argument, without):
    """PyTorch's own operations, which the reference is made of, end the process on a tensor whose memory was freed."""
    with fd.backend("native"), pytest.raises(fd.InputError, match="holds no values"):
        ARGUMENTS[argument](without())
