"""Tune: the whole job, from a model to a proved front and a chosen recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvtune import runs
from kvtune.bank import Bank, Sizes, build, text_tokens
from kvtune.cache import load, weigh
from kvtune.calibrate import calibrate, find_ropes, missing_cells, priced_further, quiet
from kvtune.errors import UsageError
from kvtune.files import sweep, write_atomic
from kvtune.measure import Bench
from kvtune.models import Facts, facts, fingerprint, label
from kvtune.profile import Profile
from kvtune.prove import Proof, by_generation, environment
from kvtune.recipe import RECIPE_FILE, ModelBinding, Policy, Recipe, digest
from kvtune.search import Goal, Search, spread
from kvtune.space import opened, to_recipe
from kvtune.study import Row, fresh, front
from kvtune.texts import Document
from kvtune.texts import digest as text_digest

Say = Callable[[str, int, int], None]
Texts = dict[str, list[Document]]


@dataclass(frozen=True)
class Settings:
    """What a run depends on, besides model, texts and template."""

    sizes: Sizes = field(default_factory=Sizes)
    goal: Goal = field(default_factory=Goal)
    trials: int = 40
    seed: int = 0
    proof_steps: int = 64
    points: int = 10  # how many recipes of the front are proved
    max_kl: float = 0.02  # the chosen recipe is the smallest one within it


@dataclass(frozen=True)
class Point:
    """One proved recipe."""

    file: str
    label: str
    origin: str
    held_out_kl: float  # on all continuation positions of the proof text, from the bank
    best_uniform_kl: float | None  # the least of any measured uniform recipe at no more bytes
    proof: Proof

    def table(self) -> dict[str, Any]:
        """One flat row."""
        own = {name: value for name, value in asdict(self).items() if name != "proof"}
        return {**own, **self.proof.table()}


class Tuner:
    """A model, its texts and a run folder; each stage reuses what the folder already holds."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        texts: Texts,
        template: Recipe,
        folder: Path,
        *,
        name: str = "",
        settings: Settings | None = None,
        say: Say = quiet,
    ) -> None:
        self.model, self.tokenizer, self.texts, self.template = model, tokenizer, texts, template
        self.folder, self.name, self.settings, self.say = folder, name, settings or Settings(), say
        self.known: Facts = facts(model.config)
        self.choices = opened(template, self.known)
        sweep(folder)

    def profile(self, exact: bool = False) -> Profile:
        """The folder's profile when it is of this model, text and sizes; else a new one."""
        path = self.folder / runs.PROFILE
        if path.is_file():
            held = Profile.load(path)
            if self._fits(held) and (not exact or "exact" in held.tensors):
                self.say("profile reused", 1, 1)
                return held
        made = calibrate(
            self.model,
            self.tokenizer,
            self.texts["calibrate"],
            self.template,
            name=self.name,
            sizes=self.settings.sizes,
            seed=self.settings.seed,
            exact=exact,
            say=self.say,
        )
        made.save(path)
        return made

    def search(
        self, profile: Profile, resume: bool, seconds: float | None = None, anew: bool = False
    ) -> list[Row]:
        """All rows of the study; the search goes on where it was left when `resume` is on."""
        bench = Bench(self.model, self._bank("search"), find_ropes(self.model))
        if missing := missing_cells(profile, self.choices):
            profile = priced_further(
                self.model, bench.bank, profile, missing, self.settings.seed, self.say
            )
        self._search = Search(bench, profile, self.choices, self.settings.goal)
        self._search.prepare(self.folder)
        storage = str(self.folder / runs.STUDY)
        if anew:
            fresh(storage, "kvtune")
        return self._search.run(
            storage,
            self.settings.trials,
            self.settings.seed,
            resume,
            seconds,
            on_trial=lambda row, total: self.say("trials", row.number + 1, total),
        )

    def prove(self, rows: list[Row]) -> list[Point]:
        """Measures the study's front on text that neither
        calibration nor search saw, and writes the proved recipes.

        Kept are the points that no other measured recipe, uniform ones included, beats there.
        """
        bank = self._bank("proof")
        bench = Bench(self.model, bank, find_ropes(self.model))
        candidates = _candidates(rows, 2 * self.settings.points)
        measured = []
        for done, row in enumerate(candidates):
            policies = self._search.policies(row.choice)
            weight = weigh(
                policies, self.known, self.settings.goal.context, self.settings.goal.batch
            )
            measured.append((weight.bytes, bench.measure(policies).means()["kl"], row, policies))
            self.say("held-out text", done + 1, len(candidates))
        best = [m for m in measured if not any(o[0] <= m[0] and o[1] < m[1] for o in measured)]
        chosen = spread(sorted(best, key=lambda m: -m[0]), self.settings.points)
        uniform = [(size, kl) for size, kl, row, _ in measured if row.origin.startswith("uniform")]
        runs.clear_front(self.folder)
        points = []
        for index, (size, kl, row, policies) in enumerate(chosen):
            rival = min((k for s, k in uniform if s <= size), default=None)
            points.append(self._proved(index, row, policies, kl, rival, bank))
            self.say("proof by generation", index + 1, len(chosen))
        return points

    def finish(self, points: list[Point], command: str) -> dict[str, Any]:
        """Writes the chosen recipe as a folder to share, and the summary; returns the summary."""
        within = [i for i, point in enumerate(points) if point.proof.kl <= self.settings.max_kl]
        chosen = min(within, key=lambda i: points[i].proof.bytes) if within else 0
        tables = [point.table() for point in points]
        source = (self.folder / points[chosen].file).read_bytes()
        target = self.folder / runs.CHOSEN
        write_atomic(
            target / "README.md",
            runs.card(f"{label(self.name)}-kv", label(self.name), tables, chosen, command).encode(),
        )
        write_atomic(target / RECIPE_FILE, source)
        summary = {
            "points": tables,
            "chosen": chosen,
            "model": label(self.name),
            **environment(self.model.device),
        }
        runs.write_summary(self.folder, self.bound(), summary)
        return summary

    def bound(self) -> str:
        """What a finished run depends on."""
        return runs.binding(
            fingerprint=fingerprint(self.model),
            texts={role: text_digest(documents) for role, documents in self.texts.items()},
            template=digest(self.template),
            dtype=str(self.model.dtype),
            settings={name: str(value) for name, value in vars(self.settings).items()},
        )

    def _bank(self, role: str) -> Bank:
        self.say(f"dense pass, {role}", 0, 1)
        tokens = text_tokens(self.texts[role], self.tokenizer, self.settings.sizes, role)
        bank = build(self.model, tokens, self.settings.sizes.context)
        self.say(f"dense pass, {role}", 1, 1)
        return bank

    def _fits(self, held: Profile) -> bool:
        wanted = {
            "fingerprint": fingerprint(self.model),
            "text": text_digest(self.texts["calibrate"]),
            "sizes": list(self.settings.sizes),
            "seed": self.settings.seed,
        }
        return all(held.meta.get(name) == value for name, value in wanted.items())

    def _proved(
        self,
        index: int,
        row: Row,
        policies: tuple[Policy, ...],
        kl: float,
        rival: float | None,
        bank: Bank,
    ) -> Point:
        goal = self.settings.goal
        weight = weigh(policies, self.known, goal.context, goal.batch)
        bare = to_recipe(
            dict(enumerate(policies)),
            len(self.known.layers),
            name=f"{label(self.name)}-{weight.bits:.2f}",
        )
        quality = by_generation(self.model, load(bare, self.model), bank, self.settings.proof_steps)
        proof = Proof.of(quality, weight, bank.context, goal.context, goal.batch)
        point = Point(
            f"{runs.FRONT}/{index:02}.toml", f"{weight.bits:.2f} bits", row.origin, kl, rival, proof
        )
        evidence = {
            **proof.table(),
            "texts": {role: text_digest(documents) for role, documents in self.texts.items()},
            "held_out_kl": float(f"{kl:.6g}"),
            "date": time.strftime("%Y-%m-%d"),
            **environment(self.model.device),
        }
        bound = bare.model_copy(update={"model": self._model_binding(), "measured": evidence})
        bound.save(self.folder / point.file)
        return point

    def _model_binding(self) -> ModelBinding:
        first = self.known.layers[self.known.compressible()[0]]
        return ModelBinding(
            name=label(self.name),
            fingerprint=fingerprint(self.model),
            architecture=self.known.architecture,
            layers=len(self.known.layers),
            kv_heads=first.kv_heads,
            head_dim=first.head_dim,
        )


def tune(tuner: Tuner, command: str = "kvtune tune") -> dict[str, Any]:
    """Calibrates, searches and proves; a finished run of the same inputs is read back.

    Raises:
        UsageError: nothing could be proved.
    """
    if held := runs.read_summary(tuner.folder, tuner.bound()):
        tuner.say("finished run reused", 1, 1)
        return held
    rows = tuner.search(tuner.profile(), resume=True)
    points = tuner.prove(rows)
    if not points:
        raise UsageError("The search found no feasible recipe.", "Give more --trials.")
    return tuner.finish(points, command)


def _candidates(rows: list[Row], most: int) -> list[Row]:
    """The uniform recipes that were measured, and an even choice of the study's front."""
    uniform = [row for row in rows if row.origin.startswith("uniform") and row.values]
    others = sorted(
        (row for row in front(rows) if row not in uniform), key=lambda row: row.attrs["bits"]
    )
    return uniform + spread(others, max(2, most - len(uniform)))
