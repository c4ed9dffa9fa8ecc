"""Laws of the report: one file that asks for nothing, texts stay texts, what is missing is said."""

import base64
import hashlib
import importlib.util
import json
import math
import re
import shutil
import tomllib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvtune import report
from kvtune.profile import Profile
from kvtune.report import numbers, spectra
from kvtune.report.markup import data_block, script, tag

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "kvtune" / "report"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FOLDER, TINY = load("report_folder"), load("cli_tiny")
kv = TINY.kv
# a part of the folder, the section that goes with it, and the command that would make it
LOST = (
    ("profile.safetensors", "prices", "kvtune calibrate"),
    ("profile.safetensors", "spectra", "kvtune calibrate"),
    ("tune.json", "front", "kvtune search"),
    ("tune.json", "recipe", "kvtune search"),
    ("trials.json", "predictions", "kvtune search"),
    ("scores", "scores", "--suite"),
)


class Page(HTMLParser):
    """A page's elements, its texts, and what stands in its scripts and style."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.raw: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(data.decode())
        assert self.open == [], "an element has no end"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw.append((self.open[-1], data))
        else:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:40]}")

    def all(self, name: str) -> list[str]:
        """Every value of an attribute."""
        return [attrs[name] for _, attrs in self.elements if name in attrs]

    @property
    def figures(self) -> dict[str, dict]:
        """The data of the charts."""
        ids = [attrs.get("id") for tag, attrs in self.elements if tag == "script"]
        scripts = [text for tag, text in self.raw if tag == "script"]
        return json.loads(scripts[ids.index("figures")])

    @property
    def programs(self) -> list[str]:
        """The scripts that run."""
        kinds = [attrs.get("type") for tag, attrs in self.elements if tag == "script"]
        scripts = [text for tag, text in self.raw if tag == "script"]
        return [text for kind, text in zip(kinds, scripts, strict=True) if kind is None]


def made(folder: Path) -> bytes:
    return report.page(report.read(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return FOLDER.write(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(folder):
    return Page(made(folder))


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "run"))


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


@pytest.mark.parametrize("part, section, command", LOST)
def test_a_folder_that_holds_less_gives_a_page_with_less(copy, part, section, command):
    lost = copy / part
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    less = Page(made(copy))
    assert section not in less.all("id")
    assert any(command in text for text in less.texts)
    missing = report.found(report.read(copy))["missing"]
    assert any(command in own["command"] and str(copy) in own["command"] for own in missing)


def test_a_front_without_its_recipes_still_has_numbers(copy):
    shutil.rmtree(copy / "front")
    texts = " ".join(Page(made(copy)).texts)
    assert "front/01.toml is not in the folder any more" in texts and "4.50 bits" in texts


@pytest.mark.parametrize("kept", ["profile.safetensors", "tune.json"])
def test_one_of_profile_and_front_is_enough(copy, kept):
    for path in copy.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    less = Page(made(copy))
    assert "run" in less.all("id") and len(less.figures) > 0
    assert list(report.view(report.read(copy)))


def test_an_older_summary_gives_a_front_of_proved_points(copy):
    file = copy / "tune.json"
    held = json.loads(file.read_text())
    for key in ("held_out", "dense", "search", "seconds"):
        del held[key]
    for point in held["points"]:
        del point["latency"]
    file.write_text(json.dumps(held))
    less = Page(made(copy))
    assert "front.bits.pass" in less.figures and "front.latency.pass" not in less.figures
    assert any("held_out" in text for text in less.texts)


def test_a_folder_of_nothing_is_refused_with_the_command_that_fills_it(kv, tmp_path):
    said = kv("report", tmp_path)
    assert said.code == 7
    assert f"kvtune tune MODEL -o {tmp_path}" in said.told
    assert not list(tmp_path.iterdir())


DAMAGE = {
    "no JSON": "{",
    "another kind": "[]",
    "a text for a number": '{"points": [{"bits": "x"}], "chosen": 0, "rows": "x", "tasks": 1}',
    "a newer run": '{"kvtune_run": 2, "points": [], "chosen": 0, "rows": [1], "tasks": {"a": {}}}',
    "not a number": '{"points": [], "chosen": NaN, "rows": [{"number": NaN}], "tasks": NaN}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("damage", [pytest.param(text, id=why) for why, text in DAMAGE.items()])
@pytest.mark.parametrize("file", ["tune.json", "trials.json", "scores/first.json"])
def test_a_damaged_file_is_named(kv, copy, file, damage):
    (copy / file).write_text(damage)
    found = kv.json("report", copy)
    assert found["error"]["exit_code"] == 4
    assert str(copy / file) in found["error"]["what"] + found["error"]["hint"]
    assert not (copy / report.FILE).exists()


@pytest.mark.parametrize(
    "change",
    [{"file": "front/../../00.toml"}, {"file": "/etc/passwd"}, {"kl": 1e999}, {"bits": 0}],
    ids=str,
)
def test_a_summary_cannot_lead_astray(kv, copy, change):
    held = json.loads((copy / "tune.json").read_text())
    held["points"][0] |= change
    (copy / "tune.json").write_text(json.dumps(held))
    assert kv.json("report", copy)["error"]["exit_code"] == 4


def test_a_point_that_is_not_there_cannot_be_chosen(kv, copy):
    held = json.loads((copy / "tune.json").read_text()) | {"chosen": 3}
    (copy / "tune.json").write_text(json.dumps(held))
    assert "chose point 3 of 3" in kv.json("report", copy)["error"]["what"]


def test_json_says_what_was_written_and_what_is_missing(kv, copy):
    (copy / "trials.json").unlink()
    data = kv.json("report", copy)["data"]
    assert Path(data["page"]) == copy / report.FILE
    assert data["bytes"] == (copy / report.FILE).stat().st_size
    assert data["points"] == 3 and data["chosen"]["bits"] == 4.5 and data["cells"] == 36
    assert [own["part"] for own in data["missing"]] == ["the search's trials (trials.json)"]


def test_the_terminal_shows_the_front_and_ends_with_the_page(kv, copy, tmp_path):
    said = kv("report", copy, "-o", tmp_path / "there" / "mine.html")
    assert said.code == 0 and said.err == ""
    assert "3.56 times smaller" in said.out and "* " in said.out
    assert "keys    44+" in said.out
    assert said.out.splitlines()[-1] == str(tmp_path / "there" / "mine.html")
    assert (tmp_path / "there" / "mine.html").read_bytes() == made(copy)
    assert not (copy / report.FILE).exists()


def test_hostile_names_are_plain_texts_in_the_terminal(kv, tmp_path):
    name = "[bold red]x[/] [link=http://x]"
    said = kv("report", FOLDER.write(tmp_path / "run", name))
    assert said.code == 0
    assert said.out.count(name) >= 4  # the headline, and a table with its title and two tasks


def test_open_shows_the_page_in_the_browser(kv, copy, monkeypatch):
    shown = []
    monkeypatch.setattr("typer.launch", lambda url: shown.append(url) or 0)
    assert kv("report", copy, "--open").code == 0
    assert shown == [(copy / report.FILE).resolve().as_uri()]


def test_what_a_run_writes_is_what_a_report_reads(kv, tmp_path):
    TINY.tiny(tmp_path / "model")
    text = TINY.text(tmp_path / "text.txt")
    words = ("tune", tmp_path / "model", "-o", tmp_path / "run", "--trials", "3", "-q")
    assert kv(*words, *TINY.QUICK, "--data", text).code == 0
    data = kv.json("report", tmp_path / "run")["data"]
    assert data["points"] > 0 and data["cells"] == 16
    page = Page((tmp_path / "run" / report.FILE).read_bytes())
    assert {"front", "recipe", "prices", "spectra", "run"} <= set(page.all("id"))
    assert str(tmp_path / "text.txt") not in "".join(page.all("title"))


def test_a_moment_of_few_directions_needs_no_more_than_these():
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    strengths = torch.tensor([60.0, 30.0, 9.5, 0.5] + [0.0] * 12)
    moment = basis @ torch.diag(strengths) @ basis.T
    profile = Profile((), {"moments.keys": moment[None, None]}, {})
    energy = spectra.energies(profile)["keys"]
    assert torch.allclose(energy[0, :4], torch.tensor([0.6, 0.9, 0.995, 1.0]).double(), atol=1e-5)
    assert [spectra.directions(energy, share) for share in (0.59, 0.8, 0.99, 0.999)] == [
        [1],
        [2],
        [3],
        [4],
    ]


@pytest.mark.parametrize(
    "value, shown",
    [
        (0.0147, "0.0147"),
        (7.4e-6, "0.000007"),
        (1.24e-9, "1.2e-9"),
        (123.4, "123"),
        (1234.5, "1,234"),
        (0, "0"),
        (-0.0234, "-0.0234"),
        (math.inf, "inf"),
        (None, "none"),
    ],
)
def test_numbers_have_as_many_digits_as_they_can_mean(value, shown):
    assert numbers.significant(value) == shown


def test_what_the_page_is_made_of_goes_into_the_wheel():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "kvtune.report" in tool["packages"]
    globs = tool["package-data"]["kvtune.report"]
    others = {path for path in SOURCE.iterdir() if path.is_file() and path.suffix != ".py"}
    assert others == {path for glob in globs for path in SOURCE.glob(glob)}


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
