"""Which timesteps of a chain are kept, in guided-diffusion's words, and its linear schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, repeat
from numbers import Integral

from fastdiff.errors import check
from fastdiff.schedule import Schedule

LEAST = 20  #: steps at which the last beta of the linear schedule is 1


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The timesteps that a chain of ``num_timesteps`` keeps, 0 ... num_timesteps - 1.

    Args:
        section_counts: how many of each of so many sections of equal length (the first ones are longer by one where it
            does not divide), ``"10,15,20"`` or ``[10, 15, 20]``, from a section's first to its last at equal distances;
            ``"250"`` of one section; ``"ddim50"`` at one whole stride from 0 (Song et al. 2021); ``""`` for all.

    Raises:
        InputError: what is no list of whole numbers, a section with fewer timesteps than are to be kept, a number
            after ``ddim`` that no whole stride gives.
    """
    check(is_whole(num_timesteps) and num_timesteps >= 1, f"num_timesteps must be at least 1, got {num_timesteps!r}")
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _at_one_stride(num_timesteps, section_counts)
    counts = _counts(section_counts) or [num_timesteps]
    size, longer = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    for i, count in enumerate(counts):
        first, width = i * size + min(i, longer), size + (i < longer)
        fits = 0 <= count <= width
        check(fits, f"section {i + 1} of {section_counts!r} has {width} of {num_timesteps} timesteps, not {count}")
        kept |= {first + at for at in _evenly(width, count)}
    check(kept, f"{section_counts!r} keeps no timestep")
    return kept


def linear(steps: int) -> Schedule:
    """Betas from 0.1 / T to 20 / T, those of Ho et al. 2020 at T = 1000."""
    check(steps > LEAST, f"steps of a linear schedule (betas to 20 / steps) must be more than {LEAST}, got {steps}")
    scale = 1000 / steps
    return Schedule.linear(steps, beta_start=1e-4 * scale, beta_end=0.02 * scale)


def _at_one_stride(total: int, text: str) -> set[int]:
    """``ddimN``; like theirs, only for N that a stride of 1 ... total - 1 gives exactly."""
    counts = {len(range(0, total, stride)): stride for stride in range(total - 1, 0, -1)}  # the smallest stride stays
    count = _counts(text.removeprefix("ddim"))
    check(len(count) == 1, f"timestep_respacing {text!r} must be ddim and one whole number, such as ddim50")
    near = " or ".join(f"ddim{n}" for n in sorted(counts, key=lambda n: abs(n - count[0]))[:2])
    advice = f"take {near}, or {count[0]} without ddim" if near else "take 1"
    check(count[0] in counts, f"no whole stride takes {count[0]} of {total} timesteps ({text}): {advice}")
    return set(range(0, total, counts[count[0]]))


def _counts(text: str | Sequence[int]) -> list[int]:
    """The numbers of a list; none of an empty one."""
    try:
        counts = [int(part) for part in text.split(",") if text] if isinstance(text, str) else list(text)
    except (TypeError, ValueError):
        counts = [None]  # type: ignore[list-item]
    check(
        all(map(is_whole, counts)),
        f"timestep_respacing must be whole numbers such as '250' or '10,15,20', or 'ddim50', got {text!r}",
    )
    return counts


def _evenly(width: int, count: int) -> Iterator[int]:
    """``count`` of 0 ... width - 1, with both ends. Strides are added up, as theirs are, which decides about halves."""
    stride = (width - 1) / (count - 1) if count > 1 else 1.0
    return map(round, islice(accumulate(repeat(stride), initial=0.0), count))


def is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
