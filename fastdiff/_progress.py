"""A progress bar on a terminal, a few plain lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], total: int, description: str, *, start: int = 0, enabled: bool = True) -> Iterator[T]:
    """Pass ``items`` on and show on standard error how many of ``total`` are done; ``start`` were done before."""
    if not enabled:
        return iter(items)
    if sys.stderr.isatty():
        return iter(tqdm(items, total=total, desc=description, initial=start))
    return _lines(items, total, description, start)


def _lines(items: Iterable[T], total: int, description: str, start: int) -> Iterator[T]:
    """Ten lines in all, however long it takes."""
    began, tenth = time.monotonic(), max(1, total // 10)
    for done, item in enumerate(items, start + 1):
        yield item
        if done % tenth == 0 or done == total:
            print(f"{description}: {done}/{total} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
