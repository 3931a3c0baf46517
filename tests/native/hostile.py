"""Calls fastdiff._C with arguments that must be refused, each in a process of its own; prints those that were not.

One line per failure: the case and what happened. Run by tests/test_native.py.
"""

import os
import resource
import warnings

import numpy as np
import torch
from torch._subclasses import FakeTensorMode

from fastdiff import _C

warnings.simplefilter("ignore")
N, W, T = torch.zeros(2, 3, 4), torch.zeros(2), torch.zeros(3, 19)
NEW, WIDE, ROWS = torch.zeros(2, 3, 4), torch.zeros(2, 6, 4), torch.zeros(2, dtype=torch.int64)
PLACE = (0, 0, None, 0)


def freed(*shape, dtype=torch.float32):
    """A tensor whose memory was given back."""
    tensor = torch.zeros(2, *shape, dtype=dtype)[1]
    tensor.untyped_storage().resize_(0)
    return tensor


def fake():
    with FakeTensorMode():
        return torch.zeros(2, 3, 4)


STRANGE = {
    "none": None,
    "int": 1,
    "text": "x",
    "list": [[0.0]],
    "array": np.zeros((2, 3, 4), np.float32),
    "longer": torch.zeros(2, 3, 5),
    "wider": torch.zeros(2, 4, 4),
    "fewer samples": torch.zeros(1, 3, 4),
    "flat": torch.zeros(24),
    "no dimensions": torch.tensor(0.0),
    "empty": torch.zeros(0, 3, 4),
    "eight dimensions": torch.zeros(2, 3, 4, 1, 1, 1, 1, 1),
    "integers": N.long(),
    "bytes": N.to(torch.uint8),
    "booleans": N.bool(),
    "complex": N + 0j,
    "float8": N.to(torch.float8_e5m2),
    "sparse": N.to_sparse(),
    "meta": N.to("meta"),
    "freed": freed(2, 3, 4),
    "fake": fake(),
}


def step(x=N, output=N, table=T, row=0, uncond=None, history=(), anchor=None, noise=None, results=None, threads=1):
    results = (NEW, None, None, None, None) if results is None else results
    _C.affine_step(x, output, table, row, uncond, history, anchor, noise, results, threads)


def into(place, value):
    results = [NEW, None, None, None, None]
    results[place] = value
    return tuple(results)


def loss(output=N, x0=N, f=W, g=W, weight=W, bound=None, noise=N, result=W, residual=None, slope=None):
    _C.diffusion_loss(output, x0, f, g, weight, bound, noise, result, residual, slope, None, 1)


M, SUMS = torch.ones(2, 2, 3, 2)  # moments, and sums: as many groups as channels


def norm(x=N, residual=None, result=NEW, total=None, moments=None, groups=3, **more):
    parts = {"weight": None, "bias": None, "scale": None, "shift": None, **more}
    weight, bias, scale, shift = parts.values()
    _C.group_norm_silu(x, groups, weight, bias, 1e-5, scale, shift, residual, True, result, total, moments, 1)


def norm_backward(grad=N, x=N, moments=M, weight=None, more=None, result=NEW, sums=SUMS, groups=3):
    _C.group_norm_silu_backward(grad, x, moments, groups, weight, None, None, None, True, more, result, sums, 1)


