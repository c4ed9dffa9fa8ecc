"""Bench: which tokens to keep, and how many in each layer, at equal sizes."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtune import parts
from kvtune.bank import Bank, Sizes, build, text_tokens, wanted
from kvtune.cache import weigh
from kvtune.calibrate import Say, find_ropes, quiet
from kvtune.drafting import drafted
from kvtune.errors import UsageError
from kvtune.fit import Fitter, fit, fitted, ship
from kvtune.measure import Bench
from kvtune.models import facts
from kvtune.parts import Part
from kvtune.prefill import Draft
from kvtune.profile import Profile
from kvtune.prove import interval
from kvtune.recipe import LayerPolicy, Policy, Recipe
from kvtune.replay import ask, replayed
from kvtune.retention import Allocator, Selector
from kvtune.suite import run as run_suite
from kvtune.texts import Document
from kvtune.watched import Sight, going_on

AHEAD = 32  # tokens that a draft says: the model is its own


@dataclass(frozen=True)
class Asked:
    """The tasks that are asked beside the divergence, none without names."""

    names: tuple[str, ...] = ()
    items: int = 12
    length: int = 2048


@dataclass(frozen=True)
class Row:
    """What one way to keep tokens costs."""

    name: str
    kept: float  # of the context, sinks and window included
    tokens: int  # mean over layers and heads
    bits: float  # true bits per cached value behind the context
    kl: float
    kl_low: float
    kl_high: float
    flips: float
    tasks: Mapping[str, float]  # score of each task, and under "dense NAME" the dense model's


class Tokens:
    """One model, its texts and banks; every row is measured on the same continuation."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        documents: list[Document],
        sizes: Sizes,
        window: tuple[int, int] = (4, 32),
        profile: Profile | None = None,
        asked: Asked = Asked(),
        say: Say = quiet,
    ) -> None:
        self._model, self._tokenizer, self._say = model, tokenizer, say
        self._sizes, self._window, self._profile, self._asked = sizes, window, profile, asked
        self._tokens = text_tokens(documents, tokenizer, sizes, "search")
        self._known = facts(model.config)
        self._ropes = find_ropes(model)
        self._fitter = Fitter(profile) if profile else None
        self._banks: dict[frozenset[str], Bank] = {}

    def scorers(self, names: Sequence[str], shares: Sequence[float]) -> list[Row]:
        """Every scorer at every share kept, the same in all layers and heads.

        Raises:
            UsageError: a name that is no selector, or one that is fitted, without a profile.
        """
        for name in names:
            self._check(name, Selector, "reads tensors that are fitted to a profile", " --heads")
        cases = [(name, share, {"use": name}, None) for name in names for share in shares]
        return self._rows(cases)

    def budgets(self, scorer: str, names: Sequence[str], shares: Sequence[float]) -> list[Row]:
        """One scorer under every allocator, at equal totals.

        Raises:
            UsageError: a name that is no allocator, or one that goes by a profile, without one.
        """
        for name in names:
            self._check(name, Allocator, "shares a budget out by what calibration measured")
        return self._rows([(n, s, {"use": scorer}, {"use": n}) for s in shares for n in names])

    def _check(self, name: str, wanted: type[Part], why: str, option: str = "") -> None:
        """Raises UsageError for a part of another kind, or without the profile that it wants."""
        kind = parts.find(name)
        if not issubclass(kind, wanted):
            article = "no" if wanted is Allocator else "not a"
            told = f"{name} is a {kind.kind}, {article} {wanted.kind}."
            raise UsageError(told, "Run: kvtune methods")
        if self._profile is None and (getattr(kind, "fits", False) or getattr(kind, "reads", None)):
            again = f"Run: kvtune calibrate MODEL{option}, and give --profile FILE."
            raise UsageError(f"{name} {why}.", again)

    def _rows(self, cases: Sequence[tuple[str, float, dict[str, Any], Any]]) -> list[Row]:
        found = []
        for done, (name, share, select, allot) in enumerate(cases):
            self._say("bench", done, len(cases))
            found.append(self._row(name, share, select, allot))
        self._say("bench", len(cases), len(cases))
        return found

    def _row(self, name: str, share: float, select: dict[str, Any], allot: Any) -> Row:
        recipe, tensors = self._recipe(share, select, allot)
        policies = recipe.policies(self._known)
        bank = self._bank(policies)

        def own(layer: int, policy: Policy) -> Mapping[str, Tensor]:
            return self._fitter.layer(layer, policy) if self._fitter else {}

        bench = Bench(self._model, bank, self._ropes, own)
        quality = bench.measure(policies, memo=False)
        means, bits = quality.means(), weigh(policies, self._known, self._sizes.context).bits
        held = [
            _budget(policies[i], share, self._sizes.context) for i in self._known.compressible()
        ]
        return Row(
            name,
            share,
            round(sum(held) / len(held)),
            bits,
            means["kl"],
            *interval(quality.kl),
            flips=means["flips"],
            tasks=self._told(recipe, tensors),
        )

    def _recipe(
        self, share: float, select: dict[str, Any], allot: Any
    ) -> tuple[Recipe, dict[str, Tensor]]:
        sinks, recent = self._window
        tokens = round(share * self._sizes.context)
        entry = LayerPolicy(
            span="all",
            sinks=sinks,
            recent=recent,
            select={**select, "budget": tokens},
            allot=allot,
        )
        recipe = Recipe(name=select["use"], layers=(entry,))
        if self._profile is None:
            return recipe, {}
        recipe, _ = fit(recipe, self._profile)
        bare = recipe.model_copy(update={"model": None})
        assert self._fitter is not None
        return bare, fitted(bare.policies(self._known), self._fitter)

    def _bank(self, policies: Sequence[Policy]) -> Bank:
        """The bank that has what the selectors look at, made once for each need."""
        needs = frozenset[str]().union(*(policy.needs for policy in policies))
        fed = needs & {"attention", "replay", "ahead"}
        window = max(policy.observed for policy in policies)
        held = self._banks.get(fed)
        if held is None or any(
            x.shape[2] < min(window, held.context) for x in held.queries.values()
        ):
            made = build(self._model, self._tokens, self._sizes.context, **wanted(policies))
            if "replay" in fed:
                made = dataclasses.replace(made, attention=self._replayed(made), replayed=True)
            if "ahead" in fed:
                made = self._ahead(made)
            held = self._banks[fed] = made
        return held

    def _replayed(self, bank: Bank) -> dict[int, Tensor]:
        """What each token got while its context was read again (KVzip), row by row."""
        rows = []
        for row in range(len(bank.tokens)):
            one = slice(row, row + 1)
            layers = [bank.dense_layer(i, one) for i in range(len(bank.facts.layers))]
            held = {i: (bank.keys[i][one], bank.values[i][one]) for i in bank.keys}
            context = bank.tokens[one, : bank.context]
            rows.append(replayed(self._model, context, layers, held, ask(self._tokenizer)))
        return {i: torch.cat([row[i] for row in rows]) for i in rows[0]}

    @torch.no_grad()
    def _ahead(self, bank: Bank) -> Bank:
        """The same with the queries and keys of what the model itself drafts behind each context:
        the best draft that there can be."""
        queries: dict[int, list[Tensor]] = {i: [] for i in bank.keys}
        keys: dict[int, list[Tensor]] = {i: [] for i in bank.keys}

        def show(layer: int, sight: Sight) -> None:
            queries[layer].append(sight.query)
            keys[layer].append(sight.keys[:, :, -AHEAD:])

        context = bank.tokens[:, : bank.context]
        # of one row a text may end early
        said = drafted(self._model, torch.cat([context, context[:1]]), AHEAD)[: len(context)]
        for row in range(len(context)):
            one = slice(row, row + 1)
            layers = [bank.dense_layer(i, one) for i in range(len(bank.facts.layers))]
            held = {i: (bank.keys[i][one], bank.values[i][one]) for i in bank.keys}
            self._model(said[one], past_key_values=going_on(layers, held, show), logits_to_keep=1)
        asked = {i: torch.cat([bank.queries[i], torch.cat(own)], 2) for i, own in queries.items()}
        ahead = {i: torch.cat(own) for i, own in keys.items()}
        return dataclasses.replace(bank, queries=asked, ahead=ahead)

    def _told(self, recipe: Recipe, tensors: dict[str, Tensor]) -> dict[str, float]:
        """What the tasks score through real generation, context first and question later."""
        if not self._asked.names:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "recipe.toml"
            ship(recipe, tensors, file)
            scores = run_suite(
                self._model,
                self._tokenizer,
                file,
                self._asked.names,
                items=self._asked.items,
                length=self._asked.length,
                draft=Draft(self._model, self._tokenizer),
                force=True,
            )
        found = {}
        for task in scores.tasks:
            found[task.name] = sum(task.compressed) / len(task.compressed)
            found[f"dense {task.name}"] = sum(task.dense) / len(task.dense)
        return found


def _budget(policy: Policy, share: float, context: int) -> float:
    """Mean tokens over the heads of a layer."""
    heads = [(len(own.heads), own.select) for own in policy.heads] or [(1, policy.select)]
    total = sum(count for count, _ in heads)
    held = (count * (select.budget if select else share * context) for count, select in heads)
    return sum(held) / total
