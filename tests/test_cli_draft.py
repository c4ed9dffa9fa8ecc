"""Recipes that need more than a plain forward, from the command line: text, proofs and suites."""

from __future__ import annotations

from pathlib import Path

import cli_tiny
import pytest
from cli_tiny import kv as kv

from kvtune.errors import UsageError

LAYERS = '[[layers]]\nspan = "all"\nsinks = 4\nrecent = 16\n'
RECIPES = {
    "kvzip": LAYERS + 'select = { use = "kvzip", budget = 48 }\n',
    "draft": LAYERS + 'select = { use = "draft", budget = 48 }\n',
    "specpc": 'prefill = { use = "specpc", budget = 100, skip = 0 }\n[[layers]]\nspan = "all"\n'
    'recent = 16\nkept.values = [{ use = "affine", bits = 4, group = "head", axis = "token" }]\n',
}
PROMPT = "The road leads north, and it rains. " * 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, another of the same tokenizer, a text and recipes."""
    folder = tmp_path_factory.mktemp("draft")
    cli_tiny.tiny(folder / "model")
    cli_tiny.tiny(folder / "small", seed=1)
    cli_tiny.text(folder / "text.txt")
    for name, body in RECIPES.items():
        (folder / f"{name}.toml").write_text(f"kvtune = 1\n{body}")
    return folder


def words(place: Path, name: str, drafted: bool = True) -> tuple[str | Path, ...]:
    more = ("--draft", place / "small") if drafted and name != "kvzip" else ()
    return ("apply", place / f"{name}.toml", "--model", place / "model", *more)


@pytest.mark.parametrize("name", RECIPES)
def test_text_is_generated(name: str, place: Path, kv: cli_tiny.Caller) -> None:
    data = kv.json(*words(place, name), "--prompt", PROMPT, "--max-new-tokens", "5")["data"]
    assert data["new_tokens"] == 5
    assert (data["tokens"] == 104) == (name == "specpc")


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_proved_and_asked(name: str, place: Path, kv: cli_tiny.Caller) -> None:
    sizes = (*cli_tiny.SMALL[:4], "--continuation", "4", "--bytes-at", "1k")
    suite = ("--suite", "passkey", "--suite-items", "2", "--suite-length", "400")
    data = kv.json(*words(place, name), *sizes, "--data", place / "text.txt", *suite)["data"]
    assert data["proof"]["kl"] > 0
    assert data["suite"]["tasks"]["passkey"]
    if name == "specpc":
        assert data["proof"]["ratio"] > 10, "100 tokens of 1,024 are read"


@pytest.mark.parametrize("name", ["draft", "specpc"])
def test_without_a_draft_it_says_which_option_gives_one(
    name: str, place: Path, kv: cli_tiny.Caller
) -> None:
    said = kv(*words(place, name, drafted=False), "--prompt", PROMPT)
    assert said.code == UsageError.exit_code
    assert "none is given" in said.told
    assert "Give --draft" in said.told
