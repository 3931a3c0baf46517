# ---- gradients ------------------------------------------------------------------------------


def leaf(shape, seed):
    return randn(shape, seed, F64).requires_grad_()


GRADIENTS = {
    "add_noise": lambda s: (fd.ops.add_noise, (leaf(s, 0), leaf(s[:1], 1), leaf(s[:1], 2), leaf(s, 3))),
    "diffusion_loss": lambda s: (
        fd.ops.diffusion_loss,
        (leaf(s, 0), leaf(s, 1), leaf(s[:1], 2), leaf(s[:1], 3), leaf(s[:1], 4), leaf(s, 5)),
    ),
    "guide": lambda s: (fd.ops.guide, (leaf(s, 0), leaf(s, 1), leaf(s[:1], 2))),
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


def test_the_loss_sends_its_gradient_to_the_network_in_the_network_s_dtype():
    out = randn((2, 3, 4), 0, BF16).requires_grad_()
    x0, f, g, w = randn((2, 3, 4), 1), torch.zeros(2), torch.ones(2), torch.tensor([1.0, 3.0])
    noise = randn((2, 3, 4), 2)
    fd.ops.diffusion_loss(out, x0, f, g, w, noise).sum().backward()
    truth = column(w, x0) * 2 * (exact(out) - exact(noise)) / 12
    assert out.grad.dtype == BF16
    assert_within(out.grad, truth, (unit(BF16) + 8 * unit(F32)) * np.abs(truth) + 1e-6)


# ---- properties -----------------------------------------------------------------------------

CASES = {
    "shape": st.lists(st.integers(1, 6), min_size=1, max_size=4).flatmap(
        lambda inner: st.integers(0, 4).map(lambda n: (n, *inner))
    ),
    "dtype": st.sampled_from([F32, F64]),
    "narrow": st.sampled_from([F32, F64, BF16, F16]),
    "layout": st.sampled_from(LAYOUTS),
    "flags": st.tuples(*[st.booleans()] * 5),
    "stored": st.integers(0, 3),
    "seed": st.integers(0, 2**31),
}


def property_add_noise(shape, dtype, narrow, layout, flags, stored, seed):
    check_add_noise(shape, narrow, layout, flags[0], dtype, seed)


def property_diffusion_loss(shape, dtype, narrow, layout, flags, stored, seed):
    check_diffusion_loss(shape, dtype, layout, narrow, seed)


def property_guide(shape, dtype, narrow, layout, flags, stored, seed):
    check_guide(shape, narrow, layout, flags[0], seed)


def property_affine_step(shape, dtype, narrow, layout, flags, stored, seed):
    check_affine_step(shape, dtype, narrow, layout, *flags[:2], stored, *flags[2:], seed=seed)


def property_group_norm_silu(shape, dtype, narrow, layout, flags, stored, seed):
    n, channels, *rest = shape
    parts = "".join(part for part, used in zip("wbsh", flags, strict=False) if used)
    activation = "silu" if flags[4] else "none"
    # At least two elements in each group: a group of one has its own test.
    check_group_norm((n, 2 * channels, *rest), channels, narrow, layout, parts, activation, seed)


PROPERTIES = {
    "add_noise": property_add_noise,
    "diffusion_loss": property_diffusion_loss,
    "guide": property_guide,
    "affine_step": property_affine_step,
    "group_norm_silu": property_group_norm_silu,
}
QUICK = settings(max_examples=200, deadline=None, derandomize=True, database=None)
LONG = settings(QUICK, max_examples=10_000)
ops = pytest.mark.parametrize("op", PROPERTIES)


@ops
@QUICK
@given(case=st.fixed_dictionaries(CASES))
def test_properties(op, case):
    PROPERTIES[op](**case)


@pytest.mark.slow
@ops
@LONG
@given(case=st.fixed_dictionaries(CASES))
def test_properties_at_length(op, case):
    PROPERTIES[op](**case)


# ---- backends -------------------------------------------------------------------------------

OPS = ("add_noise", "posterior_step", "ddim_step", "guide", "affine_step", "diffusion_loss", "group_norm_silu")


def test_the_reference_serves_everything():
    with fd.backend("reference"):
        text = fd.explain()
        fd.ops.guide(torch.ones(1, 1), torch.ones(1, 1), 1.0)
    for op in OPS:
        line = next(line for line in text.splitlines() if line.startswith(op))
        assert line.split()[1] == "reference"


def test_explain_names_every_op_and_why_not_another_backend():
    with fd.backend("auto"):
        lines = fd.explain().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(OPS)
    assert "auto" in lines[0]
    for line in lines[1:]:
        chosen = line.split()[1]
        assert chosen in ("native", "triton", "reference")
        for other in {"native", "triton"} - {chosen}:
            assert chosen == "native" or f"not {other}: " in line


@pytest.mark.parametrize(
    ("name", "reason"), [("native", ": ."), ("triton", ": ."), ("cuda", "reference"), ("", "native")]
)
def test_a_backend_that_cannot_be_served_says_why(name, reason):
    with pytest.raises(fd.InputError, match=reason), fd.backend(name):
        pass


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
    "loss: out shape": (lambda: fd.ops.diffusion_loss(X[:, :1], X, W, W, W, X), "out"),
    "loss: out type": (lambda: fd.ops.diffusion_loss(None, X, W, W, W, X), "out"),
    "loss: integer out": (lambda: fd.ops.diffusion_loss(X.long(), X, W, W, W, X), "out"),
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
    "affine: out channels": (lambda: fd.ops.affine_step(X, torch.zeros(2, 5, 4), TABLE, 0), "out"),
    "affine: out device": (lambda: fd.ops.affine_step(X, X.to("meta"), TABLE, 0), "out"),
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
    "norm: activation": (lambda: fd.ops.group_norm_silu(X, 3, activation="gelu"), "activation"),
    "table: unknown letter": (lambda: make_table(2, z=1.0), "letter"),
    "table: infinite letter": (lambda: make_table(2, a=math.inf), "coefficient a"),
    "table: NaN letter": (lambda: make_table(2, s=torch.tensor([0.0, math.nan])), "coefficient s"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_by_name(case):
    call, message = BAD[case]
    with pytest.raises(fd.InputError, match=message):
        call()
