"""The page of pages: ``index.html``, one section for each recipe, read from the reports beside it.

It needs no script and no network. What comes from a report is escaped where an element is made (:func:`_tag`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastdiff import _io
from fastdiff.errors import InputError, check
from fastdiff.reproduce.page import REPORT

INDEX = "index.html"
TITLE = "Diffusion models, made again"
VERDICTS = {"holds": "✓", "open": "?", "reversed": "✗"}
MEANING = {
    "holds": "the sources' ordering is found: the 95 % interval of the mean difference over seeds lies above zero",
    "open": "the interval includes zero, or there is one seed only",
    "reversed": "the interval lies below zero: here it is the other way round",
}
TIMES, PLUS_MINUS = (
    f"\N{NO-BREAK SPACE}{sign}\N{NO-BREAK SPACE}" for sign in "\N{MULTIPLICATION SIGN}\N{PLUS-MINUS SIGN}"
)

# ---- what a report must be ----------------------------------------------------------------

NUMBER = (int, float)
CELL = (str, int, float, type(None), dict)
OVER_SEEDS = {"value": NUMBER, "margin": (int, float, type(None)), "values": [NUMBER]}
CLAIM = {"text": str, "verdict": str, "factor": NUMBER} | dict.fromkeys(("larger", "smaller", "difference"), OVER_SEEDS)
SHAPE = {
    **dict.fromkeys(("name", "title", "text", "command"), str),
    "settings": dict,
    "seconds": NUMBER,
    "figures": [{"file": str, "caption": str}],
    "tables": [{"caption": str, "columns": [str], "rows": [[CELL]]}],
    "claims": [CLAIM],
}


def write(folder: Path, order: Sequence[str] = ()) -> Path:
    """Make the page of all reports that :meth:`.page.Page.save` left below ``folder``, and return its path.

    Args:
        folder: of the gallery; a recipe's report and pictures lie in ``folder/NAME``.
        order: of the recipes; those that it does not name come last, in the order of the alphabet.

    Raises:
        InputError: no report, or one that is damaged or lacks a picture; an index that is there already is kept.
    """
    rank = {name: place for place, name in enumerate(order)}
    paths = sorted(folder.glob(f"*/{REPORT}"), key=lambda path: (rank.get(path.parent.name, len(rank)), path))
    check(paths, f"{folder} holds no recipe's {REPORT}")
    page = _page([_read(path) for path in paths])
    _io.replace(folder / INDEX, page.encode("utf-8", errors="replace"))
    return folder / INDEX


def _read(path: Path) -> dict[str, Any]:
    """A whole report; each figure knows its ``size``."""
    report = _io.read_json(path)
    _verify(report, SHAPE, str(path))
    check(report["name"] == path.parent.name, f"{path} is of another recipe: {report['name']!r}")
    for claim in report["claims"]:
        check(claim["verdict"] in VERDICTS, f"{path}: unknown verdict {claim['verdict']!r}")
    for table in report["tables"]:
        whole = all(len(row) == len(table["columns"]) for row in table["rows"])
        check(whole, f"{path}: a row of table {table['caption']!r} has not {len(table['columns'])} cells")
    for figure in report["figures"]:
        beside = Path(figure["file"]).name == figure["file"]
        check(beside, f"{path}: picture {figure['file']!r} must lie beside the report")
        figure["size"] = _size(path.parent / figure["file"])
    return report


def _verify(value: Any, shape: Any, where: str) -> None:
    """Raise InputError unless a value of JSON has the types of ``shape``; ``where`` begins the message."""
    if shape is CELL and isinstance(value, dict):
        shape = OVER_SEEDS
    kind = type(shape) if isinstance(shape, (dict, list)) else shape
    check(isinstance(value, kind), f"{where}: {json.dumps(value)[:60]} is not what a recipe's report has there")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            check(key in value, f"{where}: {key} is missing")
            _verify(value[key], inner, f"{where}: {key}")
    elif isinstance(shape, list):
        for each in value:
            _verify(each, shape[0], where)


def _size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG or a GIF, by its first bytes: the page keeps the place before a picture is there."""
    try:
        with open(path, "rb") as file:
            head = file.read(24)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    check(len(head) == 24 and head.startswith((b"\x89PNG\r\n\x1a\n", b"GIF8")), f"{path} is neither PNG nor GIF")
    width, height = struct.unpack("<HH", head[6:10]) if head.startswith(b"GIF") else struct.unpack(">II", head[16:])
    check(width and height, f"{path} is an empty picture")
    return int(width), int(height)


