"""The order of the data is a function of (seed, place): golden, a permutation in every epoch, local among files."""

import pickle
import time

import pytest
import torch

from fastdiff import InputError
from fastdiff.noise import Stream, uniform_words
from fastdiff.training.order import WINDOW, Order

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [5, 9, 1, 7, 7, 3, 8, 0, 6, 4, 2, 8]


def reference(count, seed, epoch):
    """What runs have drawn since the first one."""
    word = uniform_words(1, seed=seed, step=epoch, stream=Stream.ORDER)
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(word)))


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (7, 3), (1797, -1), (1000, 2**63 - 1)])
def test_golden(count, seed):
    order = Order(count, seed)
    for epoch in (0, 1, 2, 1000, 0):
        assert torch.equal(order.indices(epoch * count, count), reference(count, seed, epoch))


def test_golden_numbers():
    assert Order(10, 3).indices(0, 12).tolist() == [6, 5, 9, 8, 7, 1, 2, 0, 4, 3, 5, 4]
    grouped = [11, 13, 12, 15, 18, 14, 10, 19, 9, 3, 8, 17, 0, 16, 2, 1, 6, 4, 5, 7]
    assert Order(20, 3, 10 * [2]).indices(0, 20).tolist() == grouped


@pytest.mark.parametrize("groups", [None, SIZES, [60], 60 * [1]])
def test_every_epoch_has_every_sample_once(groups):
    order = Order(60, 5, groups)
    epochs = [order.indices(60 * epoch, 60) for epoch in range(50)]
    assert all(torch.equal(epoch.sort().values, torch.arange(60)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 50
    assert epochs[0].dtype == torch.int64


@pytest.mark.parametrize("groups", [None, SIZES])
def test_any_stretch_is_a_part_of_the_whole(groups):
    whole = Order(60, 5, groups).indices(0, 600)
    order = Order(60, 5, groups)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        first, count = (int(torch.randint(0, 300, (), generator=generator)) for _ in range(2))
        assert torch.equal(order.indices(first, count), whole[first : first + count])


def test_seeds_and_groups_matter():
    draws = [Order(60, seed, groups).indices(0, 60).tolist() for seed in (1, 2, -1) for groups in (None, SIZES)]
    assert len(set(map(tuple, draws))) == 6


def test_few_groups_at_a_time():
    """Each group lies in one window of 4, and there all over: reading opens each file once."""
    sizes = [30] * 40
    order = Order(1200, 7, sizes)
    firsts = []
    for epoch in range(20):
        groups = order.indices(1200 * epoch, 1200).reshape(-1, WINDOW * 30) // 30
        assert all(len(window.unique()) == WINDOW for window in groups)
        assert all((window.bincount() == 30).sum() == WINDOW for window in groups)
        # within a window neighbours come from the same group as often as chance has it
        same = (groups[:, 1:] == groups[:, :-1]).double().mean()
        assert abs(float(same) - 29 / 119) < 0.08
        firsts.append(tuple(groups[0].unique().tolist()))
    assert len(set(firsts)) == 20


def test_samples_are_anywhere_in_the_end():
    """Where one sample lies is uniform over seeds, by groups too: a chi-square test with 12 bins."""
    for groups in (None, [10] * 12):
        places = [int((Order(120, seed, groups).indices(0, 120) == 17).nonzero()) for seed in range(600)]
        counts = torch.tensor(places).bincount(minlength=120).reshape(12, 10).sum(1).double()
        assert ((counts - 50) ** 2 / 50).sum() < 35  # 11 degrees of freedom: p = 0.0002


def test_pickled_without_its_permutation():
    order = Order(10_000, 3, [5000, 5000])
    expected = order.indices(9_000, 2_000)
    content = pickle.dumps(order)
    assert len(content) < 1000
    assert torch.equal(pickle.loads(content).indices(9_000, 2_000), expected)


@pytest.mark.slow
def test_large_sets():
    began = time.perf_counter()
    order = Order(10_000_000, 0, [10_000] * 1000)
    first = order.indices(10_000_000 - 100, 200)
    assert time.perf_counter() - began < 30
    assert len(first) == 200
    epoch = order.indices(10_000_000, 10_000_000)
    assert torch.equal(epoch.bincount(), torch.ones(10_000_000, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 1), "the data set is empty"),
        ((5, 1, [2, 2]), "groups must hold 5 samples in all, got 4"),
        ((5, 1, []), "groups must hold 5"),
        ((5, 1, [6, -1]), "at least 0, got -1"),
    ],
)
def test_refusals(arguments, expected):
    with pytest.raises(InputError, match=expected):
        Order(*arguments)


def test_no_places_before_the_first():
    with pytest.raises(InputError, match="places start at 0"):
        Order(5, 0).indices(-1, 3)
    assert Order(5, 0).indices(3, 0).tolist() == []
