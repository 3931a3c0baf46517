"""The gallery's page: whole, escaped, in order, and as wide as what shows it."""
# ruff: noqa: RUF001 (signs as people write them)

import copy
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from fastdiff.errors import InputError
from fastdiff.reproduce import gallery
from fastdiff.reproduce.page import Page

ROOT = Path(__file__).parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
ABOUT = {"command": "fastdiff reproduce --quick", "settings": {"data": "digits", "count": 200}, "seconds": 12.3456}
HOSTILE = """</style></pre>"><script>alert('1')</script>&lt;<img src=x onerror=alert(2)>"""


class Element:
    def __init__(self, tag, attributes=()):
        self.tag, self.attributes, self.inside = tag, dict(attributes), []

    def all(self, tag, **attributes):
        """All below of this tag, in order."""
        for child in self.inside:
            if isinstance(child, Element):
                if child.tag == tag and attributes.items() <= child.attributes.items():
                    yield child
                yield from child.all(tag, **attributes)

    def text(self):
        return "".join(child if isinstance(child, str) else child.text() for child in self.inside)

    def skeleton(self):
        """Tags and names of attributes, without what they hold."""
        children = [child.skeleton() for child in self.inside if isinstance(child, Element)]
        return self.tag, sorted(self.attributes), children


class Tree(HTMLParser):
    """Reads HTML in which every element is closed; anything else fails."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open = [Element("document")]
        self.feed(text)
        self.close()
        assert len(self.open) == 1

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        element = Element(tag, attributes)
        self.open[-1].inside.append(element)
        if tag not in ("meta", "img"):
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].inside.append(data)


def picture(path, width=60, height=40):
    Image.new("RGB", (width, height), "#1f4e8c").save(path)


def save(folder, name, title="A title", text="Some text.", file="plot.png", label="row", wide=3, long=False):
    """A recipe's page with one of everything."""
    (folder / name).mkdir(parents=True)
    page = Page(folder / name, name, title, text)
    page.figure(file, f"{label}: a plot", picture)
    page.figure("way.gif", f"{label}: the way", picture, width=1300 if long else 128, height=128)
    page.table(
        f"{label}: FID",
        ["", *(f"{label} {i}" for i in range(wide)), "kind"],
        [
            [label, *([0.123456, 0.2, 0.34567 + i] for i in range(wide)), label],
            ["all data", *(12345.678 / 10 ** (4 * i) for i in range(wide)), None],
            ["one seed", *([1e-9 * (i + 1)] for i in range(wide)), 1797],
        ],
    )
    page.claim(f"{label}: guidance helps", [3.0, 3.1, 3.2], [1.0, 1.1, 1.0], factor=1.5)
    page.claim(f"{label}: noise helps", [1.0, 1.1, 1.0], [3.0, 3.1, 3.2])
    page.claim(f"{label}: one seed", [1.0], [0.5])
    page.save(**ABOUT)


def make(folder, order=()):
    return Tree(gallery.write(folder, order).read_text(encoding="utf-8")).open[0]


def report(folder, name):
    return json.loads((folder / name / "report.json").read_text(encoding="utf-8"))


