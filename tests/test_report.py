"""Laws of the report: what a folder lacks is said, what is damaged is named; what is printed."""

import importlib.util
import json
import math
import shutil
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvtune import report
from kvtune.profile import Profile
from kvtune.recipe import LayerPolicy, loads
from kvtune.report import layers, numbers, spectra
from kvtune.report.figures import layer_map

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "kvtune" / "report"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FOLDER, TINY, Page = load("report_folder"), load("cli_tiny"), load("report_page").Page
kv = TINY.kv
# a part of the folder, the section that goes with it, and the command that would make it
LOST = (
    ("profile.safetensors", "prices", "kvtune calibrate"),
    ("profile.safetensors", "spectra", "kvtune calibrate"),
    ("profile.safetensors", "attention", "kvtune calibrate"),
    ("tune.json", "front", "kvtune search"),
    ("tune.json", "recipe", "kvtune search"),
    ("trials.json", "predictions", "kvtune search"),
    ("scores", "scores", "--suite"),
)


def made(folder: Path) -> bytes:
    return report.page(report.read(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return FOLDER.write(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "run"))


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


def affine(bits: int) -> dict[str, Any]:
    return {"use": "affine", "bits": bits, "group": 32, "axis": "channel"}


def test_heads_that_differ_have_rows_of_their_own():
    recipe = loads(FOLDER.recipe(0, FOLDER.PLAIN))
    heads = [{"span": "1", "kept": {"keys": [affine(2)]}}]
    entry = LayerPolicy.model_validate(
        {"span": "all", "kept": {"keys": [affine(4)]}, "heads": heads}
    )
    found = layers.of_recipe(recipe.model_copy(update={"layers": (entry,)}), FOLDER.LAYERS)
    assert [found[0].side("keys", head).bits for head in range(FOLDER.HEADS)] == [4, 2]
    drawn = layer_map(found, FOLDER.HEADS)["data"][0]
    assert drawn["y"] == ["keys, head 0", "keys, head 1", "values, head 0", "values, head 1"]
    assert [2 ** row[0] for row in drawn["z"]] == [4, 2, 16, 16]


def test_where_heads_are_alike_a_side_is_one_row():
    found = layers.of_recipe(loads(FOLDER.recipe(1, FOLDER.PLAIN)), FOLDER.LAYERS)
    drawn = layer_map(found, FOLDER.HEADS)["data"][0]
    assert drawn["y"] == ["keys", "values"]
    assert [[2**z for z in row] for row in drawn["z"]] == [[4, 4, 16], [4, 4, 16]]


def test_a_proved_point_has_the_latency_that_held_out_text_gave(copy):
    held = json.loads((copy / "tune.json").read_text())
    for point in held["points"]:
        del point["latency"]
    known = {key: held["points"][0][key] for key in ("origin", "bytes", "bits", "ratio", "kl")}
    held["held_out"].append(known | {"uniform": False, "latency": 77.0})
    (copy / "tune.json").write_text(json.dumps(held))
    points = report.read(copy).summary.points
    assert [point.latency for point in points] == [77.0, None, None]
