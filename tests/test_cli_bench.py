"""Laws of kvtune bench: refusals, usage, tables and --json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest
import torch

from kvtune.bench.cases import ACCEPTANCE
from kvtune.bench.kernels import Lab, check_device
from kvtune.errors import UnsupportedError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


kv = TINY.kv


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("KVTUNE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_kernels_are_refused_without_a_gpu(no_gpu: None, kv: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"needs a CUDA device; torch .* finds none"):
        check_device()
    said = kv("bench", "kernels")
    assert said.code == 5 and "--model demo" in said.told
    assert kv.json("bench", "kernels", "--table")["error"]["exit_code"] == 5


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["kernels", "--rows", "12"], "There is no row 12"),
        (["kernels", "--rows", "1", "--batch", "2"], "leave out"),
        (["kernels", "--formats", "k5v5"], "Write k4v2"),
        (["kernels", "--table", "--formats", "k4v4"], "leave out"),
        (["kernels", "--batch", "0"], "Write --batch 1,8"),
        (["kernels", "--heads", "9/2/64"], "no multiple"),
        (["kernels", "--context", "many"], "write 512 or 32k"),
        (["decode", "--batch", "1,max", "--device", "cpu"], "Give --batch 1,2"),
        (["decode", "--context", "some"], "write 512 or 32k"),
        (["trails"], "Did you mean 'trials'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_told(kv: Any, words: list[str], hint: str) -> None:
    said = kv("bench", *words)
    assert said.code == 2 and hint in said.told
    assert kv.json("bench", *words)["schema"].startswith("kvtune.bench")


def test_bench_alone_shows_its_verbs(kv: Any) -> None:
    said = kv("bench")
    assert all(verb in said.out + said.err for verb in ("kernels", "decode", "trials"))


def test_the_large_model_is_refused_without_a_gpu(kv: Any) -> None:
    said = kv("bench", "decode", "--device", "cpu")
    assert said.code == 5 and "--model demo" in said.told


def test_decode_times_both_caches_of_a_saved_model(kv: Any, tmp_path: Path) -> None:
    words = ("bench", "decode", "--model", TINY.tiny(tmp_path / "model"), "--device", "cpu")
    sized = ("--context", "256", "--steps", "2", "--batch", "1,2")
    found = kv.json(*words, *sized, "-o", tmp_path / "found.json")["data"]
    assert [run["batch"] for run in found["runs"]] == [1, 1, 2, 2]
    assert found["ratios"].keys() == {"speed_ratio_one", "speed_ratio_2"}
    assert json.loads((tmp_path / "found.json").read_text()) == found
    said = kv(*words, *sized, "--recipe", "k4v2")
    assert said.code == 0 and "compressed" in said.out and "tokens/s at batch 1" in said.out
    assert kv(*words, "--context", "1023").code == 2


def test_kernels_are_told_in_tables_and_json(
    kv: Any, monkeypatch: pytest.MonkeyPatch, home: Path, tiny_row: Any
) -> None:
    monkeypatch.setattr("kvtune.bench.kernels.check_device", lambda: CPU)
    monkeypatch.setattr(
        "kvtune.bench.kernels.Lab", lambda device: Lab(device, seconds=1e-4, copied=1 << 16)
    )
    small = ("--batch", "1", "--context", "320,420", "--heads", "4/2/64")
    found = kv.json("bench", "kernels", *small, "--formats", "k4v2")["data"]
    assert [case["context"] for case in found["cases"]] == [320, 420]
    assert "k4g128v2g64 B=1 N=320 4/2x64" in kv("bench", "kernels", *small).out
    measured = kv.json("bench", "kernels", "--table", *small)["data"]
    saved = measured["table"]
    assert {row["rank"] for row in measured["ranks"]} == {64}
    assert Path(saved).is_file() and Path(saved).parent == home / "latency"
    monkeypatch.setattr("kvtune.bench.cases.ACCEPTANCE", tuple(map(tiny_row, ACCEPTANCE)))
    rows = kv.json("bench", "kernels", "--rows", "1,11")["data"]["rows"]
    assert [row["number"] for row in rows] == [1, 11]
    said = kv("bench", "kernels", "--rows", "4,10")
    assert "x the 4-bit speed" in said.out and "row 10" in said.told


def test_the_bench_of_kernels_needs_nothing_but_torch() -> None:
    heavy = {"optuna", "datasets", "scipy", "transformers", "pydantic", "tomli_w", "typer", "rich"}
    code = f"import sys, kvtune.bench.latency; print(sorted({heavy!r} & sys.modules.keys()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
