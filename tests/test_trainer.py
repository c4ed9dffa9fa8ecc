"""Laws of the trainer: layers are saved when they are done, and a resumed fit is the whole fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_fits import seen_by

from kvtune.errors import IntegrityError, UsageError
from kvtune.fit import Fitter
from kvtune.methods.attention import Attention
from kvtune.models import facts
from kvtune.policy import Policy
from kvtune.trainer import FOLDER, LEDGER, Trainer, trains
from kvtune.training import Course, Trained

CSKV = 'use = "cskv", shrink = 0.8'
KEYS = f'use = "derope" > {CSKV} > use = "klt" > use = "waterfill", bits = 2, group = 64'
VALUES = f'{CSKV} > use = "affine", bits = 4, group = "head"'


class Stopped(Exception):
    """As Ctrl-C, at a moment of the test's choice."""


@pytest.fixture
def policies(llama: Any, written: Any) -> tuple[Policy, ...]:
    found: tuple[Policy, ...] = written(keys=KEYS, values=VALUES, sinks=3, recent=7).policies(
        facts(llama.config)
    )
    return found


@pytest.fixture
def trainer_of(llama: Any, draw: Any) -> Any:
    """Makes the trainer of a folder: a few steps on a short text."""

    def make(folder: Path, seed: int = 0, steps: int = 3) -> Trainer:
        course = Course(steps=steps, queries=8, seed=seed)
        return Trainer(llama, draw(2, 105), 96, Fitter(seen_by(llama)), folder, course)

    return make


def quiet(stage: str, done: int, total: int) -> None:
    """Says nothing."""


def same(one: dict[int, Trained], two: dict[int, Trained]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(x, two[i].tensors[name]) for i in one for name, x in one[i].tensors.items()
    )


def test_a_resumed_fit_is_the_uninterrupted_one(
    trainer_of: Any, policies: tuple[Policy, ...], tmp_path: Path
) -> None:
    whole = trainer_of(tmp_path / "whole").run(policies, quiet)
    assert list(whole) == [0, 1, 2, 3]

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("training layers", 2):
            raise Stopped

    with pytest.raises(Stopped):
        trainer_of(tmp_path / "parts").run(policies, stop)
    counted: list[tuple[str, int, int]] = []
    parts = trainer_of(tmp_path / "parts").run(policies, lambda *told: counted.append(told))
    assert same(whole, parts)
    assert counted[-1] == ("training layers", 2, 2), "two layers were done already"
    files = [sorted((tmp_path / one / FOLDER).iterdir()) for one in ("whole", "parts")]
    assert [x.read_bytes() for x in files[0]] == [x.read_bytes() for x in files[1]]


def test_a_finished_fit_runs_no_model_again(
    trainer_of: Any, policies: tuple[Policy, ...], tmp_path: Path
) -> None:
    first = trainer_of(tmp_path).run(policies, quiet)
    said: list[str] = []
    assert same(first, trainer_of(tmp_path).run(policies, lambda stage, *_: said.append(stage)))
    assert not said


@pytest.mark.parametrize("change", ["seed", "steps", "recipe"])
def test_other_settings_are_another_fit(
    change: str, trainer_of: Any, policies: tuple[Policy, ...], tmp_path: Path
) -> None:
    trainer_of(tmp_path).run(policies, quiet)
    other = {change: 5} if change != "recipe" else {}
    changed = policies
    if change == "recipe":
        changed = tuple(own.model_copy(update={"recent": 9}) for own in policies)
    said: list[tuple[str, int, int]] = []
    trainer_of(tmp_path, **other).run(changed, lambda *told: said.append(told))
    assert said[-1] == ("training layers", 4, 4)


def test_a_changed_byte_of_a_finished_layer_is_found(
    trainer_of: Any, policies: tuple[Policy, ...], tmp_path: Path
) -> None:
    trainer_of(tmp_path).run(policies, quiet)
    file = tmp_path / FOLDER / "layer-002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="has changed"):
        trainer_of(tmp_path).run(policies, quiet)
    (tmp_path / FOLDER / LEDGER).write_text("{")
    with pytest.raises(IntegrityError, match="damaged"):
        trainer_of(tmp_path).run(policies, quiet)


def test_what_lies_behind_is_fitted_to_what_was_trained(
    trainer_of: Any, policies: tuple[Policy, ...], llama: Any, tmp_path: Path
) -> None:
    done = trainer_of(tmp_path, steps=8).run(policies, quiet)[1]
    assert done.after < done.before
    start = Fitter(seen_by(llama)).layer(1, policies[1])
    moved = {name for name, x in done.tensors.items() if not torch.equal(x, start[name])}
    assert {"layer.1.keys.cskv.down", "layer.1.keys.klt.basis"} <= moved
    assert "layer.1.keys.cskv.bias" not in moved


def test_a_layer_that_selects_tokens_is_not_trained(llama: Any, written: Any) -> None:
    recipe = written(values=CSKV, recent=7)
    (own, *_) = recipe.policies(facts(llama.config))
    with pytest.raises(UsageError, match="layer 0 selects tokens"):
        trains((own.model_copy(update={"select": Attention()}),))
    assert trains((own, Policy(), own)) == (0, 2)
