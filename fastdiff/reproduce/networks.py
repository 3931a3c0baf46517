"""The networks of a gallery: each is trained once, and several side by side, for one of them seldom uses all cores."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

import torch

from fastdiff import _io, backends
from fastdiff.errors import InputError
from fastdiff.training import checkpoint
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Data, load
from fastdiff.training.saving import Signals
from fastdiff.training.trainer import Trainer

_ENDED = "by too little memory, from outside, or because a script lacks its if __name__ == '__main__':"


@dataclass(frozen=True)
class Network:
    """What a network is: its folder follows from it, below ``home``.

    Attributes:
        data: the name of a data set.
        mark: of all settings that numbers depend on.
    """

    home: Path
    config: TrainConfig
    data: str
    image_size: int | None
    device: str
    backend: str
    mark: str

    @classmethod
    def of(cls, home: Path, config: TrainConfig, data: Data, name: str, image_size: int | None, device: str) -> Network:
        """Of data that are loaded, to be trained by the backend that is chosen now."""
        what = {"data": data.to_json(), "count": len(data), "training": asdict(config)}
        if config.model.endswith(".json"):
            what["model"] = _io.read_json(Path(config.model))
        mark = hashlib.sha256(_io.to_json(what)).hexdigest()[:10]
        return cls(home, config, name, image_size, device, backends.choice(), mark)

    @property
    def folder(self) -> Path:
        return self.home / f"{self.data.partition(':')[0]}-{self.mark}"

    @property
    def is_trained(self) -> bool:
        """Whether its last step is there."""
        kept = checkpoint.steps(self.folder)
        return bool(kept) and kept[0].name == f"step-{self.config.train_steps:08d}"

    def train(self) -> bool:
        """To its end, from where it had come; whether it was reached."""
        data = load(self.data, image_size=self.image_size)
        with backends.backend(self.backend):
            return Trainer(self.config, data, self.folder, device=self.device, resume="auto").train()


def train(networks: Sequence[Network]) -> None:
    """Train those that are not, on a CPU with cores for several side by side.

    Raises:
        InputError: what training has to say; a process that was ended from outside.
        SystemExit: asked to end. What was done is saved, and the same command goes on from it.
    """
    missing = [network for network in networks if not network.is_trained]
    count = min(len(missing), torch.get_num_threads()) if all(each.device == "cpu" for each in missing) else 1
    if not (_side_by_side(missing, count) if count > 1 else all(network.train() for network in missing)):
        raise SystemExit(Signals.STATUS)


def _side_by_side(networks: Sequence[Network], count: int) -> bool:
    """Each process has its share of networks and of threads; the first shows how far it is."""
    threads, context = torch.get_num_threads() // count, multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context) as pool, Signals() as signals:
        shares = [pool.submit(_share, networks[i::count], threads, i == 0) for i in range(count)]
        try:
            return _all(shares, signals)
        except BrokenProcessPool:
            if signals.received:
                return False
            raise InputError(f"a training process ended: {_ENDED}") from None


def _all(shares: Sequence[Future[bool]], signals: Signals) -> bool:
    """Wait for all, and pass on once that an end is asked for."""
    waiting, told = set(shares), False
    while waiting:
        done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
        for each in done:
            each.result()
        if signals.received and not told:
            told = True
            for process in multiprocessing.active_children():
                process.terminate()
    return all(each.result() for each in shares)


def _share(networks: Sequence[Network], threads: int, shown: bool) -> bool:
    torch.set_num_threads(threads)
    with Signals() as signals:
        for network in networks:
            if not (network.train() if shown else _quietly(network)) or signals.received:
                return False
    return True


def _quietly(network: Network) -> bool:
    with redirect_stderr(StringIO()):
        return network.train()
