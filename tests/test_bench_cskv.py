"""Laws of kvtune bench cskv: what is measured beside each other, and its verb on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli_tiny
import pytest
import torch
from cli_tiny import kv as kv

from kvtune.bench.cskv import AWARE, CLOSED, SVD, TRAINED, projections
from kvtune.errors import UnsupportedError


def test_starts_and_trained_maps_stand_side_by_side(kv: Any, tmp_path: Path) -> None:
    model, prose = cli_tiny.tiny(tmp_path / "model"), cli_tiny.text(tmp_path / "prose.txt")
    sizes = ("--sequences", "2", "--context", "200", "--continuation", "16", "--steps", "20")
    words = ("bench", "cskv", model, "--data", prose, *sizes)
    found = kv.json(*words, "--shrink", "0.75", "-o", tmp_path / "rows.json")
    assert found["ok"], found["error"]
    rows = {row["maps"]: row for row in found["data"]["rows"]}
    assert rows[TRAINED]["kl"] < rows[CLOSED]["kl"] < rows[SVD]["kl"]
    assert [name for name, row in rows.items() if row["seconds"]] == [TRAINED, AWARE]
    assert (tmp_path / "rows.json").is_file()


def test_a_share_that_no_recipe_takes_is_refused(kv: Any) -> None:
    said = kv("bench", "cskv", "demo", "--shrink", "0.3")
    assert said.code == 2
    assert "0.3 is not one of" in said.told


def test_projections_are_those_that_fill_the_cache(llama: Any, draw: Any) -> None:
    tokens = draw(2, 9)
    keys, values, inputs = projections(llama, tokens)[1]
    assert keys.shape == values.shape == (128, 48)
    assert inputs.shape == (48,) and bool((inputs > 0).all())
    assert torch.equal(values, llama.model.layers[1].self_attn.v_proj.weight)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3"])
def test_models_whose_weights_cannot_be_factored_are_refused(name: str, model: Any) -> None:
    with pytest.raises(UnsupportedError, match="key projections"):
        projections(model, torch.ones(1, 4, dtype=torch.int64))
