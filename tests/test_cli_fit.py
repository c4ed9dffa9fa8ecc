"""Fitted codecs from the command line: templates with alternatives, searches, and kvtune fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli_tiny
import pytest
from cli_tiny import kv as kv

from kvtune import recipe as recipes
from kvtune import space, trainer
from kvtune.models import Facts, LayerFacts
from kvtune.tensors import Artifact
from kvtune.training import train

TEMPLATE = """kvtune = 1
name = "either"
[[layers]]
span = "all"
sinks = 4
recent = 16
kept.keys = [{ any = [
    [{ use = "klt" }, { use = "waterfill", bits = 2, group = 64 }],
    [{ use = "affine", bits = "search", group = 64, axis = "channel" }],
] }]
kept.values = [{ use = "hadamard" }, { use = "normal", bits = "search" }]
"""
KNOWN = Facts("Tiny", (LayerFacts("full_attention", 2, 4, 64),) * 2, 128, 61)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text and a template."""
    folder = tmp_path_factory.mktemp("fits")
    cli_tiny.tiny(folder / "model")
    cli_tiny.text(folder / "text.txt")
    (folder / "either.toml").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def tuned(place: Path) -> Path:
    """A finished run over the template."""
    data = ("--data", place / "text.txt", "--bytes-at", "64k", "--trials", "6")
    words = ("--template", place / "either.toml", *cli_tiny.SMALL, *data)
    done = cli_tiny.called("tune", place / "model", "-o", place / "run", *words)
    assert done.code == 0, done.err
    return place / "run"


def test_alternatives_open_each_list_on_its_own() -> None:
    template = recipes.loads(TEMPLATE)
    assert template.is_open()
    ((opened, _),) = (list(found.values()) for found in space.opened(template, KNOWN).values())
    names = {tuple(codec.name() for codec in chain.codecs) for chain in opened.keys}
    assert names == {("klt", "waterfill"), ("affine",)}
    assert len(opened.keys) == 1 + 4
    assert len(opened.values) == 3
    again = recipes.loads(template.dumps())
    assert again == template


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ("{ any = [] }", "lists of parts"),
        ("{ any = 3 }", "lists of parts"),
        ('{ any = [[{ use = "klt" }]], use = "klt" }', "alone"),
        ('{ any = [[{ any = [[{ use = "klt" }]] }]] }', "alternatives of its own"),
        ('{ any = [[{ use = "kl" }]] }', "Did you mean 'klt'"),
    ],
)
def test_bad_alternatives_are_refused_in_words(tables: str, said: str) -> None:
    text = f'kvtune = 1\n[[layers]]\nspan = "all"\nkept.keys = [{tables}]\n'
    with pytest.raises(Exception, match=said):
        recipes.loads(text)


def test_a_front_holds_its_fits_beside_its_recipes(tuned: Path, kv: Any) -> None:
    fitted = 0
    for path in sorted((tuned / "front").glob("*.toml")):
        recipe = recipes.load(path)
        klt = any("klt" in str(entry.kept.keys) for entry in recipe.layers)
        assert (recipe.artifact is not None) == klt
        if recipe.artifact:
            fitted += 1
            Artifact.load(path.with_name(recipe.artifact.file), recipe.artifact.sha256)
            assert kv("recipe", "check", path).code == 0
    assert fitted, "no recipe of the front has a fitted basis"


def test_the_chosen_recipe_runs_with_its_tensors(tuned: Path, place: Path, kv: Any) -> None:
    chosen = recipes.load(tuned / "chosen")
    if chosen.artifact:
        assert chosen.artifact.file == "kvtune.safetensors"
    said = kv("apply", tuned / "chosen", "--model", place / "model", "--prompt", "print")
    assert said.code == 0, said.err


def test_fit_makes_a_shipped_recipe_the_models_own(tuned: Path, place: Path, kv: Any) -> None:
    target = place / "fitted"
    found = kv.json("fit", "klt-2.3", "--profile", tuned, "-o", target)
    assert found["ok"], found["error"]
    assert found["data"]["tensors"] == 2 * 4  # of two layers: mean, basis, inverse and planes
    said = kv("apply", target, "--model", place / "model", "--prompt", "print")
    assert said.code == 0, said.err
    refused = kv("apply", "klt-2.3", "--model", place / "model", "--prompt", "print")
    assert refused.code == 4 and "kvtune fit" in refused.told