def rewrite(folder, name, change):
    content = report(folder, name)
    change(content)
    (folder / name / "report.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for name in ("ddpm", "cfg", "vdm"):
        save(tmp_path, name, title=f"Title of {name}")
    (tmp_path / "networks").mkdir()
    return tmp_path


# ---- what is there ----------------------------------------------------------------------------


def test_every_recipe_has_a_section_and_a_link(folder) -> None:
    page = make(folder)
    assert next(page.all("html")).attributes == {"lang": "en"}
    sections = {section.attributes["id"]: section for section in page.all("section")}
    assert set(sections) == {"ddpm", "cfg", "vdm"}
    (summary,) = page.all("table", **{"class": "summary"})
    assert [link.attributes["href"] for link in summary.all("a")] == ["#cfg", "#ddpm", "#vdm"]
    for name, section in sections.items():
        content = report(folder, name)
        shown = section.text()
        texts = [content["title"], content["text"], content["command"], *content["settings"]]
        texts += [each["caption"] for each in content["figures"] + content["tables"]]
        assert all(text in shown for text in texts)
        assert next(section.all("pre")).text() == content["command"]


def missing(page, folder):
    """Links and pictures that lead nowhere, as a browser reads their addresses; an empty fragment is the top."""
    ids = {"", *(section.attributes["id"] for section in page.all("section"))}
    given = [link.attributes["href"] for link in page.all("a")] + [each.attributes["src"] for each in page.all("img")]
    for url in given:
        parts = urlsplit(url)
        assert (parts.scheme, parts.netloc, parts.query) == ("", "", "")
        there = (folder / unquote(parts.path)).is_file() if parts.path else unquote(parts.fragment) in ids
        if not there:
            yield url


def test_every_link_and_picture_is_there(folder) -> None:
    page = make(folder)
    assert not list(missing(page, folder))
    images = list(page.all("img"))
    assert len(images) == 6
    for image in images:
        with Image.open(folder / image.attributes["src"]) as file:
            assert (int(image.attributes["width"]), int(image.attributes["height"])) == file.size
        assert image.attributes["alt"]


def test_nothing_comes_from_elsewhere(folder) -> None:
    text = gallery.write(folder).read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|https?:|url\(|@import", text)


def test_headings_are_in_order(folder) -> None:
    levels = [int(level) for level in re.findall(r"<h(\d)", gallery.write(folder).read_text(encoding="utf-8"))]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


# ---- numbers ----------------------------------------------------------------------------------


def numbers(text):
    """All numbers of a text as people write them."""
    text = text.replace("\xa0", " ").replace(",", "").replace("−", "-")
    return [float(each) for each in re.sub(r" × 10(-?\d+)", r"e\1", text).replace("±", " ").split() if is_number(each)]


def is_number(word):
    return re.fullmatch(r"-?[\d.]+(e-?\d+)?", word) is not None


def rounded(cell):
    """The numbers that a cell shows: four digits of the value, two of the margin."""
    if isinstance(cell, dict):
        margin = [] if cell["margin"] is None else [float(f"{cell['margin']:.2g}")]
        return [float(f"{cell['value']:.4g}"), *margin]
    return [] if cell is None else [cell if isinstance(cell, int) else float(f"{cell:.4g}")]


def test_tables_show_the_numbers_of_the_report(folder) -> None:
    for section in make(folder).all("section"):
        (table,) = report(folder, section.attributes["id"])["tables"]
        (shown,) = section.all("table")
        rows = list(next(shown.all("tbody")).all("tr"))
        assert [row.inside[0].text() for row in rows] == [row[0] for row in table["rows"]]
        for row, expected in zip(rows, table["rows"], strict=True):
            for cell, value in zip(row.inside[1:], expected[1:], strict=True):
                if isinstance(value, str):
                    assert cell.text() == value
                else:
                    assert numbers(cell.text()) == rounded(value)


def test_claims_show_verdict_and_numbers(folder) -> None:
    for section in make(folder).all("section"):
        claims = report(folder, section.attributes["id"])["claims"]
        items = list(next(section.all("ul")).all("li"))
        for item, claim in zip(items, claims, strict=True):
            symbol = {"holds": "✓", "open": "?", "reversed": "✗"}[claim["verdict"]]
            assert item.text().startswith(f"{symbol} {claim['verdict']} {claim['text']}")
            factor = [] if claim["factor"] == 1 else [claim["factor"]]
            larger, smaller, difference = (rounded(claim[side]) for side in ("larger", "smaller", "difference"))
            shown = numbers(next(item.all("p")).text().replace("(", "").replace(")", "").replace(";", ""))
            assert shown == [*larger, *factor, *smaller, *difference]


def test_the_summary_counts_verdicts(folder) -> None:
    page = make(folder)
    (summary,) = page.all("table", **{"class": "summary"})
    for row in next(summary.all("tbody")).all("tr"):
        assert row.inside[2].text().split() == ["✓", "1", "holds", "?", "1", "open", "✗", "1", "reversed"]
        assert row.inside[3].text() == "12.35 s"
    assert "✓ 3 hold " in next(page.all("header")).text()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (0.0, "0"),
        (-0.25, "−0.25"),
        (12345.678, "12,350"),
        (1e-5 / 3, "3.333 × 10<sup>−6</sup>"),
        (-2e30, "−2 × 10<sup>30</sup>"),
        (1e-10, "1 × 10<sup>−10</sup>"),
        (float("nan"), "nan"),
        (float("-inf"), "−inf"),
    ],
)
def test_numbers_as_people_write_them(value, shown) -> None:
    assert gallery._number(value).replace("\xa0", " ") == shown


