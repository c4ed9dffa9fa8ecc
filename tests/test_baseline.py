"""Laws of a baseline: it is read as it was written, and pairs see what intervals do not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvtune.baseline import NEGLIGIBLE, Baseline, Evidence
from kvtune.cache import Weight
from kvtune.measure import Quality
from kvtune.prove import Proof

STEPS = 4


def measured(rows: torch.Tensor, texts: str = "sha256:0") -> tuple[Proof, Evidence]:
    """A proof and its evidence with these mean KLs [N], and no flips."""
    kl = rows[:, None].expand(-1, STEPS)
    quality = Quality(kl, torch.zeros_like(kl), torch.zeros_like(kl))
    proof = Proof.of(quality, Weight(100, 400, 4.0), context=64, bytes_context=128, batch=1)
    return proof, Evidence("m", "sha256:1", texts, "float32", STEPS, proof.rows)


def rows(count: int = 12, seed: int = 0) -> torch.Tensor:
    """KLs of sequences, some far harder than others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64).pow(4) + 0.01


def test_a_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    proof, evidence = measured(rows())
    held = Baseline("r", proof, evidence)
    held.save(tmp_path / "new" / "base.json")
    found = Baseline.load(tmp_path / "new" / "base.json")
    assert found.evidence == evidence and found.recipe == "r"
    assert found.proof.table() == proof.table()


def test_pairs_see_a_small_change_that_intervals_do_not() -> None:
    old = Baseline("r", *measured(rows()))
    worse = rows() * 1.05
    paired, _ = old.differences(*measured(worse))
    assert paired.interval is not None
    assert paired.value > paired.allowed and paired.interval[0] > 0
    apart, _ = old.differences(*measured(worse, texts="sha256:other"))
    assert apart.interval is None
    assert apart.value == pytest.approx(paired.value)
    assert apart.value < apart.allowed
    far, _ = old.differences(*measured(rows() + 2.0, texts="sha256:other"))
    assert far.value > far.allowed


def test_a_change_that_differs_in_sign_from_text_to_text_is_chance() -> None:
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(6)
    found, _ = Baseline("r", *measured(rows() + 1)).differences(*measured(rows() + 1 + 0.3 * sign))
    assert found.interval is not None and found.interval[0] < 0 < found.interval[1]
    assert found.value < found.allowed


def test_a_better_recipe_is_never_worse() -> None:
    old = Baseline("r", *measured(rows()))
    for texts in ("sha256:0", "sha256:other"):
        found, _ = old.differences(*measured(rows() * 0.5, texts))
        assert found.value < 0 < found.allowed


def test_what_another_machine_rounds_differently_is_no_change() -> None:
    old = Baseline("r", *measured(rows()))
    for shift, worse in ((NEGLIGIBLE / 2, False), (NEGLIGIBLE * 2, True)):
        found, _ = old.differences(*measured(rows() + shift))
        assert (found.value > found.allowed) is worse


def test_only_the_same_positions_are_pairs() -> None:
    proof, evidence = measured(rows())
    held = Baseline("r", proof, evidence)
    assert held.pairs_with(evidence)
    assert held.pairs_with(replace(evidence, dtype="bfloat16"))
    for change in ({"texts": "sha256:2"}, {"steps": 5}, {"rows": evidence.rows[1:]}):
        assert not held.pairs_with(replace(evidence, **change))
