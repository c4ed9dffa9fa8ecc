"""Laws of the report's page: it asks for nothing, texts stay texts, and all can read it."""

import base64
import hashlib
import importlib.util
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from kvtune import report
from kvtune.report.markup import data_block, script, tag

SOURCE = Path(report.__file__).parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FOLDER, Page = load("report_folder"), load("report_page").Page


def made(folder: Path) -> bytes:
    return report.page(report.read(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return FOLDER.write(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(folder):
    return Page(made(folder))


def test_nothing_in_the_page_points_out_of_the_file(page):
    for name in ("src", "href", "action", "srcset", "poster", "data", "background", "xlink:href"):
        assert all(target.startswith("#") or target == "data:," for target in page.all(name)), name
    assert not {tag for tag, _ in page.elements} & {"iframe", "object", "embed", "base", "form"}
    (style,) = [text for tag, text in page.raw if tag == "style"]
    assert "url(" not in style and "@import" not in style
    assert "://" not in page.programs[1] and "://" not in json.dumps(page.figures)


def test_the_browser_is_told_to_run_these_scripts_and_to_fetch_nothing(page):
    (policy,) = [a["content"] for _, a in page.elements if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; ")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()) for t in page.programs]
    assert allowed == [digest.decode() for digest in digests]
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def test_links_and_labels_lead_to_something(page):
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    targets = [href[1:] for href in page.all("href") if href.startswith("#")]
    for name in ("aria-controls", "aria-labelledby", "data-copies"):
        targets += page.all(name)
    targets += [f"chart-{name}" for name in page.all("data-draws")]
    assert targets and set(targets) <= set(ids)


def test_every_chart_has_a_figure_and_says_in_words_what_it_is(page):
    charts = [attrs for _, attrs in page.elements if attrs.get("class") == "chart"]
    assert {"front.bits.pass", "layers.0", "prices.keys", "spectra.keys"} <= page.figures.keys()
    for attrs in charts:
        assert attrs["data-figure"] in page.figures
        assert attrs["role"] == "img" and len(attrs["aria-label"]) > 20


def test_a_menu_leads_to_figures_only(page):
    menus: dict[str, list[list[str]]] = {}
    for tag_, attrs in page.elements:
        if tag_ == "select":
            menus.setdefault(attrs["data-draws"], []).append([])
            inside = menus[attrs["data-draws"]][-1]
        elif tag_ == "option":
            inside.append(attrs["value"])
    assert menus.keys() == {"front", "prices", "spectra"}
    for name, choices in menus.items():
        found = [name]
        for values in choices:
            found = [f"{left}.{value}" for left in found for value in values]
        assert set(found) <= page.figures.keys()


def test_headings_skip_no_level_and_landmarks_are_there(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in page.elements}


def test_the_same_folder_gives_the_same_bytes_wherever_it_lies(folder, tmp_path):
    first = made(folder)
    assert made(folder) == first
    assert made(Path(shutil.copytree(folder, tmp_path / folder.name))) == first


def test_hostile_names_stay_texts(tmp_path, page):
    hostile = Page(made(FOLDER.write(tmp_path / "run", FOLDER.HOSTILE)))
    bare = [(tag, set(attrs)) for tag, attrs in hostile.elements]
    assert bare == [(tag, set(attrs)) for tag, attrs in page.elements]
    assert len([text for text in hostile.texts if "<img src=x onerror" in text]) > 20
    assert len(hostile.raw) == len(page.raw)


def strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inside for text in strings(item)]


def test_hostile_names_are_no_markup_in_charts_either(tmp_path):
    hostile = Page(made(FOLDER.write(tmp_path / "run", FOLDER.HOSTILE)))
    found = strings(hostile.figures)
    assert any("&lt;img" in text for text in found)
    for text in found:
        assert not re.search(r"<(?!/?b>|br>|extra>|/extra>)", text), text


@pytest.mark.parametrize("text", ["</script>", "</SCRIPT >", "<!--", "<script", "\u2028", "&lt;"])
def test_no_text_ends_a_block_of_data(text):
    block = data_block("x", {text: [text]})
    inside = re.fullmatch(r'<script type="application/json" id="x">(.*)</script>', block)
    assert inside and not re.search("[<>&]", inside[1])
    assert json.loads(inside[1]) == {text: [text]}


def test_a_script_that_could_end_early_is_refused():
    for source in ("'</script>'", "'</Script'", "'<!--'"):
        with pytest.raises(ValueError, match="cannot be embedded"):
            script(source)


def test_texts_and_attributes_are_escaped_and_markup_is_not():
    assert tag("p", "<b>", tag("i", "&")) == "<p>&lt;b&gt;<i>&amp;</i></p>"
    assert tag("p", title='"><b>') == '<p title="&quot;&gt;&lt;b&gt;"></p>'
    assert tag("p", None, hidden=True, id=None, open=False) == "<p hidden></p>"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


STYLE = (SOURCE / "page.css").read_text()
COLOURS = {
    name: {"light": light, "dark": dark}
    for name, light, dark in re.findall(
        r"--([a-z0-9-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", STYLE
    )
}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_and_marks_stand_out_from_the_page(theme):
    # the least that WCAG 2.2 asks for: 4.5 for texts, 3 for marks
    least = dict.fromkeys(("ink", "muted", "accent"), 4.5)
    least |= dict.fromkeys(("front", "uniform", "dense", "other"), 3.0)
    for name, wanted in least.items():
        for ground in ("paper", "raised"):
            assert contrast(COLOURS[name][theme], COLOURS[ground][theme]) >= wanted, name


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_ramp_of_heat_maps_goes_one_way_in_lightness(theme):
    steps = [luminance(COLOURS[f"ramp-{step}"][theme]) for step in range(5)]
    assert steps == sorted(steps, reverse=theme == "light")


def test_every_colour_of_a_figure_is_in_the_style_sheet(page):
    named = {name for text in strings(page.figures) for name in re.findall(r"var\(--(.*?)\)", text)}
    assert named and named <= COLOURS.keys()
