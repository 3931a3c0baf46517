"""What a recipe leaves behind: figures, tables and claims, written as one ``report.json`` beside its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from fastdiff import _io
from fastdiff.errors import check

REPORT = "report.json"


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and the half width of its 95 % interval (Student's), None of a single seed."""

    value: float
    margin: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of one value or more."""
        n = len(values)
        margin = None if n < 2 else float(stats.t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)
        return cls(fmean(values), margin)

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.margin is None else f"{self.value:.4g} ± {self.margin:.2g}"


@dataclass
class Page:
    """The results of one recipe.

    Args:
        folder: of the recipe's files.
        name: of the recipe.
        title, text: what is shown above the results.
    """

    folder: Path
    name: str
    title: str
    text: str
    figures: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)

    def figure(self, file: str, caption: str, draw: Callable[..., None], *what: Any, **how: Any) -> None:
        """A picture that ``draw(path, *what, **how)`` writes."""
        draw(self.folder / file, *what, **how)
        self.figures.append({"file": file, "caption": caption})

    def table(self, caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Rows of text, numbers, or values over seeds, of which mean and interval are shown."""
        check(all(len(row) == len(columns) for row in rows), f"each row of {caption!r} must have {len(columns)} cells")
        cells = [[_cell(cell) for cell in row] for row in rows]
        self.tables.append({"caption": caption, "columns": list(columns), "rows": cells})

    def claim(self, text: str, larger: Sequence[float], smaller: Sequence[float], *, factor: float = 1.0) -> None:
        """An ordering of the sources: ``larger`` is above ``factor * smaller``, seed by seed.

        Whether it holds is said by the 95 % interval of the mean difference: above zero it ``holds``, below zero it is
        ``reversed``, else (or with one seed) it is ``open``.
        """
        differences = [a - factor * b for a, b in zip(larger, smaller, strict=True)]
        mean = Mean.of(differences)
        low, high = (
            (-math.inf, math.inf) if mean.margin is None else (mean.value - mean.margin, mean.value + mean.margin)
        )
        verdict = "holds" if low > 0 else "reversed" if high < 0 else "open"
        sides = {"larger": _cell(larger), "smaller": _cell(smaller), "factor": factor, "difference": _cell(differences)}
        self.claims.append({"text": text, "verdict": verdict, **sides})

    def save(self, **about: Any) -> None:
        """Write the report: ``about`` are command, settings and seconds."""
        content = {"name": self.name, "title": self.title, "text": self.text, **about}
        results = {"figures": self.figures, "tables": self.tables, "claims": self.claims}
        _io.replace_json(self.folder / REPORT, content | results)


def shown(cell: Any) -> str:
    """A cell of a table, or a side of a claim, as people read it."""
    if isinstance(cell, dict):
        return str(Mean(cell["value"], cell["margin"]))
    return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _cell(value: Any) -> Any:
    """As JSON: text and numbers as they are, values over seeds with their mean and margin."""
    if isinstance(value, (str, int, float)) or value is None:
        return value
    values = [float(each) for each in value]
    return {**asdict(Mean.of(values)), "values": values}