# ---- hostile, damaged, in order ---------------------------------------------------------------


def test_hostile_text_is_text(tmp_path) -> None:
    """The same elements as with harmless text, and the text is read back as it was."""
    name = """"><b>'&amp;#?%é"""
    save(tmp_path / "a", "name")
    save(tmp_path / "b", name, HOSTILE, HOSTILE, file="""a"b'<i>&#?% .png""", label=HOSTILE)
    for folder, content in (("a", "harmless"), ("b", HOSTILE)):
        only = next((tmp_path / folder).iterdir()).name
        rewrite(tmp_path / folder, only, lambda r, c=content: r.update(command=c, settings={c: c, "list": [c]}))
    harmless, hostile = make(tmp_path / "a"), make(tmp_path / "b")
    assert hostile.skeleton() == harmless.skeleton()
    (section,) = hostile.all("section")
    assert next(section.all("pre")).text() == HOSTILE
    assert next(section.all("p", **{"class": "text"})).text() == HOSTILE
    assert next(section.all("img")).attributes["alt"] == f"{HOSTILE}: a plot"
    assert section.attributes["id"] == name
    assert not list(missing(hostile, tmp_path / "b"))


def test_text_that_is_no_unicode(folder) -> None:
    rewrite(folder, "cfg", lambda content: content.update(text="half a pair: \ud800."))
    assert "half a pair: ?." in make(folder).text()


def test_order(folder) -> None:
    save(folder, "another")

    def names(*order):
        return [section.attributes["id"] for section in make(folder, order).all("section")]

    assert names("vdm", "missing", "cfg") == ["vdm", "cfg", "another", "ddpm"]
    assert names() == ["another", "cfg", "ddpm", "vdm"]


def put(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("claims"), "claims is missing"),
        (lambda content: content["claims"][0].pop("factor"), "factor is missing"),
        (put("name", value="other"), "of another recipe"),
        (put("title", value=3), "title: 3"),
        (put("seconds", value="3"), "seconds"),
        (put("settings", value=[]), "settings"),
        (put("figures", value={}), "figures"),
        (put("figures", 0, "file", value="missing.png"), "missing.png cannot be read"),
        (put("figures", 0, "file", value=".."), "cannot be read"),
        (put("figures", 0, "file", value="\0"), "cannot be read"),
        (put("figures", 0, "file", value="../cfg/plot.png"), "must lie beside"),
        (put("figures", 0, "file", value="report.json"), "neither PNG nor GIF"),
        (put("figures", 0, "file", value="."), "must lie beside"),
        (put("tables", 0, "rows", 0, value=["a"]), "has not 5 cells"),
        (put("tables", 0, "rows", 0, 1, value=["a"]), "rows"),
        (put("tables", 0, "rows", 0, 1, "value", value="a"), "value"),
        (put("tables", 0, "columns", value="abcd"), "columns"),
        (put("claims", 0, "verdict", value="perhaps"), "unknown verdict 'perhaps'"),
        (put("claims", 0, "larger", value=None), "larger: null"),
    ],
)
def test_a_damaged_report_leaves_the_old_page(folder, change, message) -> None:
    before = gallery.write(folder).read_bytes()
    rewrite(folder, "cfg", change)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        gallery.write(folder)
    assert str(folder / "cfg") in str(error.value)
    assert "\n" not in str(error.value)
    assert (folder / "index.html").read_bytes() == before
    assert not list(folder.glob(".unfinished*"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"name": "cfg"}', b"[" * 100_000])
def test_a_foreign_file(folder, content) -> None:
    (folder / "cfg" / "report.json").write_bytes(content)
    with pytest.raises(InputError, match=r"report\.json"):
        gallery.write(folder)
    assert not (folder / "index.html").exists()


def test_every_value_of_a_report_may_be_wrong(folder) -> None:
    """Whatever stands where: a page, or InputError."""
    whole = report(folder, "cfg")
    wrong = (None, True, -1, 1e400, 10**400, "", "x", [], [[]], {}, {"value": 1})
    for path in list(paths(whole)):
        for value in wrong:
            content = copy.deepcopy(whole)
            put(*path, value=value)(content)
            (folder / "cfg" / "report.json").write_text(json.dumps(content), encoding="utf-8")
            try:
                Tree(gallery.write(folder).read_text(encoding="utf-8"))
            except InputError as error:
                assert "cfg" in str(error)  # noqa: PT017


def paths(value, so_far=()):
    """The way to every value of JSON, of lists to the first."""
    if so_far:
        yield so_far
    inside = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, each in inside:
        yield from paths(each, (*so_far, key))


def test_a_cut_picture(folder) -> None:
    path = folder / "cfg" / "plot.png"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="neither PNG nor GIF"):
        gallery.write(folder)


