"""Pictures show what they say: the numbers and images that reach matplotlib, or the file, are as they should be."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from scipy import stats

import fastdiff as fd
from fastdiff import figures
from fastdiff.reproduce import plots

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The last figure that was saved."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure))
    return kept


def pixels(count: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, 4, 4), dtype=torch.uint8, generator=generator)


def to_raw(x: torch.Tensor) -> torch.Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image(axis) -> np.ndarray:
    return np.asarray(axis.get_images()[0].get_array())


def noised(diffusion: fd.Diffusion, x0: torch.Tensor, t: int) -> torch.Tensor:
    """By the definition, with the figure's own noise."""
    z = fd.noise.normal(x0.shape, seed=0, stream=fd.noise.Stream.TRAINING)
    return float(diffusion.schedule.alpha[t]) * x0 + float(diffusion.schedule.sigma[t]) * z


# ---- images -----------------------------------------------------------------------------------


def test_a_grid_has_a_row_for_each_name(tmp_path, drawn) -> None:
    first, second = pixels(3), pixels(2, seed=1)
    figures.labelled_grid(tmp_path / "a.png", [("one", first), ("two", second)], "both")
    axes = np.array(drawn[0].axes).reshape(2, 3)
    for row, images in zip(axes, (first, second), strict=True):
        for axis, expected in zip(row, images, strict=False):
            assert np.array_equal(image(axis), expected[0].numpy())
    assert not axes[1, 2].get_images()
    assert [row[0].get_ylabel() for row in axes] == ["one", "two"]


def test_a_strip_is_one_path_of_the_forward_process(tmp_path, drawn) -> None:
    diffusion = fd.Diffusion(fd.Schedule.cosine(50))
    x0 = torch.rand(2, 1, 4, 4) * 2 - 1
    figures.noising_strip(tmp_path / "a.png", diffusion, x0, to_raw, "title")
    axes = np.array(drawn[0].axes).reshape(2, 10)
    assert [axis.get_title() for axis in axes[0][:2]] == ["$x_0$", "t = 0"]
    for j in range(2):
        assert np.array_equal(image(axes[j, 0]), to_raw(x0[j])[0].numpy())
        for axis, title in zip(axes[j][1:], axes[0][1:], strict=True):
            expected = to_raw(noised(diffusion, x0, int(title.get_title().removeprefix("t = "))))[j, 0]
            assert np.abs(image(axis).astype(int) - expected.numpy()).max() <= 1
    assert axes[0, -1].get_title() == "t = 49"


@pytest.mark.parametrize("channels", [1, 3])
def test_an_animation_is_its_frames(tmp_path, channels) -> None:
    """GIF has 256 colours: of one channel every grey level, of three a palette near them."""
    frames = [pixels(4, channels, seed) for seed in range(3)]
    figures.animation(tmp_path / "a.gif", frames, columns=2, milliseconds=40)
    with Image.open(tmp_path / "a.gif") as film:
        shown = [np.asarray(each.convert("RGB")).astype(int) for each in ImageSequence.Iterator(film)]
        durations = [each.info["duration"] for each in ImageSequence.Iterator(film)]
    assert durations == [40, 40, 1000]
    for found, frame in zip(shown, frames, strict=True):
        for k, expected in enumerate(frame.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy().astype(int)):
            assert contains(found, expected, tolerance=0 if channels == 1 else 40), k


def contains(picture: np.ndarray, part: np.ndarray, tolerance: int) -> bool:
    """Whether ``part``, enlarged by a power of two, is somewhere in the picture: its corners of pixels are."""
    for scale in (1, 2, 4, 8, 16):
        reach = (len(part) - 1) * scale + 1
        windows = np.lib.stride_tricks.sliding_window_view(picture, (reach, reach), (0, 1))[..., ::scale, ::scale]
        if (np.abs(windows - part.transpose(2, 0, 1)).max(axis=(2, 3, 4)) <= tolerance).any():
            return True
    return False


# ---- points -----------------------------------------------------------------------------------


def test_trajectories_go_from_data_to_noise_and_back(tmp_path, drawn) -> None:
    diffusion = fd.Diffusion(fd.Schedule.cosine(100))
    data = torch.randn(20, 2)
    way = [torch.full((20, 2), float(k)) for k in range(5)]
    figures.point_trajectories(tmp_path / "a.png", diffusion, data, lambda x: x, way)
    above, below = np.array(drawn[0].axes).reshape(2, 5)
    assert np.allclose(above[0].collections[0].get_offsets(), data)
    for axis in above[1:]:
        t = int(axis.get_title().removeprefix("t = "))
        assert np.allclose(axis.collections[0].get_offsets(), noised(diffusion, data, t), atol=1e-5)
    assert above[-1].get_title() == "t = 99"
    shown = [float(axis.collections[0].get_offsets()[0, 0]) for axis in below]
    assert shown == [4, 3, 2, 1, 0]
    assert below[0].get_title() == "samples"
    assert len({axis.get_xlim() for axis in drawn[0].axes}) == 1


def test_scatters_share_the_first_s_axes(tmp_path, drawn) -> None:
    sets = {"data": torch.rand(30, 2), "samples": torch.rand(10, 2) * 5}
    plots.scatters(tmp_path / "a.png", sets)
    for axis, (name, points) in zip(drawn[0].axes, sets.items(), strict=True):
        assert axis.get_title() == name
        assert np.allclose(axis.collections[0].get_offsets(), points)
        low, high = sets["data"].amin(0), sets["data"].amax(0)
        assert np.allclose(axis.get_xlim(), (low[0] - (high - low)[0] / 10, high[0] + (high - low)[0] / 10))


# ---- means and intervals ----------------------------------------------------------------------

VALUES = [[1.0, 2.0, 4.0], [3.0, 3.5, 5.0], [8.0, 8.0, 8.0]]


def interval(values: list[float]) -> tuple[float, float]:
    return stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=max(stats.sem(values), 1e-12))


def test_curves_are_means_in_bands_of_their_intervals(tmp_path, drawn) -> None:
    plots.curves(tmp_path / "a.png", {"FID": {"one": VALUES, "two": VALUES[::-1]}}, [1, 2, 4], "steps", logx=True)
    [axis] = drawn[0].axes
    for line, band, values in zip(axis.get_lines(), axis.collections, (VALUES, VALUES[::-1]), strict=True):
        assert np.allclose(line.get_xdata(), [1, 2, 4])
        assert np.allclose(line.get_ydata(), np.mean(values, 1))
        corners = band.get_paths()[0].vertices
        for x, each in zip((1, 2, 4), values, strict=True):
            at = corners[np.isclose(corners[:, 0], x), 1]
            assert np.allclose((at.min(), at.max()), interval(each), atol=1e-5)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["one", "two"]
    assert axis.get_ylabel() == "FID"


def test_bars_are_means_with_their_intervals(tmp_path, drawn) -> None:
    plots.bars(tmp_path / "a.png", {"FID": dict(zip("abc", VALUES, strict=True))})
    [axis] = drawn[0].axes
    assert np.allclose([bar.get_height() for bar in axis.patches], np.mean(VALUES, 1))
    ends = [segment[:, 1] for segment in axis.collections[0].get_segments()]
    assert np.allclose(ends, [interval(each) for each in VALUES], atol=1e-5)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b", "c"]
