"""What a gallery found, for the project's own pages: ``python -m fastdiff.reproduce.summary runs/reproduce``.

In a clone: keeps the reports' claims in ``benchmarks/results/reproduce.json``, and from that file writes ``RESULTS.md``
beside this one and the block of the README; and copies the pictures that the README shows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdiff import _io
from fastdiff.errors import check
from fastdiff.reproduce.page import REPORT, shown
from fastdiff.reproduce.recipes import NAMES

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "reproduce.json"
RESULTS = Path(__file__).with_name("RESULTS.md")
README, IMAGES = ROOT / "README.md", ROOT / ".github" / "images"
MARKS = "<!-- reproduce -->\n", "<!-- /reproduce -->\n"
#: pictures of recipes that the README shows, with what they are
PICTURES = {
    "sohl-dickstein/trajectories.png": "A swiss roll, noised (above) and made of noise (below)",
    "disturbances/fid.png": "The Fréchet distance by six disturbances of digits",
    "iddpm/bits.png": "Bits per dimension by the number of steps: fixed and learned variance",
}
VERDICTS = {"holds": "holds", "open": "neither shown nor refuted", "reversed": "does not hold"}


def kept(folder: Path) -> dict[str, Any]:
    """The claims and settings of all reports of a gallery.

    Raises:
        InputError: a recipe without a report.
    """
    reports = {name: _io.read_json(folder / name / REPORT) for name in NAMES}
    return {
        name: {key: report[key] for key in ("title", "command", "settings", "claims")}
        for name, report in reports.items()
    }


def results(found: dict[str, Any]) -> str:
    """The page of all claims, in Markdown."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    first = next(iter(found.values()))
    yield "# What the sources say, and what `fastdiff reproduce all` finds"
    yield ""
    yield (
        f"Written by `python -m fastdiff.reproduce.summary` from `benchmarks/results/reproduce.json`. Data: "
        f"{first['settings']['data']}. Mean ± 95 % interval over {_over(found)}. An ordering holds, or does not, where "
        f"the interval of the difference leaves zero out."
    )
    for report in found.values():
        yield from ("", f"## {report['title']}", "", f"`{report['command']}`", "")
        yield from ("| ordering | | larger | smaller |", "|---|---|---|---|")
        for claim in report["claims"]:
            factor = "" if claim["factor"] == 1 else f"{claim['factor']:.3g} x "
            sides = f"{shown(claim['larger'])} | {factor}{shown(claim['smaller'])}"
            yield f"| {claim['text']} | **{VERDICTS[claim['verdict']]}** | {sides} |"


def _over(found: dict[str, Any]) -> str:
    counts = [len(claim["larger"]["values"]) for report in found.values() for claim in report["claims"]]
    return f"{min(counts, default=0)} to {max(counts, default=0)} networks, or divisions of the data"


def block(found: dict[str, Any]) -> str:
    """What the README says, between its marks."""
    verdicts = [claim["verdict"] for report in found.values() for claim in report["claims"]]
    hold, unclear, fail = (verdicts.count(verdict) for verdict in VERDICTS)
    pictures = "\n\n".join(
        f"![{caption}](.github/images/{file.replace('/', '-')})\n\n*{caption}.*" for file, caption in PICTURES.items()
    )
    return (
        f"Of {len(verdicts)} orderings in the sources, with 95 % intervals over {_over(found)}: {hold} "
        f"hold, {unclear} are neither shown nor refuted, {fail} do not hold "
        f"([all of them, with their numbers](fastdiff/reproduce/RESULTS.md)).\n\n{pictures}\n"
    )


def with_block(text: str, found: dict[str, Any]) -> str:
    """A README with its block written anew.

    Raises:
        InputError: a text without the marks.
    """
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    check(start and end, f"there are no marks {MARKS[0].strip()} ... {MARKS[1].strip()} to write between")
    return before + start + block(found) + end + after


def main(folder: Path) -> None:
    """Write all of it."""
    found = kept(folder)
    pictures = {file: (folder / file).read_bytes() for file in PICTURES}
    readme = with_block(README.read_text(encoding="utf-8"), found)
    _io.replace_json(KEPT, found)
    _io.replace(RESULTS, results(found).encode())
    for file, content in pictures.items():
        _io.replace(IMAGES / file.replace("/", "-"), content)
    _io.replace(README, readme.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
