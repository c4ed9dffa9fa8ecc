"""kvtune pack, unpack and bench pack from the command line, with a tiny model."""

from __future__ import annotations

from pathlib import Path

import cli_tiny
import pytest
from cli_tiny import Caller
from cli_tiny import kv as kv
from pytest import TempPathFactory

from kvtune.files import cache_home
from kvtune.tensors import Artifact

FEW = ("--sequences", "3", "--context", "96")


@pytest.fixture(scope="module")
def place(tmp_path_factory: TempPathFactory) -> Path:
    """A folder with two models, a text and a prompt."""
    folder = tmp_path_factory.mktemp("pack")
    cli_tiny.tiny(folder / "model")
    cli_tiny.tiny(folder / "other", seed=1)
    cli_tiny.text(folder / "text.txt")
    (folder / "prompt.txt").write_text("An expression statement is used to compute a value. " * 4)
    return folder


@pytest.fixture(autouse=True)
def _home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codecs are kept here, not in the user's folder."""
    monkeypatch.setenv("KVTUNE_HOME", str(place / "home"))


@pytest.fixture
def file(place: Path, kv: Caller) -> Path:
    """A packed cache."""
    target = place / "prefix.kvpack"
    if not target.exists():
        words = ("--data", place / "text.txt", *FEW, "--step", "1e-4", "-o", target)
        assert kv("pack", place / "model", place / "prompt.txt", *words).code == 0
    return target


def test_a_packed_prompt_is_reported_and_checked(place: Path, kv: Caller) -> None:
    words = ("--data", place / "text.txt", *FEW, "-o", place / "checked.kvpack", "--check")
    words += ("--continuation", "8", "--step", "1e-5")
    found = kv.json("pack", place / "model", place / "prompt.txt", *words)["data"]
    assert found["bytes"] == (place / "checked.kvpack").stat().st_size
    assert found["ratio"] == pytest.approx(16 / found["bits"])
    assert abs(found["check"]["kl"]) < 1e-3
    assert found["check"]["positions"] == 8


def test_a_codec_is_made_once_and_kept(place: Path, kv: Caller, file: Path) -> None:
    kept = list((cache_home() / "codecs").iterdir())
    before = {path: path.stat().st_mtime_ns for path in kept}
    words = ("--data", place / "text.txt", *FEW, "-o", place / "again.kvpack", "--step", "1e-4")
    said = kv("pack", place / "model", place / "prompt.txt", *words)
    assert said.code == 0
    assert {path: path.stat().st_mtime_ns for path in (cache_home() / "codecs").iterdir()} == before
    assert (place / "again.kvpack").read_bytes() == file.read_bytes()


def test_an_unpacked_prefix_generates(place: Path, kv: Caller, file: Path) -> None:
    for words in (("--continue",), ("--prompt", "It is"), ("--continue", "--prompt", "It")):
        said = kv.json("unpack", file, "--model", place / "model", *words, "--max-new-tokens", "4")
        assert said["data"]["new_tokens"] == 4


def test_an_unpacked_prefix_is_written_as_tensors(place: Path, kv: Caller, file: Path) -> None:
    target = place / "cache.safetensors"
    found = kv.json("unpack", file, "--model", place / "model", "-o", target)["data"]
    held = Artifact.load(target)
    assert held.tensors["layers.1.keys"].shape == (1, 1, found["tokens"], 64)
    assert len(held.tensors) == 4


def test_a_ratio_is_kept_to(place: Path, kv: Caller, file: Path) -> None:
    words = ("--data", place / "text.txt", *FEW, "-o", place / "ratio.kvpack", "--ratio", "4")
    found = kv.json("pack", place / "model", place / "prompt.txt", *words)["data"]
    assert found["ratio"] == pytest.approx(4, rel=0.03)


def test_another_model_a_damaged_file_and_a_lost_codec_are_told_apart(
    place: Path, kv: Caller, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = kv("unpack", file, "--model", place / "other", "--continue")
    assert said.code == 4 and "another model" in said.told
    damaged = tmp_path / "damaged.kvpack"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    said = kv("unpack", damaged, "--model", place / "model", "--continue")
    assert said.code == 4 and "sha256" in said.told
    monkeypatch.setenv("KVTUNE_HOME", str(tmp_path))
    said = kv("unpack", file, "--model", place / "model", "--continue")
    assert said.code == 7 and "--codec FILE" in said.told


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--bits", "2", "--ratio", "3"), 2, "Leave one of them out"),
        (("--coding", "kvtc"), 2, "--bits or --ratio"),
        (("--coding", "kvtcc", "--bits", "2"), 2, "Did you mean 'kvtc'?"),
        (("--codec", "nowhere.safetensors"), 7, "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_is_told(
    place: Path, kv: Caller, words: tuple[str, ...], code: int, told: str
) -> None:
    usual = ("--data", place / "text.txt", *FEW, "-o", place / "never.kvpack")
    said = kv("pack", place / "model", place / "prompt.txt", *usual, *words)
    assert said.code == code and told in said.told
    assert not (place / "never.kvpack").exists()


def test_a_prompt_that_is_not_there_is_told(place: Path, kv: Caller) -> None:
    said = kv("pack", place / "model", place / "nowhere.txt")
    assert said.code == 7 and "nowhere.txt" in said.told


def test_unpack_is_told_what_to_do(place: Path, kv: Caller, file: Path) -> None:
    said = kv("unpack", file, "--model", place / "model")
    assert said.code == 2 and "--prompt TEXT" in said.told


def test_the_bench_sets_ways_beside_each_other(place: Path, kv: Caller) -> None:
    words = ("--data", place / "text.txt", *FEW, "--caches", "2", "--continuation", "8")
    words += ("--steps", "1e-2,1e-4", "--kvtc-bits", "400")
    rows = kv.json("bench", "pack", place / "model", *words)["data"]["rows"]
    assert len(rows) == 5
    by_name = {row["name"]: row for row in rows}
    coarse, fine = (by_name[f"kvtune, step {step}"] for step in ("0.01", "0.0001"))
    assert coarse["ratio"] > fine["ratio"]
    assert abs(by_name["16 bits, DEFLATE"]["kl"]) < 1e-4
    said = kv("bench", "pack", place / "model", "--steps", "x")
    assert said.code == 2 and "--steps x" in said.told
