"""Laws of the report's part on rank and bits: both fronts, met at equal bytes, and spectra."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import report_folder
import torch
from report_page import Page
from rich.console import Console

from kvtune import report
from kvtune.profile import Profile
from kvtune.report import rank, spectra
from kvtune.report.records import Candidate, Summary

ALONE = ((4.0, 0.01), (3.0, 0.02), (2.0, 0.1))  # bits and KL
BETTER, WORSE = ((2.9, 0.015), (1.9, 0.08)), ((2.95, 0.03), (1.9, 0.2))


def candidate(bits: float, kl: float, projects: bool) -> dict[str, Any]:
    """A candidate as `tune.json` has it."""
    told = {"origin": f"knapsack {bits}", "uniform": False, "projects": projects}
    return {**told, "bits": bits, "bytes": bits * 1e6, "ratio": 16 / bits, "kl": kl}


def summary(mixed: tuple[tuple[float, float], ...]) -> Summary:
    """A run that measured bits alone and some projections."""
    held = [candidate(*own, projects=False) for own in ALONE]
    held += [candidate(*own, projects=True) for own in mixed]
    return Summary.model_validate({**report_folder.summary("x"), "held_out": held})


def test_a_front_holds_what_nothing_of_its_kind_beats() -> None:
    alone, mixed = rank.fronts(summary((*BETTER, (3.5, 0.5))))
    assert [(own.bits, own.kl) for own in alone] == sorted(ALONE)
    assert [(own.bits, own.kl) for own in mixed] == sorted(BETTER)


@pytest.mark.parametrize(("mixed", "won"), [(BETTER, 3), (WORSE, 0), (BETTER[:1], 1)])
def test_projections_are_met_at_no_more_bytes(
    mixed: tuple[tuple[float, float], ...], won: int
) -> None:
    found = rank.pairs(summary(mixed))
    assert [pair.alone.bits for pair in found] == [2.0, 3.0, 4.0]
    assert all(pair.mixed is None or pair.mixed.bytes <= pair.alone.bytes for pair in found)
    # 0.015 at 2.9 bits is beaten by 0.01 at 4 bits
    assert sum(pair.wins for pair in found) == min(won, 2)


def test_the_verdict_says_who_wins_where_and_at_which_context() -> None:
    told = rank.verdict(summary(BETTER))
    assert "lower KL than bits alone at 2 of 3 points" in told
    assert "1.33 times at 3.00 bits" in told
    assert "8,192 tokens" in told
    assert rank.verdict(summary(WORSE)).startswith("Bits alone win at every budget")


def test_without_projections_nothing_is_said() -> None:
    assert rank.pairs(summary(())) == []
    assert rank.verdict(summary(())) == ""


def test_a_projection_of_no_kl_at_all_has_no_ratio() -> None:
    alone, mixed = (Candidate.model_validate(candidate(2.0, kl, True)) for kl in (0.1, 0.0))
    assert rank.Pair(alone, mixed).wins
    assert rank.Pair(alone, mixed).times is None


def folder(tmp_path: Path, mixed: tuple[tuple[float, float], ...]) -> Path:
    """A run folder whose candidates are these."""
    made = report_folder.write(tmp_path / "run")
    (made / "tune.json").write_text(summary(mixed).model_dump_json())
    return made


def test_the_page_draws_both_fronts_and_says_who_wins(tmp_path: Path) -> None:
    page = Page(report.page(report.read(folder(tmp_path, BETTER))))
    assert "rank" in page.all("id")
    names = [trace["name"] for trace in page.figures["rank"]["data"]]
    assert names == ["bits alone", "rank and bits"]
    assert any("lower KL than bits alone" in text for text in page.texts)


def test_the_page_of_a_run_without_projections_has_no_such_part(tmp_path: Path) -> None:
    page = Page(report.page(report.read(folder(tmp_path, ()))))
    assert "rank" not in page.all("id")


def text_of(run: Any) -> str:
    """What a terminal of 120 columns shows."""
    console = Console(width=120, file=StringIO())
    with console.capture() as shown:
        console.print(*report.view(run))
    return " ".join(shown.get().split())


def test_the_terminal_has_both_fronts_and_the_spectra(tmp_path: Path) -> None:
    told = text_of(report.read(folder(tmp_path, BETTER)))
    assert "lower KL than bits alone" in told
    assert "90 / 95 / 99 %" in told
    assert "1.33" in told


def profile(rank_of_keys: int) -> Profile:
    """Moments of two heads of eight channels whose keys all heads share, turned or not."""
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    joint = basis[:, :rank_of_keys] @ basis[:, :rank_of_keys].T
    heads = torch.stack([joint[:8, :8], joint[8:, 8:]])
    found = {"moments.keys": heads[None], "cached.moments.keys": heads[None]}
    found |= {"joint.keys": joint[None], "joint.values": torch.eye(16)[None]}
    return Profile((), {**found, "cached.spectra.keys": torch.ones(1, 16)}, {})


def test_heads_together_are_told_beside_heads_alone_before_and_after_rope() -> None:
    found = spectra.energies(profile(3))
    assert spectra.directions(found["keys, all heads"], 0.99) == [3]
    assert spectra.directions(found["values, all heads"], 0.99) == [16]
    assert spectra.directions(found["keys after RoPE, all heads"], 0.9) == [15]
    assert found["keys"].shape == found["keys after RoPE"].shape == (1, 8)
    assert spectra.told(profile(3))["keys, all heads"] == "3 / 3 / 3 of 16"
