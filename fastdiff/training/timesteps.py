"""How training draws timesteps, with the weights that keep the mean loss what it is, and what the loss is by timestep.

A draw belongs to (seed, training step, position in the global batch), whatever process draws it. What is remembered
lies on one device, which nothing here waits for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import noise
from fastdiff.errors import check
from fastdiff.losses import brought, timestep_words
from fastdiff.schedule import Schedule

WORDS = 2**32
HISTORY = 10  # losses of a timestep that are remembered (Nichol & Dhariwal 2021, section 3.3)
UNIFORM = 0.001  # share of the draws that any timestep may get


class Timesteps:
    """Uniform timesteps: those that :class:`fastdiff.Diffusion` draws by itself.

    A timestep owns a range of the 32-bit words, and what owns a word is looked up: the probability of a timestep is a
    multiple of 2^-32 that is known exactly.

    Args:
        schedule: of the training's diffusion.
        batch: samples in a training step, of all processes together.
        seed: of the run.
        device: where timesteps are wanted.
    """

    learns = False  #: whether :meth:`update` does anything

    def __init__(self, schedule: Schedule, *, batch: int, seed: int = 0, device: torch.device | str = "cpu") -> None:
        noise.check_seed(seed)
        check(isinstance(batch, int) and 0 < batch < 2**31, f"batch must be 1...2**31-1, got {batch!r}")
        self.timesteps, self.batch, self.seed, self.device = len(schedule), batch, seed, torch.device(device)
        self._uniform = _even_ends(self.timesteps).to(self.device)
        self._ends = self._uniform.clone()
        self._weights = torch.ones(self.timesteps, device=self.device)

    def draw(self, positions: Tensor, *, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps, int64, and the weights of their losses, float32, both ``[n]``.

        Args:
            positions: int64 ``[n]``, 0 ... batch-1, of the samples in the global batch.
            step: of training.
        """
        t = torch.searchsorted(self._ends, self._words(positions, step).contiguous(), right=True)
        return t, self._weights.index_select(0, t)

    @property
    def probabilities(self) -> Tensor:
        """Of each timestep to be drawn at a position, float64 ``[T]``."""
        return _widths(self._ends).double() / WORDS

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take note of a step: the whole global batch's timesteps and losses without weights, ``[batch]``, in order."""

    def state(self) -> dict[str, Tensor]:
        """What the next draws depend on beside seed and step."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a :meth:`state`.

        Raises:
            InputError: the state of something else.
        """
        mine = {name: (value.shape, value.dtype) for name, value in self.state().items()}
        given = {name: (value.shape, value.dtype) for name, value in state.items()}
        check(mine == given, f"the state of the timesteps must hold {_listed(mine)}, got {_listed(given)}")

    def _words(self, positions: Tensor, step: int | Tensor) -> Tensor:
        return timestep_words(len(positions), seed=self.seed, step=step, sample=positions, device=self.device)


class Stratified(Timesteps):
    """One offset for a step, u_i = (u + i / B) mod 1 for position i of B (Kingma et al. 2021, appendix I.1).

    Each timestep is as likely as any at every position, and the mean over a batch varies less.
    """

    def draw(self, positions: Tensor, *, step: int | Tensor) -> tuple[Tensor, Tensor]:
        # u B + i: which of the B strata, and where in it, in whole numbers of 2^-32.
        offset = self._words(positions.new_zeros(1), step)
        place = offset * self.batch + (brought(positions, self.device) << 32)
        stratum, within = (place >> 32) % self.batch, place & noise.MASK
        t = (stratum * self.timesteps + (within * self.timesteps >> 32)) // self.batch
        return t, self._weights.index_select(0, t)