CALLS = {
    "norm x": lambda v: norm(x=v),
    "norm result": lambda v: norm(result=v),
    "norm backward grad": lambda v: norm_backward(grad=v),
    "norm backward x": lambda v: norm_backward(x=v),
    "norm backward moments": lambda v: norm_backward(moments=v),
    "norm backward sums": lambda v: norm_backward(sums=v),
    "norm backward result": lambda v: norm_backward(result=v),
    "normal result": lambda v: _C.normal(v, PLACE, 1),
    "add_noise x0": lambda v: _C.add_noise(v, 1.0, 1.0, N, NEW, 1),
    "add_noise noise": lambda v: _C.add_noise(N, 1.0, 1.0, v, NEW, 1),
    "add_noise result": lambda v: _C.add_noise(N, 1.0, 1.0, N, v, 1),
    "guide cond": lambda v: _C.guide(v, N, 1.0, NEW, 1),
    "guide uncond": lambda v: _C.guide(N, v, 1.0, NEW, 1),
    "guide result": lambda v: _C.guide(N, N, 1.0, v, 1),
    "step x": lambda v: step(x=v),
    "step output": lambda v: step(output=v),
    "step history": lambda v: step(history=(v,)),
    "step x result": lambda v: step(results=into(0, v)),
    "loss output": lambda v: loss(output=v),
    "loss x0": lambda v: loss(x0=v),
    "loss noise": lambda v: loss(noise=v),
}
OPTIONAL = {
    "norm residual": lambda v: norm(residual=v),
    "norm sum": lambda v: norm(residual=N, total=v),
    "norm moments": lambda v: norm(moments=v),
    "norm weight": lambda v: norm(weight=v),
    "norm scale": lambda v: norm(scale=v),
    "norm backward more": lambda v: norm_backward(more=v),
    "norm backward weight": lambda v: norm_backward(weight=v),
    "step uncond": lambda v: step(uncond=v),
    "step anchor": lambda v: step(anchor=v),
    "step noise": lambda v: step(noise=v),
    "step x0 result": lambda v: step(results=into(1, v)),
    "step h1 result": lambda v: step(results=into(2, v), history=(N,)),
    "step anchor result": lambda v: step(results=into(3, v), anchor=N),
    "step input result": lambda v: step(results=into(4, v)),
    "loss residual": lambda v: loss(residual=v),
    "loss slope": lambda v: loss(output=WIDE, bound=torch.zeros(2, 8), slope=v),
}
FREE = ("longer", "wider", "fewer samples", "flat", "empty")  # other shapes, which are fine where nothing is to match
NUMBERS = {
    "none": None,
    "text": "x",
    "list": [1.0, 1.0],
    "longer": torch.zeros(3),
    "matrix": torch.zeros(2, 1),
    "integers": ROWS,
    "half": W.half(),
    "complex": 1j,
    "meta": W.to("meta"),
    "array": np.zeros(2),
    "freed": freed(2),
}
WHOLE = {
    "none": None,
    "text": "x",
    "half way": 0.5,
    "floats": W,
    "longer": torch.zeros(3, dtype=torch.int64),
    "int32": ROWS.int(),
    "meta": ROWS.to("meta"),
    "beyond 64 bits": 2**70,
    "freed": freed(2, dtype=torch.int64),
}
SINGLE = {
    "row before the first": lambda: step(row=-1),
    "row after the last": lambda: step(row=3),
    "huge row": lambda: step(row=2**62),
    "table of 18 letters": lambda: step(table=T[:, 1:]),
    "table of 20 letters": lambda: step(table=torch.zeros(3, 20)),
    "table sliced": lambda: step(table=torch.zeros(3, 38)[:, ::2]),
    "table of every other row": lambda: step(table=torch.zeros(6, 19)[::2]),
    "table turned": lambda: step(table=torch.zeros(19, 3).T),
    "table expanded": lambda: step(table=T[:1].expand(3, 19)),
    "table in float64": lambda: step(table=T.double()),
    "table of integers": lambda: step(table=T.long()),
    "table without rows": lambda: step(table=T[:0]),
    "table of one dimension": lambda: step(table=T[0]),
    "table without dimensions": lambda: step(table=T[0, 0]),
    "table none": lambda: step(table=None),
    "table freed": lambda: step(table=freed(3, 19)),
    "four in the history": lambda: step(history=(N,) * 4),
    "history a list": lambda: step(history=[N]),
    "history none": lambda: step(history=None),
    "history with a gap": lambda: step(history=(None, N)),
    "four results": lambda: step(results=(NEW, None, None, None)),
    "six results": lambda: step(results=(NEW,) + (None,) * 5),
    "no results": lambda: step(results=()),
    "results a list": lambda: step(results=[NEW, None, None, None, None]),
    "uncond narrower than output": lambda: step(output=WIDE, uncond=N),
    "uncond wider than output": lambda: step(uncond=WIDE),
    "output of thrice the channels": lambda: step(output=torch.zeros(2, 9, 4)),
    "address of three": lambda: step(noise=(0, 0, None)),
    "address of five": lambda: step(noise=(0, 0, None, 0, 0)),
    "address of nothing": lambda: step(noise=()),
    "address with a negative stream": lambda: step(noise=(0, 0, None, -1)),
    "address with a huge stream": lambda: step(noise=(0, 0, None, 2**32)),
    "threads none": lambda: step(threads=None),
    "threads beyond 32 bits": lambda: step(threads=2**40),
    "too few arguments": lambda: _C.guide(N, N),
    "no arguments": lambda: _C.affine_step(),
    "normal without an address": lambda: _C.normal(NEW, None, 1),
    "normal given noise": lambda: _C.normal(NEW, N, 1),
    "normal without dimensions": lambda: _C.normal(torch.tensor(0.0), PLACE, 1),
    "expanded result": lambda: _C.guide(N, N, 1.0, torch.zeros(1, 3, 4).expand(2, 3, 4), 1),
    "expanded x result": lambda: step(results=into(0, torch.zeros(2, 3, 1).expand(2, 3, 4))),
    "loss result too long": lambda: loss(result=torch.zeros(3)),
    "loss result sliced": lambda: loss(result=torch.zeros(4)[::2]),
    "loss result expanded": lambda: loss(result=torch.zeros(1).expand(2)),
    "loss result in float64": lambda: loss(result=W.double()),
    "loss result none": lambda: loss(result=None),
    "loss result a number": lambda: loss(result=0.0),
    "loss residual wider than the output": lambda: loss(residual=WIDE),
    "loss residual as wide as the output": lambda: loss(output=WIDE, residual=torch.zeros(2, 6, 4)),
    "loss slope without a bound": lambda: loss(output=WIDE, slope=NEW),
    "loss slope over the residual": lambda: loss(output=WIDE, bound=torch.zeros(2, 8), residual=NEW, slope=NEW),
    "loss over the weight": lambda: loss(weight=W, result=W),
    "loss residual expanded": lambda: loss(residual=torch.zeros(1, 3, 4).expand(2, 3, 4)),
    "loss residual over the output": lambda: loss(residual=N),
    "bound without a wide output": lambda: loss(bound=torch.zeros(2, 8)),
    "bound of another width": lambda: loss(output=WIDE, bound=torch.zeros(2, 3)),
    "bound a number": lambda: loss(output=WIDE, bound=1.0),
    "philox lists": lambda: _C.philox([[0] * 4], [[0] * 2], [[0] * 4]),
    "philox int64": lambda: _C.philox(*(np.zeros((1, n), np.int64) for n in (4, 2, 4))),
    "philox widths": lambda: _C.philox(*(np.zeros((1, n), np.uint32) for n in (4, 4, 4))),
    "philox lengths": lambda: _C.philox(*(np.zeros((m, n), np.uint32) for m, n in ((3, 4), (3, 2), (2, 4)))),
    "philox strides": lambda: _C.philox(*(np.zeros((4, n), np.uint32)[::2] for n in (4, 2, 4))),
    "philox read only": lambda: _C.philox(np.zeros((1, 4), np.uint32), np.zeros((1, 2), np.uint32), frozen()),
    "philox one dimension": lambda: _C.philox(*(np.zeros(n, np.uint32) for n in (4, 2, 4))),
    "use nothing": lambda: _C.use(""),
    "use another": lambda: _C.use("sse9"),
    "use none": lambda: _C.use(None),
}


