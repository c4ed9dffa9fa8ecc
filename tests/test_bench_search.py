"""Laws of the benches of the search: hypervolumes, exponents, and their verbs on a tiny model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest
import torch

from kvtune.bench.duel import Contest, hypervolume
from kvtune.bench.scaling import Cost, exponents, first_layers

kv = TINY.kv


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A tiny model, and what makes its runs short."""
    model, prose = TINY.tiny(tmp_path / "model"), TINY.text(tmp_path / "prose.txt")
    return [str(model), "--data", str(prose), *TINY.QUICK]


@pytest.mark.parametrize("seed", range(4))
def test_a_hypervolume_is_the_area_that_a_grid_counts(seed: int) -> None:
    source = random.Random(seed)
    points = [(source.randint(0, 12), source.randint(0, 12)) for _ in range(9)]
    grid = [(x, y) for x in range(10) for y in range(10)]
    counted = sum(any(a <= x and b <= y for a, b in points) for x, y in grid)
    assert hypervolume(points, (10, 10)) == counted


def test_points_beyond_the_reference_add_nothing() -> None:
    assert hypervolume([(3.0, 1.0), (1.0, 3.0)], (1.0, 1.0)) == 0.0


def test_volumes_never_shrink_with_more_trials() -> None:
    source = random.Random(0)
    points = [tuple((source.uniform(2, 9), source.random()) for _ in range(40)) for _ in range(2)]
    for logarithmic in (False, True):
        held = Contest(points[0], points[1], (1.0, 1.0), (40, 40)).volumes(logarithmic)
        for column in ("volume", "rival_volume"):
            assert [row[column] for row in held] == sorted(row[column] for row in held)


def test_exponents_are_those_the_times_were_made_with() -> None:
    found = [
        Cost(n, c, 0.1 * n**0.9 * c**0.4, 3 * n**1.1 * c**0.2, 9)
        for n in (6, 12, 30)
        for c in (512, 1024, 2048)
    ]
    assert exponents(found, "calibrate") == pytest.approx((0.9, 0.4))
    assert exponents(found, "search") == pytest.approx((1.1, 0.2))


def test_the_first_layers_of_a_model_answer_as_they_do_in_the_whole(llama: Any, draw: Any) -> None:
    tokens = draw(1, 9)
    part = first_layers(llama, 1)
    hidden = llama.model(tokens, output_hidden_states=True).hidden_states[1]
    with torch.no_grad():
        found = part.model(tokens).last_hidden_state
    torch.testing.assert_close(found, llama.model.norm(hidden))
    assert len(part.model.layers) == 1 < len(llama.model.layers)


def test_bench_search_measures_both_on_one_text(kv: Any, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "duel.json"
    found = kv.json("bench", "search", *words, "--trials", "8", "--rivals", "6", "-o", file)
    assert found["ok"], found["error"]
    assert len(found["data"]["rival_points"]) == 6
    assert file.is_file()


def test_bench_scaling_times_every_depth_and_context(kv: Any, words: list[str]) -> None:
    own = [word if word != "256" else "128" for word in words]
    found = kv.json(
        "bench", "scaling", *own, "--layers", "1,2", "--contexts", "128,256", "--trials", "2"
    )
    assert found["ok"], found["error"]
    places = [(row["layers"], row["context"]) for row in found["data"]["costs"]]
    assert places == [(1, 128), (1, 256), (2, 128), (2, 256)]
    assert kv("bench", "scaling", *own, "--layers", "3").code == 2


def test_bench_tune_tells_the_time_of_each_stage(kv: Any, words: list[str]) -> None:
    model, *rest = words
    found = kv.json("bench", "tune", model, *rest, "--trials", "2", "--points", "2")
    assert found["ok"], found["error"]
    assert set(found["data"]["stages"]) == {"calibrate", "search", "prove"}
    assert 1 <= found["data"]["points"] <= 2
