"""The ops as PyTorch knows them: ``torch.ops.fastdiff``, with shapes, gradients and mutation declared.

torch.compile and autograd go through here and see one opaque op each; eager calls that need neither call a body
directly. Either way the backend is chosen when the op runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdiff.backends import backend, body, checked_body, choice
from fastdiff.noise import Address, draw
from fastdiff.ops import reference
from fastdiff.ops.layout import empty_like, format_of

NOISE = "Tensor? noise, int[] place, Tensor? seed, Tensor? step, Tensor? sample"
Noise = Tensor | Address | None
Flat = tuple[Tensor | None, list[int], Tensor | None, Tensor | None, Tensor | None]

_library = torch.library.Library("fastdiff", "DEF")
_library.define(f"add_noise(Tensor x0, Tensor alpha, Tensor sigma, {NOISE}) -> Tensor")
LOSS = f"Tensor output, Tensor x0, Tensor f, Tensor g, Tensor weight, Tensor? bound, {NOISE}"
# The loss and, if they are kept, the residual and the slope that its gradient is made of (else empty tensors).
_library.define(f"diffusion_loss({LOSS}, bool kept) -> (Tensor, Tensor, Tensor)")
# The result, the sum with the residual (empty without one) and the moments of the groups.
_library.define(
    "group_norm_silu(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift,"
    " Tensor? residual, bool silu) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "group_norm_silu_backward(Tensor grad, Tensor h, Tensor moments, int groups, Tensor? weight, Tensor? bias,"
    " Tensor? scale, Tensor? shift, bool silu, Tensor? more) -> (Tensor, Tensor)"
)
_library.define("guide(Tensor cond, Tensor uncond, Tensor scale, Tensor(a!) result) -> ()")
_library.define(
    "affine_step(Tensor x, Tensor output, Tensor table, int row, Tensor? rows, Tensor? uncond, Tensor[] history,"
    f" Tensor? anchor, {NOISE}, Tensor(a!) x_result, Tensor(b!)? x0_result, Tensor(c!)? h1_result,"
    " Tensor(d!)? anchor_result, Tensor(e!)? input_result) -> ()"
)


def traced(*values: Any) -> bool:
    """Whether PyTorch has to see the call: it is being compiled, or a gradient has to flow."""
    return torch.compiler.is_compiling() or needs_grad(*values)


def watched() -> bool:
    """Whether PyTorch follows each of its own operations: forward-mode gradients, torch.func, tracers, fake tensors.

    Then the reference runs, which is made of them; the other bodies write to memory behind PyTorch's back. Under vmap
    the first tensor of an op has to be batched if any is, for the result is made like it.
    """
    return (
        forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def quick(op: str, x: Tensor, *values: Any) -> Callable[..., None] | None:
    """The body that would run ``op``, if it checks its arguments itself and PyTorch need not see the call.

    A contract tries it first: looking at every argument from Python takes longer than a step on a small tensor. What
    it refuses, the contract then looks at as for any other backend, to say what is wrong or to make it fit.
    """
    if x.dtype == torch.float64 or traced(x, *values) or watched():
        return None
    return checked_body(op, "cuda" if x.is_cuda else "cpu")


def needs_grad(*values: Any) -> bool:
    if torch.is_grad_enabled():
        for value in values:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


def written(*results: Tensor | None) -> None:
    """Tell autograd that a body wrote to tensors the caller gave, as PyTorch's own operations do."""
    given = [result for result in results if result is not None]
    try:
        torch.autograd.graph.increment_version(given)
    except RuntimeError:  # tensors made in inference mode have no version
        torch.autograd.graph.increment_version([result for result in given if not result.is_inference()])