def test_fit_of_a_recipe_without_fits_binds_it_alone(tuned: Path, place: Path, kv: Any) -> None:
    target = place / "plain"
    found = kv.json("fit", "kivi-4", "--profile", tuned / "profile.safetensors", "-o", target)
    assert found["data"]["tensors"] == 0 and found["data"]["sha256"] is None
    assert not (target / "kvtune.safetensors").exists()
    assert recipes.load(target).model is not None


SHARED = """kvtune = 1
[[layers]]
span = "all"
sinks = 4
recent = 16
select = { use = "attention", budget = 64 }
allot = { use = "priced" }
"""


def test_fit_writes_budgets_that_layers_share(tuned: Path, place: Path, kv: Any) -> None:
    file, target = place / "shared.toml", place / "shared"
    file.write_text(SHARED)
    refused = kv("apply", file, "--model", place / "model", "--prompt", "print")
    assert refused.code == 2 and "kvtune fit RECIPE --profile" in refused.told
    said = kv("fit", file, "--profile", tuned, "-o", target)
    assert said.code == 0, said.err
    entries = recipes.load(target).layers
    assert f"budgets of {len(entries)} groups of layers" in said.out
    assert not any(entry.allot for entry in entries)
    said = kv("apply", target, "--model", place / "model", "--prompt", "print")
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("fit", "klt-2.3", "--profile", "nowhere"), 7, "nowhere"),
        (("fit", "search-fast", "--profile", "RUN"), 2, "is a template"),
    ],
)
def test_what_cannot_be_fitted_is_said(
    words: tuple[str, ...], code: int, said: str, tuned: Path, kv: Any
) -> None:
    done = kv(*(str(tuned) if word == "RUN" else word for word in words))
    assert done.code == code
    assert said in done.told


TAUGHT = ("--sequences", "2", "--context", "128", "--continuation", "16", "--steps", "4")


def test_fit_trains_with_the_model_and_goes_on_where_it_was(
    tuned: Path, place: Path, kv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("fit", "cskv-80-int4", "--profile", tuned, "--model", place / "model")
    words = (*words, "--data", place / "text.txt", *TAUGHT, "-o", place / "trained")

    def stop(layer: int, *rest: Any) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return train(layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train", stop)
        stopped = kv(*words)
    assert stopped.code == 130
    assert "what was finished is saved" in stopped.told and "To go on, run: kvtune" in stopped.told
    assert not (place / "trained" / "recipe.toml").exists()
    said = kv(*words)
    assert said.code == 0 and "training layers" in said.err
    found = kv.json(*words)["data"]
    assert found["trained"]["layers"] == 2
    assert found["trained"]["after"] < found["trained"]["before"]
    again = kv(*words)
    assert "training layers" not in again.err, "all layers were done"
    said = kv("apply", place / "trained", "--model", place / "model", "--prompt", "print")
    assert said.code == 0, said.err


def test_fit_without_the_model_is_the_closed_form_in_words(
    tuned: Path, place: Path, kv: Any
) -> None:
    said = kv("fit", "cskv-50", "--profile", tuned, "-o", place / "closed")
    assert said.code == 0, said.err
    assert "cskv keeps its closed form. To train it, run: kvtune fit cskv-50" in said.told
    assert recipes.load(place / "closed").artifact


def test_fit_with_the_model_of_a_recipe_that_trains_nothing_says_so(
    tuned: Path, place: Path, kv: Any
) -> None:
    said = kv("fit", "klt-2.3", "--profile", tuned, "--model", "nowhere", "-o", place / "none")
    assert said.code == 0, said.err
    assert "No codec of the recipe trains" in said.told


def test_fit_refuses_another_models_profile(tuned: Path, place: Path, kv: Any) -> None:
    other = cli_tiny.tiny(place / "other", seed=1)
    words = ("--profile", tuned, "--model", other, "--data", place / "text.txt", *TAUGHT)
    said = kv("fit", "cskv-50", *words, "-o", place / "wrong")
    assert said.code == 4
    assert "of another model" in said.told