def test_no_report(tmp_path) -> None:
    with pytest.raises(InputError, match=r"holds no recipe's report\.json"):
        gallery.write(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


# ---- how it looks -----------------------------------------------------------------------------


def luminance(color):
    """WCAG 2's relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme) -> None:
    """WCAG's level AA asks for 4.5; all text has 5."""
    css = Path(gallery.__file__).with_name("gallery.css").read_text(encoding="utf-8")
    colors = dict(re.findall(r"--([\w-]+): (#\w{6})", css.split(":root")[1 + scheme]))
    pairs = [(name, "page") for name in ("text", "quiet", "link")] + [("text", "soft"), ("link", "soft")]
    for text, ground in pairs + [(name, f"{name}-soft") for name in gallery.VERDICTS]:
        light, dark = sorted((luminance(colors[text]), luminance(colors[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 5, (text, ground)


def browse(folder, *options, page="index.html"):
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        *options,
    ]
    command += ["--hide-scrollbars", "--virtual-time-budget=2000", (folder / page).as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def width_on(folder, width, css=""):
    """How wide the page's content is in a frame of this width, with all details open and all pictures loaded."""
    asked = """<script>addEventListener("load", () => {
        document.querySelectorAll("details").forEach(each => each.open = true);
        const missing = [...document.images].filter(each => !each.naturalWidth).length;
        parent.postMessage(missing ? -missing : document.documentElement.scrollWidth, "*")})</script>"""
    text = (folder / "index.html").read_text(encoding="utf-8").replace('loading="lazy"', "")
    text = text.replace("</style>", f"{css}</style>")
    (folder / "asked.html").write_text(text + asked, encoding="utf-8")
    frame = f"<iframe src=asked.html width={width} height=800 style=border:0></iframe>"
    answer = "<script>addEventListener('message', said => document.title = 'width ' + said.data)</script>"
    (folder / "frame.html").write_text(f"<!DOCTYPE html>{answer}{frame}", encoding="utf-8")
    found = re.search(r"<title>width (-?\d+)</title>", browse(folder, "--dump-dom", page="frame.html"))
    assert found
    return int(found[1])


@pytest.fixture
def wide(tmp_path):
    """More columns and longer words than a phone has room for."""
    save(tmp_path, "wide", "Title " * 10, "Text. " * 80, label="a label", wide=12, long=True)
    words = "word" * 40
    rewrite(tmp_path, "wide", lambda r: r.update(command=words, settings={words: words}, text=words))
    save(tmp_path, "plain")
    gallery.write(tmp_path)
    return tmp_path


@needs_browser
@pytest.mark.parametrize("width", [320, 360, 390, 800, 1400])
def test_no_page_moves_sideways(wide, width) -> None:
    assert width_on(wide, width) == width


@needs_browser
def test_a_page_that_moves_sideways_would_be_seen(wide) -> None:
    assert width_on(wide, 360, css=".scroll { overflow: visible !important; }") > 500


@needs_browser
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)], ids=str)
def test_pictures_of_the_page(wide, size) -> None:
    path = wide / "shown.png"
    browse(wide, f"--screenshot={path}", "--window-size={},{}".format(*size))
    with Image.open(path) as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


# ---- in the package ---------------------------------------------------------------------------


def test_the_style_is_part_of_the_package(tmp_path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    leave = shutil.ignore_patterns("*.so", "__pycache__", "_build.txt")
    shutil.copytree(ROOT / "fastdiff", tmp_path / "fastdiff", ignore=leave)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "built" / "fastdiff" / "reproduce" / "gallery.css").is_file()
    assert (tmp_path / "built" / "fastdiff" / "reproduce" / "gallery.py").is_file()