def wide(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 stays, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- calls ----------------------------------------------------------------------------------


def add_noise(x0: Tensor, alpha: Tensor | float, sigma: Tensor | float, noise: Noise) -> Tensor:
    run = torch.ops.fastdiff.add_noise if torch.compiler.is_compiling() else _AddNoise.apply
    result: Tensor = run(x0, _tensor(alpha), _tensor(sigma), *_flat(noise))
    return result


def diffusion_loss(
    output: Tensor, x0: Tensor, f: Tensor, g: Tensor, weight: Tensor, bound: Tensor | None, noise: Noise
) -> Tensor:
    kept = needs_grad(output) and not needs_grad(x0, f, g, weight, noise)  # then one pass serves the gradient too
    run = torch.ops.fastdiff.diffusion_loss if torch.compiler.is_compiling() else _DiffusionLoss.apply
    result: Tensor = run(output, x0, f, g, weight, bound, *_flat(noise), kept)[0]
    return result


def group_norm_silu(*arguments: Any) -> tuple[Tensor, Tensor]:
    run = torch.ops.fastdiff.group_norm_silu if torch.compiler.is_compiling() else _GroupNorm.apply
    result, total, _ = run(*arguments)
    return result, total


def guide(cond: Tensor, uncond: Tensor, scale: Tensor | float, result: Tensor) -> None:
    torch.ops.fastdiff.guide(cond, uncond, _tensor(scale), result)


def affine_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    row: int | Tensor,
    uncond: Tensor | None,
    history: tuple[Tensor, ...],
    anchor: Tensor | None,
    noise: Noise,
    results: tuple[Tensor | None, ...],
) -> None:
    number, rows = (0, row) if isinstance(row, Tensor) else (row, None)
    torch.ops.fastdiff.affine_step(
        x, output, table, number, rows, uncond, list(history), anchor, *_flat(noise), *results
    )


def _tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _number(value: Tensor) -> Tensor | float:
    return value if value.ndim else value.item()


def _flat(noise: Noise) -> Flat:
    """Noise as arguments of a schema."""
    if not isinstance(noise, Address):
        return noise, [], None, None, None
    (seed, seeds), (step, steps) = ((0, v) if isinstance(v, Tensor) else (v, None) for v in (noise.seed, noise.step))
    return None, [seed, step, noise.stream], seeds, steps, noise.sample


def _noise(
    noise: Tensor | None, place: list[int], seed: Tensor | None, step: Tensor | None, sample: Tensor | None
) -> Any:
    if not place:
        return noise
    return Address(place[0] if seed is None else seed, place[1] if step is None else step, sample, place[2])


# ---- what runs ------------------------------------------------------------------------------


def _run_add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, *noise: Any) -> Tensor:
    result = empty_like(x0)
    body("add_noise", x0.device, wide(x0))(x0, _number(alpha), _number(sigma), _noise(*noise), result)
    return result


