"""Retrieval heads from the command line: calibrate finds them, and fit puts them in an artifact."""

from __future__ import annotations

from pathlib import Path

import cli_tiny
import pytest
import torch
from cli_tiny import kv as kv

from kvtune import recipe as recipes
from kvtune.errors import IntegrityError
from kvtune.fitted import check
from kvtune.models import Facts, LayerFacts
from kvtune.profile import Profile
from kvtune.tensors import Artifact

RECIPE = """kvtune = 1
[[layers]]
span = "all"
sinks = 4
recent = 16
select = { use = "retrieval_heads", first = 1, share = 0.5 }
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, a recipe, and a profile without retrieval scores."""
    folder = tmp_path_factory.mktemp("heads")
    cli_tiny.tiny(folder / "model")
    cli_tiny.text(folder / "text.txt")
    (folder / "heads.toml").write_text(RECIPE)
    done = cli_tiny.called("calibrate", *words(folder, folder / "plain"))
    assert done.code == 0, done.err
    return folder


def words(place: Path, run: Path) -> tuple[str | Path, ...]:
    return (place / "model", "-o", run, *cli_tiny.QUICK, "--data", place / "text.txt")


def test_heads_are_found_and_fitted(place: Path, kv: cli_tiny.Caller, tmp_path: Path) -> None:
    said = kv.json("calibrate", *words(place, place / "plain"), "--heads")
    told = said["data"]["retrieval"]
    assert told["length"] == 512
    assert told["used"] == (told["right"] if told["only_right"] else told["runs"])
    file = place / "plain" / "profile.safetensors"
    profile = Profile.load(file)
    scores = profile.tensors["retrieval.scores"]
    assert scores.shape == (2, 2)
    assert profile.meta["retrieval"] == told
    again = kv("calibrate", *words(place, place / "plain"), "--heads")
    assert "needle runs of 512 tokens" in " ".join(again.out.split())
    assert "needle runs" not in again.err, "what is there is not found again"
    made = tmp_path / "made"
    assert kv("fit", place / "heads.toml", "--profile", file, "-o", made).code == 0
    recipe = recipes.load(made)
    assert recipe.artifact
    held = Artifact.load(made / recipe.artifact.file, recipe.artifact.sha256).tensors
    assert held.keys() == {f"layer.{i}.select.retrieval_heads.heads" for i in (0, 1)}
    for layer in (0, 1):
        heads = held[f"layer.{layer}.select.retrieval_heads.heads"]
        assert torch.equal(heads, torch.arange(2) == scores[layer].argmax())
    asked = ("--prompt", "The road leads north. " * 20, "--max-new-tokens", "4")
    told = kv.json("apply", made, "--model", place / "model", *asked)["data"]
    assert told["new_tokens"] == 4
    assert told["ratio"] > 1.2


def test_without_scores_a_fit_says_which_run_makes_them(
    place: Path, kv: cli_tiny.Caller, tmp_path: Path
) -> None:
    profile = Profile.load(place / "plain" / "profile.safetensors")
    profile.tensors.pop("retrieval.scores", None)
    bare = tmp_path / "bare.safetensors"
    profile.save(bare)
    made = ("-o", tmp_path / "made.toml")
    said = kv("fit", place / "heads.toml", "--profile", bare, *made)
    assert said.code == IntegrityError.exit_code
    assert "lacks retrieval.scores" in said.told
    assert "kvtune calibrate MODEL --heads" in said.told


def test_heads_of_another_count_are_refused() -> None:
    known = Facts("Tiny", (LayerFacts("full_attention", 2, 4, 64),), 128, 61)
    policies = recipes.loads(RECIPE).policies(known)
    name = "layer.0.select.retrieval_heads.heads"
    check({name: torch.ones(4, dtype=torch.bool)}, policies, known)
    with pytest.raises(IntegrityError, match=r"\[2\] of torch.bool, not \[4\]"):
        check({name: torch.ones(2, dtype=torch.bool)}, policies, known)
    with pytest.raises(IntegrityError, match="lacks its fitted tensors"):
        check({}, policies, known)
