"""Which samples training sees: one shuffled pass over the data after another, computed from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastdiff import noise
from fastdiff.errors import check

WINDOW = 4  #: groups that are shuffled into each other


class Order:
    """The order of the data: an endless sequence whose place g depends on (seed, g) only.

    So no position has to be kept to resume, and processes that take different places never meet.

    Args:
        count: samples in the data set.
        seed: of the order.
        groups: sizes of the groups of consecutive samples that lie in one file (tar shards). Groups are shuffled, and
            samples among ``WINDOW`` groups, so that few files are read at a time. None: samples are shuffled.

    Raises:
        InputError: no samples, or groups of another number of samples.
    """

    def __init__(self, count: int, seed: int, groups: Sequence[int] | None = None) -> None:
        check(count > 0, "the data set is empty")
        sizes = [count] if groups is None else groups
        check(min(sizes, default=0) >= 0, f"sizes of groups must be at least 0, got {min(sizes, default=0)}")
        check(sum(sizes) == count, f"groups must hold {count} samples in all, got {sum(sizes)}")
        self.count, self.seed, self.groups = count, seed, groups
        self._epoch, self._shuffled = -1, torch.empty(0)

    def __reduce__(self) -> tuple[type[Order], tuple[int, int, Sequence[int] | None]]:
        """Other processes draw their own permutations: they are large."""
        return Order, (self.count, self.seed, self.groups)

    def indices(self, first: int, count: int) -> Tensor:
        """The samples at places ``first`` ... ``first + count - 1``, int64 ``[count]`` in 0 ... self.count - 1."""
        check(first >= 0 and count >= 0, f"places start at 0, got {count} from {first} on")
        return torch.cat([torch.empty(0, dtype=torch.int64), *self._parts(first, count)])

    def _parts(self, first: int, count: int) -> Iterator[Tensor]:
        while count:
            epoch, offset = divmod(first, self.count)
            part = self._permutation(epoch)[offset : offset + count]
            yield part
            first, count = first + len(part), count - len(part)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            # torch's generators take only 32 bits on the CPU
            word = noise.uniform_words(1, seed=self.seed, step=epoch, stream=noise.Stream.ORDER)
            generator = torch.Generator().manual_seed(int(word))
            self._epoch, self._shuffled = epoch, self._shuffle(generator)
        return self._shuffled

    def _shuffle(self, generator: torch.Generator) -> Tensor:
        if self.groups is None:
            return torch.randperm(self.count, generator=generator)
        # in int32, which sorts twice as fast: more windows than that hold no samples
        window = (torch.randperm(len(self.groups), generator=generator) // WINDOW).to(torch.int32)
        window = window.repeat_interleave(torch.tensor(self.groups))
        shuffled = torch.randperm(self.count, generator=generator)
        return shuffled[torch.argsort(window[shuffled], stable=True)]