def _run_diffusion_loss(output: Tensor, x0: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, residual, slope = _results_of_loss(output, x0, *rest)
    *each, bound = rest[:4]
    kept = (residual, None if bound is None else slope) if rest[-1] else (None, None)
    body("diffusion_loss", x0.device, wide(x0))(output, x0, *each, bound, _noise(*rest[4:-1]), loss, *kept)
    return loss, residual, slope


def _run_group_norm_silu(x: Tensor, groups: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    result, total, moments = _results_of_norm(x, groups, *rest)
    kept = None if rest[-2] is None else total
    body("group_norm_silu", x.device, wide(x))(x, groups, *rest, result, kept, moments)
    return result, total, moments


def _run_group_norm_silu_backward(grad: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    result, sums = _results_of_norm_backward(grad, h)
    if h.numel():
        body("group_norm_silu_backward", h.device, wide(h))(grad, h, *rest, result, sums)
    else:
        sums.zero_()
    return result, sums


def _results_of_norm(x: Tensor, groups: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if rest[-2] is None else empty_like(x)
    return empty_like(x), total, torch.empty((x.shape[0], groups, 2), dtype=wide(x), device=x.device)


def _results_of_norm_backward(grad: Tensor, h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like(h), torch.empty((*h.shape[:2], 2), dtype=wide(h), device=h.device)


def _run_guide(cond: Tensor, uncond: Tensor, scale: Tensor, result: Tensor) -> None:
    body("guide", cond.device, wide(cond))(cond, uncond, _number(scale), result)


def _run_affine_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    row: int,
    rows: Tensor | None,
    uncond: Tensor | None,
    history: list[Tensor],
    anchor: Tensor | None,
    *rest: Any,
) -> None:
    noise, results = _noise(*rest[:5]), rest[5:]
    at = row if rows is None else rows
    body("affine_step", x.device, x.dtype)(x, output, table, at, uncond, tuple(history), anchor, noise, results)


def _results_of_loss(output: Tensor, x0: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The residual has the output's dtype; slopes are beyond float16's range at times."""
    bound, kept = rest[3], rest[-1]
    like = partial(torch.empty, x0.shape if kept else (0,), device=x0.device)
    layout = {"memory_format": format_of(output)} if kept else {}
    residual = like(dtype=output.dtype, **layout)
    slope = like(dtype=wide(x0), **layout) if bound is not None else residual.new_empty(0)
    return torch.empty(x0.shape[:1], dtype=wide(x0), device=x0.device), residual, slope


for _name, _function in (
    ("add_noise", _run_add_noise),
    ("diffusion_loss", _run_diffusion_loss),
    ("group_norm_silu", _run_group_norm_silu),
    ("group_norm_silu_backward", _run_group_norm_silu_backward),
    ("guide", _run_guide),
    ("affine_step", _run_affine_step),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
torch.library.register_fake("fastdiff::add_noise", lambda x0, *_: empty_like(x0), lib=_library)
torch.library.register_fake("fastdiff::diffusion_loss", _results_of_loss, lib=_library)
torch.library.register_fake("fastdiff::group_norm_silu", _results_of_norm, lib=_library)
torch.library.register_fake("fastdiff::group_norm_silu_backward", _results_of_norm_backward, lib=_library)
torch.library.register_fake("fastdiff::guide", lambda *_: None, lib=_library)
torch.library.register_fake("fastdiff::affine_step", lambda *_: None, lib=_library)


# ---- gradients ------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the arguments: tensors as autograd keeps them, the rest as they are. Addressed noise is not among them."""
    ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))
    ctx.choice = choice()  # of this thread: on a GPU another one runs the backward pass
    ctx.others = [None if isinstance(v, Tensor) else (v,) for v in inputs]


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros for those, which have none
    _save(ctx, (*inputs, *kept), loss)


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]


def _spread(value: Tensor, x: Tensor) -> Tensor:
    value = value.to(x.device, wide(x))
    return value.reshape(-1, *(1,) * (x.ndim - 1)) if value.ndim else value


def _sum_like(product: Tensor, scale: Tensor) -> Tensor:
    """The gradient of a number, or one per sample, from that of its product with an element."""
    total = product.flatten(1).sum(1)
    return (total if scale.ndim else total.sum()).to(scale.device, scale.dtype)


def _drawn(x0: Tensor, *noise: Any) -> Tensor:
    source = _noise(*noise)
    return (source if isinstance(source, Tensor) else draw(x0.shape, source, x0.device)).to(wide(x0))


def _add_noise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x0, alpha, sigma, *noise = _saved(ctx)
    g, needs = grad.to(wide(x0)), ctx.needs_input_grad
    return (
        (_spread(alpha, x0) * g).to(x0.dtype) if needs[0] else None,
        _sum_like(g * x0, alpha) if needs[1] else None,
        _sum_like(g * _drawn(x0, *noise), sigma) if needs[2] else None,
        (_spread(sigma, x0) * g).to(noise[0].dtype) if needs[3] else None,
        *(None,) * 4,
    )


def _diffusion_loss_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    (*given, kept, residual, slope), needs = _saved(ctx), ctx.needs_input_grad
    output, x0, weight, bound = (given[i] for i in (0, 1, 4, 5))
    if grad is not None and kept and not torch.is_grad_enabled():
        batched = torch._C._functorch.is_legacy_batchedtensor(grad)  # by autograd.grad(is_grads_batched=True)
        kept_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        spent = getattr(ctx, "unseen", False) and not (batched or kept_graph)
        return _gradient_of_loss(grad, output, x0, weight, bound, residual, slope, spent), *(None,) * 11
    return *_follow(_reference_loss, given, needs, (grad,)), None


def _reference_loss(
    output: Tensor, x0: Tensor, f: Tensor, g: Tensor, weight: Tensor, bound: Tensor | None, *noise: Any
) -> tuple[Tensor]:
    return (reference.loss(output, x0, f, g, weight, bound, _noise(*noise)),)


def _gradient_of_loss(
    grad: Tensor,
    output: Tensor,
    x0: Tensor,
    weight: Tensor,
    bound: Tensor | None,
    residual: Tensor,
    slope: Tensor,
    spent: bool,
) -> Tensor:
    """The gradient of the output: plain operations, which a compiler fuses with those before them.

    ``spent``: nobody needs the residual after this, so its memory becomes the gradient's.
    """
    each = grad / max(math.prod(x0.shape[1:]), 1)
    factor = _spread(2 * weight * each, x0)
    gradient = residual.mul_(factor) if spent else residual * factor
    if output.shape != x0.shape:
        second = torch.zeros_like(gradient) if bound is None else _spread(bound[:, -1] * each, x0) * slope
        gradient = torch.cat((gradient, second), 1)
    return gradient.to(output.dtype)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, total, moments = output
    without = inputs[7] is None
    ctx.mark_non_differentiable(*((total, moments) if without else (moments,)))
    ctx.set_materialize_grads(False)
    _save(ctx, (*inputs, None if without else total, moments), output[0])


def _group_norm_backward(ctx: Any, grad: Tensor | None, more: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *given, total, moments = _saved(ctx)
    needs = ctx.needs_input_grad
    if grad is None or torch.is_grad_enabled():
        return _follow(reference.group_norm, given, needs, (grad, more))
    x, groups, weight, bias, _, scale, shift, residual, silu = given
    seen = torch.compiler.is_compiling() or watched() or torch._C._functorch.is_legacy_batchedtensor(grad)
    arguments = (grad, x if residual is None else total, moments, groups, weight, bias, scale, shift, silu, more)
    if seen:
        dx, sums = torch.ops.fastdiff.group_norm_silu_backward(*arguments)
    else:
        with backend(ctx.choice):
            dx, sums = _run_group_norm_silu_backward(*arguments)
    gradients: dict[int, Tensor] = {0: dx, 7: dx}
    if needs[2] or needs[3]:
        each = sums if scale is None else sums * (1 + scale.to(sums.dtype)).unsqueeze(2)
        gradients[3], gradients[2] = each.sum(0).t().contiguous().unbind(0)
    if needs[5] or needs[6]:
        plain, along = sums.unbind(2)
        inner = along if weight is None else weight.to(sums.dtype) * along
        gradients[5] = inner if bias is None else inner + bias.to(sums.dtype) * plain
        gradients[6] = plain
    return tuple(gradients[i].to(given[i].dtype) if need else None for i, need in enumerate(needs))


def _follow(
    function: Callable[..., tuple[Tensor, ...]], given: list[Any], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients that no kernel makes, or that are differentiated again: autograd follows the reference.

    It does so from aliases on, to stop at the arguments even where one was made of another.
    """
    with torch.enable_grad():
        given = [value.view_as(value) if need else value for value, need in zip(given, needs, strict=False)]
        pairs = [(result, grad) for result, grad in zip(function(*given), grads, strict=True) if grad is not None]
        if not pairs:
            return (None,) * len(given)
        results, gradients = zip(*pairs, strict=True)
        wanted = [value for value, need in zip(given, needs, strict=False) if need]
        slopes = iter(torch.autograd.grad(results, wanted, gradients, create_graph=True, allow_unused=True))
    return tuple(next(slopes) if need else None for need in needs[: len(given)])


torch.library.register_autograd("fastdiff::add_noise", _add_noise_backward, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "fastdiff::diffusion_loss", _diffusion_loss_backward, setup_context=_save_loss, lib=_library
)
torch.library.register_autograd(
    "fastdiff::group_norm_silu", _group_norm_backward, setup_context=_save_norm, lib=_library
)


def _eager(run: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """An op as eager autograd runs it, past the dispatcher.

    Without a ``setup_context`` of its own, for which PyTorch would look up the signature at every call.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        save(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(run.__name__, (torch.autograd.Function,), methods)


def _save_loss_unseen(ctx: Any, *rest: Any) -> None:
    _save_loss(ctx, *rest)
    ctx.unseen = True  # but by saved-tensor hooks, the residual leaves this module as a gradient only


_AddNoise = _eager(_run_add_noise, _save, _add_noise_backward)
_DiffusionLoss = _eager(_run_diffusion_loss, _save_loss_unseen, _diffusion_loss_backward)
_GroupNorm = _eager(_run_group_norm_silu, _save_norm, _group_norm_backward)
