"""Tune: the whole job, from a model to a proved front and a chosen recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtune import runs
from kvtune.bank import Bank, Sizes, build, text_tokens
from kvtune.cache import weigh
from kvtune.calibrate import calibrate, find_ropes, missing_cells, priced_further, quiet
from kvtune.errors import IntegrityError, ResourceError, UsageError
from kvtune.files import sweep, write_atomic
from kvtune.front import (
    Candidate,
    Point,
    best_uniform,
    held_out,
    worth_measuring,
    worth_proving,
)
from kvtune.layout import Goal
from kvtune.measure import Bench
from kvtune.models import Facts, facts, fingerprint, label
from kvtune.profile import Profile
from kvtune.prove import Proof, by_generation, environment
from kvtune.recipe import RECIPE_FILE, ModelBinding, Recipe, digest
from kvtune.recipe import load as load_recipe
from kvtune.search import Limits, Search
from kvtune.shipped import find
from kvtune.space import opened, to_recipe
from kvtune.study import Row
from kvtune.texts import Document, read, split
from kvtune.texts import digest as text_digest

Say = Callable[[str, int, int], None]
Texts = dict[str, list[Document]]


@dataclass(frozen=True)
class Settings:
    """What a run depends on, besides model, texts and template."""

    sizes: Sizes = field(default_factory=Sizes)
    goal: Goal = field(default_factory=Goal)
    seed: int = 0
    proof_steps: int = 32
    points: int = 9  # how many recipes of the front are proved
    max_kl: float = 0.02  # the chosen recipe is the smallest one within it


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
        limits: Limits | None = None,
        say: Say = quiet,
    ) -> None:
        self.model, self.tokenizer, self.texts, self.template = model, tokenizer, texts, template
        self.folder, self.name, self.settings, self.say = folder, name, settings or Settings(), say
        self.limits = limits or Limits(str(folder / runs.STUDY))
        self.known: Facts = facts(model.config)
        self.choices = opened(template, self.known)
        sweep(folder)

    def run(self, command: str = "kvtune.tune", calibrated: bool = False) -> dict[str, Any]:
        """Calibrates, searches and proves; a finished run of the same inputs is read back.

        With `calibrated` the folder's profile is taken as it is, or the run refused.

        Raises:
            UsageError: nothing could be proved.
        """
        if held := runs.read_summary(self.folder, self.bound()):
            self.say("finished run reused", 1, 1)
            return held
        profile = self.held_profile() if calibrated else self.profile()
        points = self.prove(self.search(profile))
        if not points:
            raise UsageError("The search found no feasible recipe.", "Give more --trials.")
        return self.finish(points, command)

    def profile(self, exact: bool = False) -> Profile:
        """The folder's profile when it is of this model, text, sizes and template; else another."""
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

    def held_profile(self) -> Profile:
        """The folder's profile as it is.

        Raises:
            MissingInputError: the folder has none.
            IntegrityError: it was measured on another model.
        """
        held = Profile.load(self.folder / runs.PROFILE)
        if held.meta.get("fingerprint") != fingerprint(self.model):
            raise IntegrityError(
                f"{self.folder / runs.PROFILE} was measured on {held.meta.get('model')}, "
                "whose fingerprint is not this model's.",
                f"Run: kvtune calibrate MODEL -o {self.folder}",
            )
        return held

    def search(self, profile: Profile) -> list[Row]:
        """All rows of the study, within the limits; settings without a price are priced first."""
        bench = Bench(self.model, self._bank("search"), find_ropes(self.model))
        if missing := missing_cells(profile, self.choices):
            seed = self.settings.seed
            profile = priced_further(self.model, bench.bank, profile, missing, seed, self.say)
        search = Search(bench, profile, self.choices, self.settings.goal, self.folder)
        self.layout = search.layout
        return search.run(
            self.limits,
            self.settings.seed,
            on_trial=lambda row, total: self.say("trials", min(row.number + 1, total), total),
        )

    def prove(self, rows: list[Row]) -> list[Point]:
        """Measures the study's front on text that neither calibration nor search saw, and writes
        the recipes that no other measured one, uniform ones included, beats there."""
        bank, goal, most = self._bank("proof"), self.settings.goal, self.settings.points
        bench = Bench(self.model, bank, find_ropes(self.model))
        chosen = worth_measuring(rows, self.layout, most + 2)
        measured: list[Candidate] = []
        for done, (origin, assignment) in enumerate(chosen, 1):
            with suppress(ResourceError):  # what does not fit into memory is no candidate
                measured.append(held_out(bench, self.layout, origin, assignment))
            self.say("held-out text", done, len(chosen))
        runs.clear_front(self.folder)
        points: list[Point] = []
        proved = worth_proving(measured, most)
        for candidate in proved:
            cache = bench.cache(candidate.policies)
            quality = by_generation(self.model, cache, bank, self.settings.proof_steps)
            weight = weigh(candidate.policies, self.known, goal.context, goal.batch)
            proof = Proof.of(quality, weight, bank.context, goal.context, goal.batch)
            rival = best_uniform(measured, candidate.bytes)
            points.append(self._written(len(points), candidate, rival, proof))
            self.say("proof by generation", len(points), len(proved))
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
            limits=[self.limits.trials, self.limits.seconds],
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
        same = all(held.meta.get(name) == value for name, value in wanted.items())
        return same and not missing_cells(held, self.choices)

    def _written(
        self, index: int, candidate: Candidate, rival: float | None, proof: Proof
    ) -> Point:
        name, file = f"{proof.bits:.2f} bits", f"{runs.FRONT}/{index:02}.toml"
        point = Point(file, name, candidate.origin, candidate.kl, rival, proof)
        evidence = {
            **proof.table(),
            "held_out_kl": float(f"{candidate.kl:.6g}"),
            "texts": {role: text_digest(documents) for role, documents in self.texts.items()},
            "date": time.strftime("%Y-%m-%d"),
            **environment(self.model.device),
        }
        recipe = to_recipe(
            dict(enumerate(candidate.policies)),
            len(self.known.layers),
            name=f"{label(self.name).rpartition('/')[2].lower()}-{proof.bits:.2f}",
            description=f"{proof.ratio:.2f} times smaller than 16 bits at {proof.bytes_context} "
            f"tokens; KL {proof.kl:.4g} nats on held-out text.",
            model=self._model_binding(),
            measured=evidence,
        )
        recipe.save(self.folder / file)
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


def tune(
    model: Any,
    tokenizer: Any,
    folder: Path | str,
    *,
    data: str = "builtin",
    template: Recipe | str = "search-affine",
    name: str = "",
    settings: Settings | None = None,
    say: Say = quiet,
) -> dict[str, Any]:
    """The whole job for a loaded model: writes a run folder and returns its summary.

    Args:
        data: `builtin`, text or JSONL files, or `hf:NAME`.
        template: a template, or the path or shipped name of one.
        name: the model's name, as it shall stand in the recipes.

    Raises:
        MissingInputError: too little text.
        UsageError: nothing is opened, or nothing could be proved.
    """
    opened_by = template if isinstance(template, Recipe) else load_recipe(find(template))
    texts = split(read(data))
    wanted = settings or Settings()
    return Tuner(
        model, tokenizer, texts, opened_by, Path(folder), name=name, settings=wanted, say=say
    ).run()
