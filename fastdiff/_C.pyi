"""The compiled extension: the bodies of the native backend, each with the number of threads as its last argument."""

from typing import Any

cuda: bool

def normal(result: Any, address: Any, threads: int) -> None: ...
def add_noise(x0: Any, alpha: Any, sigma: Any, noise: Any, result: Any, threads: int) -> None: ...
def guide(cond: Any, uncond: Any, scale: Any, result: Any, threads: int) -> None: ...
def affine_step(
    x: Any,
    output: Any,
    table: Any,
    row: Any,
    uncond: Any,
    history: tuple[Any, ...],
    anchor: Any,
    noise: Any,
    results: tuple[Any, ...],
    threads: int,
) -> None: ...
def diffusion_loss(
    output: Any,
    x0: Any,
    f: Any,
    g: Any,
    weight: Any,
    bound: Any,
    noise: Any,
    result: Any,
    residual: Any,
    slope: Any,
    sums: Any,
    threads: int,
) -> None: ...
def group_norm_silu(
    x: Any,
    groups: int,
    weight: Any,
    bias: Any,
    eps: float,
    scale: Any,
    shift: Any,
    residual: Any,
    silu: bool,
    result: Any,
    sum: Any,
    moments: Any,
    threads: int,
) -> None: ...
def group_norm_silu_backward(
    grad: Any,
    x: Any,
    moments: Any,
    groups: int,
    weight: Any,
    bias: Any,
    scale: Any,
    shift: Any,
    silu: bool,
    more: Any,
    result: Any,
    sums: Any,
    threads: int,
) -> None: ...
def chunks(elements: int) -> int: ...
def philox(counters: Any, keys: Any, words: Any) -> None: ...
def level() -> str: ...
def levels() -> list[str]: ...
def use(level: str) -> None: ...