class LogNormal(Timesteps):
    """log(sigma / alpha) ~ N(mean, std**2), each at the nearest timestep (Karras et al. 2022, table 1).

    As there, the distribution is a weight of the objective, which no other weight takes back.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        batch: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        mean: float = -1.2,
        std: float = 1.2,
    ) -> None:
        super().__init__(schedule, batch=batch, seed=seed, device=device)
        check(std > 0, f"std must be positive, got {std}")
        level = -schedule.log_snr / 2
        between = (level[1:] + level[:-1]) / 2
        ends = torch.special.ndtr((between - mean) / std) * WORDS
        self._ends = ends.ceil().long().to(self.device)


class SecondMoment(Timesteps):
    """Timesteps as likely as the root mean square of their latest losses (Nichol & Dhariwal 2021, section 3.3).

    Uniform until all have a history. The weight 1 / (T p_t) keeps the expectation of the loss.
    """

    learns = True

    def __init__(self, schedule: Schedule, *, batch: int, seed: int = 0, device: torch.device | str = "cpu") -> None:
        super().__init__(schedule, batch=batch, seed=seed, device=device)
        # One more place takes what is forgotten at once.
        self._history = torch.zeros(self.timesteps * HISTORY + 1, device=self.device)
        self._count = torch.zeros(self.timesteps, dtype=torch.int64, device=self.device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        t, order = t.to(self.device).sort(stable=True)
        self._count.index_add_(0, t, torch.ones_like(t))
        later = torch.searchsorted(t, t, right=True) - 1 - torch.arange(len(t), device=t.device)
        place = t * HISTORY + (self._count[t] - 1 - later) % HISTORY
        place = place.masked_fill(later >= HISTORY, len(self._history) - 1)
        self._history[place] = losses.detach().to(self._history)[order]
        self._look_back()

    def state(self) -> dict[str, Tensor]:
        return {"history": self._losses.clone(), "count": self._count.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self._losses.copy_(state["history"])
        self._count.copy_(state["count"])
        self._look_back()

    @property
    def _losses(self) -> Tensor:
        """The latest losses ``[T, HISTORY]``, each timestep's in turns."""
        return self._history[:-1].view(self.timesteps, HISTORY)

    def _look_back(self) -> None:
        """Ranges of words and weights by the losses so far."""
        full = (self._count >= HISTORY).all()
        size = self._losses.double().square().mean(1).sqrt()
        share = size / size.sum()
        share = share.masked_fill(~share.isfinite().all(), 1 / self.timesteps)  # no losses but 0, or one that is none
        share = (1 - UNIFORM) * share + UNIFORM / self.timesteps
        # Whole numbers, for sums of others depend on their order, which differs on a GPU from run to run.
        ends = (share * WORDS).long().cumsum(0)[:-1]
        weights = WORDS / (self.timesteps * _widths(ends).double())
        # In place, where a captured step looks.
        self._ends.copy_(torch.where(full, ends, self._uniform))
        self._weights.copy_(torch.where(full, weights.float(), torch.ones_like(self._weights)))


SAMPLERS: dict[str, type[Timesteps]] = {
    "uniform": Timesteps,
    "stratified": Stratified,
    "lognormal": LogNormal,
    "second_moment": SecondMoment,
}


class LossTable:
    """The mean loss by equal parts of the timesteps, the cleanest first.

    Args:
        timesteps: T.
        device: of the losses.
        bins: parts, 4 for quarters.
    """

    def __init__(self, timesteps: int, device: torch.device | str = "cpu", *, bins: int = 4) -> None:
        check(1 <= bins <= timesteps, f"bins must lie in 1...{timesteps}, got {bins}")
        self.timesteps, self.bins = timesteps, bins
        #: sums of losses and their numbers, [2, bins]
        self.totals = torch.zeros(2, bins, dtype=torch.float64, device=device)

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Losses without weights, and their timesteps, ``[n]``."""
        outside = (t * self.bins // self.timesteps)[:, None] != torch.arange(self.bins, device=t.device)
        self.totals[0] += losses.detach().double()[:, None].masked_fill(outside, 0).sum(0)
        self.totals[1] += (~outside).sum(0)

    def means(self) -> list[float]:
        """The means since the last :meth:`reset`, NaN where there was no loss; reads the device."""
        return (self.totals[0] / self.totals[1]).tolist()

    def reset(self) -> None:
        """Forget."""
        self.totals.zero_()


def _even_ends(timesteps: int) -> Tensor:
    """Where the ranges of words end, but the last one, if word w belongs to timestep T w >> 32."""
    return (torch.arange(1, timesteps) * WORDS + timesteps - 1) // timesteps


def _widths(ends: Tensor) -> Tensor:
    """How many words each timestep owns."""
    return torch.nn.functional.pad(ends, (1, 0)).diff(append=ends.new_full((1,), WORDS))


def _listed(state: dict[str, tuple[torch.Size, torch.dtype]]) -> str:
    return ", ".join(f"{name} {list(shape)} {dtype}" for name, (shape, dtype) in state.items()) or "nothing"
