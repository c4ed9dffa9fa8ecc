"""Tune: the whole job, from a model to a proved front and a chosen recipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvtune import runs
from kvtune.bank import Bank, build, text_tokens, wanted
from kvtune.calibrate import (
    calibrate,
    find_ropes,
    missing_cells,
    price_cells,
    priced_further,
    quiet,
    spearman,
    with_heads,
)
from kvtune.commons import sole
from kvtune.errors import IntegrityError, UsageError
from kvtune.files import sweep
from kvtune.fit import Fitter
from kvtune.measure import Bench
from kvtune.models import Facts, facts, fingerprint
from kvtune.profile import Profile
from kvtune.publish import Publisher, Say, Settings, Texts
from kvtune.recipe import Recipe, digest
from kvtune.recipe import load as load_recipe
from kvtune.retrieval import ROW
from kvtune.saving import saving
from kvtune.search import STUDY, Limits, Search
from kvtune.shipped import find
from kvtune.space import opened
from kvtune.speed import Speed, open_table, timed
from kvtune.study import Row
from kvtune.texts import digest as text_digest
from kvtune.texts import read, split


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
        context = min(self.settings.sizes.context, self.settings.goal.context)
        # why settings are left out that save nothing at this context
        self.windows, self.unsaving = saving(opened(template, self.known), self.known, context)
        self.untimed = 0  # settings that no kernel reads, left out of a search for latency
        self.speed = self._speed()
        self.seconds: dict[str, float] = {}
        sweep(folder)

    def run(self, command: str = "kvtune.tune", calibrated: bool = False) -> dict[str, Any] | None:
        """Calibrates, searches and proves; a finished run of the same inputs is read back.

        With `calibrated` the folder's profile is taken as it is, or the run refused. Returns None
        where another worker of the same study proves its front.

        Raises:
            UsageError: nothing could be proved.
        """
        if held := self.finished():
            return held
        with self._timed("calibrate"):
            profile = self.held_profile() if calibrated else self.profile()
        with self._timed("search"):
            rows = self.search(profile)
        with sole(self.limits.storage, STUDY, "proof") as mine:
            if not mine:
                return None
            if held := self.finished():
                return held
            return self._published(rows, command)

    def _published(self, rows: list[Row], command: str) -> dict[str, Any]:
        own = (self.model, self.texts, self.folder, self.name, self.settings, self.speed, self.say)
        publisher = Publisher(*own)
        with self._timed("prove"):
            points, measured = publisher.prove(rows, self.layout, self._bank("proof"), self.fitter)
        if not points:
            raise UsageError("The search found no feasible recipe.", "Give more --trials.")
        found = {"held_out": measured, "search": self._said(rows), "stages": self.seconds}
        return publisher.finish(points, command, self.bound(), found)

    def finished(self) -> dict[str, Any] | None:
        """The summary of the folder's finished run, when it is one of these inputs."""
        if held := runs.read_summary(self.folder, self.bound()):
            self.say("finished run reused", 1, 1)
        return held

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - began, 3)

    def _speed(self) -> Speed | None:
        """Attention times, where the goal asks for them; settings without one are left out."""
        goal, file = self.settings.goal, self.settings.latency_table
        if not goal.timed:
            return None
        table = open_table(self.known, self.model.device, file)
        speed = Speed(table, self.known, goal.context, goal.batch)
        self.windows, self.untimed = timed(self.windows, speed)
        return speed

    def profile(self, exact: bool = False, heads: bool = False) -> Profile:
        """The folder's profile when it is of this model, text, sizes and template; else another;
        with `heads`, the retrieval scores of query heads as well."""
        path = self.folder / runs.PROFILE
        made = self._profile(path, exact)
        if heads and ROW not in made.tensors:
            documents = self.texts["calibrate"]
            made = with_heads(self.model, self.tokenizer, documents, made, self.say)
            made.save(path)
        return made

    def _profile(self, path: Path, exact: bool) -> Profile:
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
        fitter = Fitter(profile)
        bench = Bench(self.model, self._bank("search"), find_ropes(self.model), fitter.layer)
        if missing := missing_cells(profile, self.windows):
            seed = self.settings.seed
            profile = priced_further(self.model, bench.bank, profile, missing, seed, self.say)
        goal = self.settings.goal
        search = Search(bench, profile, self.windows, goal, self.limits, self.speed)
        self.searched, self.layout, self.growth = search, search.layout, search.growth
        self.fitter = fitter
        rows = search.run(
            self.settings.seed,
            on_trial=lambda row, total: self.say("trials", min(row.number + 1, total), total),
        )
        runs.write_trials(self.folder, goal.objectives, rows)
        return rows

    def _said(self, rows: list[Row]) -> dict[str, Any]:
        """What the search was for, what became of its trials, and how well it was predicted."""
        goal = self.settings.goal
        return {
            "objectives": list(goal.objectives),
            "constraints": goal.bounds.table(),
            "trials": len(rows),
            "infeasible": sum(row.state == "infeasible" for row in rows),
            "stopped": sum(row.state == "stopped" for row in rows),
            "rank_correlation": predicted_well(rows),
            "interaction": {**self.growth.table(), "additive": self.growth.is_additive},
            "untimed": self.untimed,
        }

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
        asked = wanted(policy for _, policy in price_cells(self.windows))
        bank = build(self.model, tokens, self.settings.sizes.context, **asked)
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
        return same and "facts" in held.meta and not missing_cells(held, self.windows)


def predicted_well(rows: list[Row]) -> float | None:
    """Rank correlation (Spearman) of predicted and measured KL over all rows measured in full."""
    pairs = [
        (float(row.attrs["predicted"]), float(row.attrs["kl"]))
        for row in rows
        if row.memo_of is None and "kl" in row.attrs
    ]
    if len(pairs) < 3:
        return None
    predicted, measured = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return round(spearman(predicted, measured), 4)


def tune(
    model: Any,
    tokenizer: Any,
    folder: Path | str,
    *,
    data: str = "builtin",
    template: Recipe | str = "search-fast",
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
    tuner = Tuner(
        model, tokenizer, texts, opened_by, Path(folder), name=name, settings=wanted, say=say
    )
    return tuner.run() or {}  # the study is the folder's own: no other worker proves it
