"""Calibrate: model + text -> Profile, for all settings that a template opens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from kvtune import prices
from kvtune.bank import Bank, Sizes, build, text_tokens, wanted
from kvtune.distortion import distortions
from kvtune.errors import UnsupportedError
from kvtune.fit import Fitter
from kvtune.measure import Bench
from kvtune.models import facts, fingerprint, label, ropes
from kvtune.moments import Moments, attention_mass, pulled
from kvtune.occupancy import occupancy
from kvtune.profile import Cell, Profile, selected, setting
from kvtune.recipe import Policy, Recipe
from kvtune.retrieval import LENGTH, ROW, retrieval_scores
from kvtune.rope import Rope
from kvtune.saving import saving
from kvtune.space import SIDES, Choices, opened
from kvtune.texts import Document, digest

FITTED = 32768  # tokens that fits are made for, where the model takes as many
Say = Callable[[str, int, int], None]  # stage, done, total


def quiet(stage: str, done: int, total: int) -> None:
    """Says nothing."""


def calibrate(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    template: Recipe,
    *,
    name: str = "",
    sizes: Sizes = Sizes(),  # noqa: B008 - a frozen default
    seed: int = 0,
    exact: bool = False,
    say: Say = quiet,
) -> Profile:
    """Measures a model on documents and returns its Profile;
    with `exact`, the exhaustive price table as well.

    Raises:
        MissingInputError: too little text.
        UsageError: nothing opened, nothing that saves bytes at this context, or a context beyond
        the model's positions.
    """
    windows, _ = saving(opened(template, facts(model.config)), facts(model.config), sizes.context)
    tokens = text_tokens(documents, tokenizer, sizes, "calibrate")
    known_ropes = find_ropes(model)
    moments = Moments(known_ropes)
    say("dense pass", 0, 1)
    cells = price_cells(windows)
    asked = wanted(policy for _, policy in cells)
    needs = asked["needs"] | {"attention"}
    bank = build(
        model, tokens, sizes.context, asked["window"], observe=moments.observe, needs=needs
    )
    say("dense pass", 1, 1)
    found = prices.pulls(model, bank, seed)
    known = bank.facts
    tensors = {
        **moments.tensors(min(known.max_positions, FITTED)),
        **pulled(
            {i: (pull.out, pull.gradient) for i, pull in found.items()},
            {i: known.layers[i].kv_heads for i in found},
        ),
        **attention_mass(bank),
        **occupancy(bank, found),
    }
    layers = list(known.compressible())
    fitter = Fitter(Profile((), _kept(tensors), {"layers": layers}))
    bench = Bench(model, bank, known_ropes, fitter.layer)
    began = time.perf_counter()
    priced = prices.table(bench, _places(cells), found, _stage(say, "pricing"))
    seconds = {"price": time.perf_counter() - began}
    tensors |= {"prices": priced[:, 0], "prices_by_head": priced[:, 1:]}
    tensors["errors"] = _errors(bench, next(iter(windows.values())), say)
    if exact:
        began = time.perf_counter()
        tensors["exact"] = prices.exact(bench, _places(cells), _stage(say, "exact"))
        seconds["exact"] = time.perf_counter() - began
    meta = {
        "model": label(name),
        "fingerprint": fingerprint(model),
        "text": digest(documents),
        "sizes": list(sizes),
        "seed": seed,
        "layers": layers,
        "facts": asdict(known),
        "pre_rope": bool(known_ropes),
        "seconds": seconds,
    }
    return Profile(tuple(cell for cell, _ in cells), _kept(tensors), meta)


def with_heads(
    model: Any, tokenizer: Any, documents: list[Document], profile: Profile, say: Say = quiet
) -> Profile:
    """The profile with how much each query head looks at what it is asked for: needle runs in its
    documents, as long as its contexts (`kvtune.retrieval`).

    Raises:
        MissingInputError: there is no prose.
    """
    context = Sizes(*profile.meta["sizes"]).context
    length = min(max(context, LENGTH), facts(model.config).max_positions)
    scores, said = retrieval_scores(
        model,
        tokenizer,
        "\n\n".join(document.text for document in documents),
        length=length,
        seed=int(profile.meta["seed"]),
        say=_stage(say, "needle runs"),
    )
    tensors = {**profile.tensors, **_kept({ROW: scores})}
    return Profile(profile.cells, tensors, {**profile.meta, "retrieval": said})


def _kept(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, in 32 bits but for samples: what a profile holds, and fits are made of."""
    return {name: x.cpu() if "samples." in name else x.cpu().float() for name, x in tensors.items()}


def find_ropes(model: Any) -> dict[int, Rope]:
    """The model's rotary embeddings, or none where keys cannot be turned back."""
    try:
        return ropes(model)
    except UnsupportedError:
        return {}


def price_cells(windows: dict[str, Choices]) -> list[tuple[Cell, Policy]]:
    """All cells of the price table: every layer, side and setting, under every window, and where
    tokens are searched under some selections."""
    cells = {
        Cell(layer, side, setting(chain), own.sinks, own.recent, selected(select)): own.cell(
            side, chain, select
        )
        for choices in windows.values()
        for layer, own in choices.items()
        for side in SIDES
        for chain, select in own.cells(side)
    }
    return list(cells.items())


def _places(cells: list[tuple[Cell, Policy]]) -> list[tuple[int, Policy]]:
    return [(cell.layer, policy) for cell, policy in cells]


def _stage(say: Say, stage: str) -> prices.Progress:
    return lambda done, total: say(stage, done, total)


def _errors(bench: Bench, choices: Choices, say: Say) -> Tensor:
    rows = []
    for layer, own in choices.items():
        rows.append(distortions(bench, layer, own))
        say("errors", len(rows), len(choices))
    return torch.stack(rows)


def spearman(left: Tensor, right: Tensor) -> float:
    """Rank correlation of two tables of one shape."""
    from scipy.stats import spearmanr

    return float(spearmanr(left.double().numpy(), right.double().numpy()).statistic)


def missing_cells(profile: Profile, windows: dict[str, Choices]) -> list[tuple[Cell, Policy]]:
    """The cells that a template opens and the profile has no price for."""
    known = set(profile.cells)
    return [pair for pair in price_cells(windows) if pair[0] not in known]


def priced_further(
    model: Any,
    bank: Bank,
    profile: Profile,
    missing: list[tuple[Cell, Policy]],
    seed: int,
    say: Say = quiet,
) -> Profile:
    """Returns the profile with more cells priced on another
    bank (a template that calibrate did not know)."""
    bench = Bench(model, bank, find_ropes(model), Fitter(profile).layer)
    more = (
        prices.table(
            bench, _places(missing), prices.pulls(model, bank, seed), _stage(say, "pricing")
        )
        .cpu()
        .float()
    )
    tensors = {name: tensor for name, tensor in profile.tensors.items() if name != "exact"}
    tensors["prices"] = torch.cat([tensors["prices"], more[:, 0]])
    tensors["prices_by_head"] = torch.cat([tensors["prices_by_head"], more[:, 1:]])
    return Profile((*profile.cells, *(cell for cell, _ in missing)), tensors, profile.meta)