# ---- elements -----------------------------------------------------------------------------


class _Html(str):
    """Text that is HTML already; all other text is escaped where it enters an element."""

    __slots__ = ()


def _tag(name: str, /, *inside: object, **attributes: object) -> _Html:
    """An element. ``class_`` is class, ``aria_label`` aria-label; None leaves an attribute out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in ("meta", "img") else f"</{name}>"
    return _Html(f"<{name}{given}>{_join(inside)}{end}")


def _join(parts: Iterable[object]) -> _Html:
    return _Html("".join(part if isinstance(part, _Html) else escape(str(part)) for part in parts))


def _scroll(inside: _Html, label: str) -> _Html:
    """What is wider than a phone moves within itself, by keys too."""
    return _tag("div", inside, class_="scroll", tabindex=0, role="region", aria_label=label)


def _number(value: float, digits: int = 4) -> _Html:
    """Whole numbers as they are, others to ``digits`` significant digits."""
    text = f"{value:,}" if isinstance(value, int) else f"{float(f'{value:.{digits}g}'):,g}"
    mantissa, _, exponent = text.partition("e")
    power = (TIMES, "10", _tag("sup", _signed(str(int(exponent))))) if exponent else ()
    return _join((_signed(mantissa), *power))


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _cell(value: Any) -> _Html:
    """Text, a number, a mean with its margin, or nothing."""
    if isinstance(value, dict):
        margin = () if value["margin"] is None else (PLUS_MINUS, _number(value["margin"], 2))
        return _join((_number(value["value"]), *margin))
    if value is None:
        return _join(("\N{EN DASH}",))
    return _join((value,)) if isinstance(value, str) else _number(value)


# ---- the page -----------------------------------------------------------------------------


def _page(reports: Sequence[dict[str, Any]]) -> str:
    css = resources.files(__package__).joinpath("gallery.css").read_text(encoding="utf-8")
    head = _tag(
        "head",
        _tag("meta", charset="utf-8"),
        _tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _tag("meta", name="color-scheme", content="light dark"),
        _tag("title", TITLE),
        _tag("style", _Html(css)),
    )
    body = _tag("body", _header(reports), _tag("main", _summary(reports), *map(_section, reports)))
    return f"<!DOCTYPE html>\n{_tag('html', head, body, lang='en')}\n"


def _header(reports: Sequence[dict[str, Any]]) -> _Html:
    claims = [claim for report in reports for claim in report["claims"]]
    meaning = [_tag("div", _tag("dt", _verdict(name)), _tag("dd", text)) for name, text in MEANING.items()]
    return _tag(
        "header",
        _tag("h1", TITLE),
        _tag(
            "p",
            "Systems and figures of four tutorials, trained, sampled and measured again with ",
            _tag("code", "fastdiff reproduce"),
            ". Each section has its pictures, its numbers, what the sources lead one to expect, and the command that "
            "makes it. Values over seeds are means ± half of their 95 % interval.",
            class_="lead",
        ),
        _tag("p", "All claims: ", _verdicts(claims)),
        _tag("dl", *meaning, class_="meaning"),
    )


def _summary(reports: Sequence[dict[str, Any]]) -> _Html:
    names = ("recipe", "what it shows", "claims", "seconds")
    head = _tag("tr", *(_tag("th", name, scope="col") for name in names))
    body = _tag("tbody", *map(_summary_row, reports))
    table = _tag("table", _tag("thead", head), body, class_="summary")
    return _tag("nav", _tag("h2", "All recipes"), table, aria_label="All recipes")


def _summary_row(report: dict[str, Any]) -> _Html:
    return _tag(
        "tr",
        _tag("th", _tag("a", report["name"], href=f"#{quote(report['name'])}"), scope="row"),
        _tag("td", report["title"]),
        _tag("td", _verdicts(report["claims"])),
        _tag("td", _number(report["seconds"]), _tag("span", " s", class_="unit"), class_="number"),
    )


def _verdicts(claims: Sequence[dict[str, Any]]) -> _Html:
    """How many claims have each verdict."""
    found = [claim["verdict"] for claim in claims]
    return _join(_verdict(name, found.count(name)) for name in VERDICTS if name in found)


def _verdict(name: str, count: int | None = None) -> _Html:
    """Colour, symbol and word."""
    symbol = _tag("span", VERDICTS[name], aria_hidden="true")
    number = "" if count is None else f" {count}"
    word = "hold" if name == "holds" and count not in (None, 1) else name
    return _join((_tag("span", symbol, f"{number} {word}", class_=f"verdict {name}"), " "))


def _section(report: dict[str, Any]) -> _Html:
    name = report["name"]
    return _tag(
        "section",
        _tag("h2", report["title"], " ", _tag("a", name, href=f"#{quote(name)}", class_="name")),
        _tag("p", report["text"], class_="text"),
        _tag("div", *(_figure(name, figure) for figure in report["figures"]), class_="figures"),
        *map(_table, report["tables"]),
        _claims(report["claims"]),
        _again(report),
        id=name,
    )


def _figure(name: str, figure: dict[str, Any]) -> _Html:
    """A picture that opens alone; one of a few points is doubled, a long one keeps a height that can be read."""
    (width, height), caption, url = figure["size"], figure["caption"], quote(f"{name}/{figure['file']}")
    shown = width * 2 if width < 200 else width if width < 500 else width * 3 // 4
    long = width > 2 * height
    least = f"min-width:min({shown}px,{12 * width / height:.0f}rem)" if long else None
    image = _tag("img", src=url, alt=caption, width=width, height=height, loading="lazy", style=least)
    picture = _tag("a", image, href=url, class_="picture moving" if url.endswith(".gif") else "picture")
    inside = _scroll(picture, caption) if long else picture
    return _tag("figure", inside, _tag("figcaption", caption), style=f"--shown:{shown}px")


def _table(table: dict[str, Any]) -> _Html:
    head = [_tag("th", name, scope="col") if name else _tag("td") for name in table["columns"]]
    caption = _tag("caption", _tag("span", table["caption"]))
    rows = _tag("tbody", *(_tag("tr", *_cells(row)) for row in table["rows"]))
    return _scroll(_tag("table", caption, _tag("thead", _tag("tr", *head)), rows, class_="values"), table["caption"])


def _cells(row: Sequence[Any]) -> Iterable[_Html]:
    """The first one, if it is text, is what the row is called."""
    for place, value in enumerate(row):
        if isinstance(value, str):
            yield _tag("td", value) if place else _tag("th", value, scope="row")
        else:
            yield _tag("td", _cell(value), class_="number")


def _claims(claims: Sequence[dict[str, Any]]) -> _Html:
    if not claims:
        return _Html("")
    return _join((_tag("h3", "Claims"), _tag("ul", *map(_claim, claims), class_="claims")))


def _claim(claim: dict[str, Any]) -> _Html:
    larger, smaller, difference = (_cell(claim[side]) for side in ("larger", "smaller", "difference"))
    if claim["factor"] != 1:
        smaller = _join((_number(claim["factor"]), TIMES, "(", smaller, ")"))
    numbers = _join((larger, " should be above ", smaller, "; the difference is ", difference))
    return _tag("li", _verdict(claim["verdict"]), _tag("span", claim["text"]), _tag("p", numbers, class_="numbers"))


def _again(report: dict[str, Any]) -> _Html:
    """How to make it again, and with which settings it was made."""
    settings = [
        _tag("div", _tag("dt", key), _tag("dd", value if isinstance(value, str) else json.dumps(value)))
        for key, value in report["settings"].items()
    ]
    return _join((
        _tag("h3", "Make it again"),
        _tag("pre", _tag("code", report["command"])),
        _tag("details", _tag("summary", "Settings"), _tag("dl", *settings, class_="settings")),
        _tag("p", _tag("a", "All numbers", href=quote(f"{report['name']}/{REPORT}")), " · ",
             _tag("a", "All recipes", href="#"), class_="links"),
    ))  # fmt: skip
