"""Which configuration a search tries next: it follows from seed, trial number and rows so far."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from random import Random

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import TrialState, create_trial

from kvtune.errors import UsageError, suggest

Choice = dict[str, str]

REPEATS = 3  # memo answers in a row after which the sampler is taken to be stuck


def key(choice: Choice) -> str:
    """Returns canonical JSON: equal for equal configurations, whatever their order."""
    return json.dumps(choice, sort_keys=True)


@dataclass(frozen=True)
class Seeded:
    """A configuration and where it comes from, such as "uniform affine 4/4" or "sampler"."""

    origin: str
    choice: Choice


@dataclass(frozen=True)
class Space:
    """The variables of a search, each with its option labels.

    Raises:
        UsageError: a variable has no options, or one twice.
    """

    variables: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for name, options in self.variables.items():
            if not options or len(set(options)) < len(options):
                raise UsageError(f"variable {name!r} needs options, each once: {options}")

    @property
    def size(self) -> int:
        """The number of configurations."""
        return prod(len(options) for options in self.variables.values())

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The variables as Optuna stores them."""
        return {name: CategoricalDistribution(x) for name, x in self.variables.items()}

    def at(self, index: int) -> Choice:
        """Returns the configuration of that index, its first digit that of the first variable."""
        choice: Choice = {}
        for name, options in self.variables.items():
            index, digit = divmod(index, len(options))
            choice[name] = options[digit]
        return choice

    def check(self, start: Seeded) -> None:
        """Checks that a start point sets every variable, and nothing else, to one of its options.

        Raises:
            UsageError: it does not.
        """
        if start.choice.keys() != self.variables.keys():
            odd = sorted(start.choice.keys() ^ self.variables.keys())
            raise UsageError(f"start {start.origin!r} lacks or adds variables: {', '.join(odd)}")
        for name, label in start.choice.items():
            if label not in self.variables[name]:
                raise UsageError(
                    f"start {start.origin!r} sets {name} to {label!r}",
                    suggest(label, self.variables[name]),
                )


@dataclass(frozen=True)
class Plan:
    """A search as given: what a study is bound to.

    `context` stands for all that the rows depend on besides: model, texts, ways of measuring.

    Raises:
        UsageError: objectives are missing or stand twice, or a start point is wrong.
    """

    space: Space
    starts: tuple[Seeded, ...]
    objectives: tuple[str, ...]
    seed: int
    context: str

    def __post_init__(self) -> None:
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise UsageError(f"a search needs objectives, each once: {self.objectives}")
        for start in self.starts:
            self.space.check(start)

    def binding(self) -> dict[str, str]:
        """Returns what must not change on resume, under the names that an error gives it."""
        return {
            "space": _digest(list(self.space.variables.items())),
            "start points": _digest([[x.origin, x.choice] for x in self.starts]),
            "objectives": ", ".join(self.objectives),
            "seed": str(self.seed),
            "model, texts or settings": self.context,
        }


def _digest(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Past:
    """What the next configuration depends on besides the study's finished trials."""

    repeats: int  # memo answers at the end of the table
    seen: Set[str]  # the keys of all configurations in the table
    busy: Set[str] = frozenset()  # the keys of those that other workers evaluate now


def generator(seed: int, number: int) -> Random:
    """Returns the generator of one trial: the same one in every process that comes to it."""
    return Random(sha256(f"{seed}:{number}".encode()).digest())


def unseen(space: Space, index: int, seen: Set[str]) -> Choice:
    """Walks on from an index to a configuration not seen yet; there must be one."""
    while key(choice := space.at(index)) in seen:
        index = (index + 1) % space.size
    return choice


def propose(study: Study, plan: Plan, number: int, past: Past) -> Seeded | None:
    """Returns the start point of that number, else what the sampler suggests, else a random one.

    None when nothing can be tried now: the space is spent, or the start point is being evaluated
    under another number. What another worker evaluates is never proposed, so nothing is done twice.
    """
    if number < len(plan.starts):
        start = plan.starts[number]
        return None if key(start.choice) in past.busy else start
    space, rng = plan.space, generator(plan.seed, number)
    taken = past.seen | past.busy
    if len(taken) >= space.size:
        return None
    if past.repeats >= REPEATS:
        return Seeded("random", unseen(space, rng.randrange(space.size), taken))
    sampled = _sample(study, space, rng.getrandbits(32))
    found = sampled or space.at(rng.randrange(space.size))
    if key(found) in past.busy:
        return Seeded("random", unseen(space, rng.randrange(space.size), taken))
    return Seeded("sampler" if sampled else "random", found)


def _sample(study: Study, space: Space, seed: int) -> Choice:
    """Asks a new TPE sampler; returns an empty choice while it has too few rows to learn from.

    All variables are drawn together: that found better fronts and far fewer repeats than drawing
    each alone. The sampler sees finished trials only, so it knows nothing that a kill can change.
    """
    sampler = TPESampler(seed=seed, multivariate=True, constant_liar=False)
    wide = {name: x for name, x in space.distributions.items() if not x.single()}
    blank = create_trial(state=TrialState.RUNNING)
    if not wide or not (found := sampler.sample_relative(study, blank, wide)):
        return {}
    return {name: found.get(name, options[0]) for name, options in space.variables.items()}