def frozen():
    words = np.zeros((1, 4), np.uint32)
    words.flags.writeable = False
    return words


def cases():
    for name, call in CALLS.items():
        fit = FREE if name == "normal result" else ()
        yield from ((f"{name}: {kind}", lambda c=call, v=v: c(v)) for kind, v in STRANGE.items() if kind not in fit)
    for name, call in OPTIONAL.items():
        yield from ((f"{name}: {kind}", lambda c=call, v=v: c(v)) for kind, v in STRANGE.items() if v is not None)
    for name in ("alpha", "sigma"):
        for kind, v in NUMBERS.items():
            levels = (v, 1.0) if name == "alpha" else (1.0, v)
            yield f"{name}: {kind}", lambda s=levels: _C.add_noise(N, *s, N, NEW, 1)
    yield from ((f"scale: {kind}", lambda v=v: _C.guide(N, N, v, NEW, 1)) for kind, v in NUMBERS.items())
    yield from ((f"f: {kind}", lambda v=v: loss(f=v)) for kind, v in NUMBERS.items())
    yield from ((f"weight: {kind}", lambda v=v: loss(weight=v)) for kind, v in NUMBERS.items())
    yield from ((f"row: {kind}", lambda v=v: step(row=v)) for kind, v in WHOLE.items())
    for i, name in enumerate(("seed", "step", "sample")):
        for kind, v in WHOLE.items():
            if not (name == "sample" and kind == "none"):
                place = (*PLACE[:i], v, *PLACE[i + 1 :])
                yield f"{name}: {kind}", lambda p=place: _C.normal(NEW, p, 1)
    yield from SINGLE.items()


def outcome(call):
    """What became of a call: 0 refused, 1 accepted, 2 another exception; negative: the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        call()
        os._exit(1)
    except (ValueError, TypeError, RuntimeError, BufferError):  # the last two from torch and from Python's buffers
        os._exit(0)
    except BaseException:
        os._exit(2)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    count = 0
    for name, call in cases():
        count += 1
        result = outcome(call)
        if result:
            print(f"{name}: {'accepted' if result == 1 else 'another exception' if result == 2 else 'crashed'}")
    print(count, "cases")
