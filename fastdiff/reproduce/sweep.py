"""What two recipes of guidance show: scores by how strong it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdiff.reproduce import plots
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.studio import SCORES, Score


def sweep(
    page: Page,
    symbol: str,
    scores: Mapping[float, Sequence[Score]],
    compared: float,
    what: str,
    more: Sequence[tuple[str, Sequence[Score]]] = (),
) -> None:
    """Curves and a table of scores over networks, and what guidance of one strength claims against none.

    Args:
        symbol: of the strength.
        scores: by strength, of each network; the first is without guidance.
        compared: the strength of the claims.
        what: the samples are.
        more: rows of the table.
    """
    columns = {strength: list(zip(*each, strict=True)) for strength, each in scores.items()}
    panels = {name: {name: [column[i] for column in columns.values()]} for i, name in enumerate(SCORES)}
    caption = f"{what}: more guidance, more of what was asked for, less variety; mean and 95 % interval over networks"
    page.figure("sweep.png", caption, plots.curves, panels, list(scores), symbol)
    rows: list[Sequence[Any]] = [[f"{symbol} = {strength:g}", *each] for strength, each in columns.items()]
    rows += [[name, *zip(*each, strict=True)] for name, each in more]
    page.table(what, ["", *SCORES], rows)
    none, some = scores[next(iter(scores))], scores[compared]
    page.claim(
        f"{symbol} = {compared:g} raises the share that is read as asked for",
        *([score.accuracy for score in each] for each in (some, none)),
    )
    page.claim(
        f"{symbol} = {compared:g} lowers the diversity within a class",
        *([score.diversity for score in each] for each in (none, some)),
    )
