"""Bench: tokens that do not win at few bits, or dropped at equal bytes, under one selector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtune import parts
from kvtune.bank import Sizes, build, text_tokens, wanted
from kvtune.cache import weigh
from kvtune.calibrate import Say, quiet
from kvtune.errors import UsageError
from kvtune.fit import Fitter
from kvtune.measure import Bench
from kvtune.models import Facts, facts, ropes
from kvtune.profile import Profile
from kvtune.prove import interval
from kvtune.recipe import Policy, Recipe
from kvtune.retention import Selector
from kvtune.texts import Document

Policies = tuple[Policy, ...]
DROPPED = "dropped"
EQUAL_BYTES = "dropped, at no fewer bytes"


@dataclass(frozen=True)
class Row:
    """What one share and fate of the rest cost."""

    share: float  # of the tokens that leave the window, kept
    rest: str  # what becomes of the others
    bits: float  # true bits per cached value behind the context
    kl: float
    kl_low: float
    kl_high: float
    flips: float


def rows(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    recipe: Recipe,
    sizes: Sizes,
    shares: Sequence[float],
    profile: Profile | None = None,
    say: Say = quiet,
) -> list[Row]:
    """Measures a recipe whose layers select tokens at several shares, against dropping.

    First all tokens are stored as the rest is, a share of nothing. Each share is measured with the
    recipe's rest tier, with the rest dropped, and with dropping at the smallest legal share that
    takes no fewer bytes than the recipe. Codecs that read fitted
    tensors are fitted to the profile.

    Raises:
        MissingInputError: too little text.
        UsageError: a recipe without a selector and a rest tier, or a share that it does not take;
        codecs to fit, and no profile.
    """
    known = facts(model.config)
    policies = recipe.policies(known)
    _check(recipe, policies, profile)
    told = next(" | ".join(map(str, dict.fromkeys(own.rest))) for own in policies if own.rest)
    cases = [(0.0, told, tuple(map(unselected, policies)))]
    for share in shares:
        cases += _cases(policies, known, share, sizes.context, told)
    tokens = text_tokens(documents, tokenizer, sizes, "search")
    bank = build(model, tokens, sizes.context, **wanted(policies))
    bench = Bench(model, bank, ropes(model), Fitter(profile).layer if profile else None)
    found = []
    for done, (share, rest, policies) in enumerate(cases):
        say("bench", done, len(cases))
        quality = bench.measure(policies, memo=False)
        means, bits = quality.means(), weigh(policies, known, sizes.context).bits
        found.append(
            Row(share, rest, bits, means["kl"], *interval(quality.kl), flips=means["flips"])
        )
    return found


def _check(recipe: Recipe, policies: Policies, profile: Profile | None) -> None:
    if not any(policy.select and policy.rest for policy in policies):
        raise UsageError(
            f"{recipe.name or 'The recipe'} selects no tokens, or stores no rest.",
            "Give --recipe mikv, or a recipe with `select` and `rest`.",
        )
    codecs = [codec for policy in policies for chain in policy.chains for codec in chain.codecs]
    if profile is None and (odd := [codec.name() for codec in codecs if codec.fits]):
        raise UsageError(
            f"{odd[0]} reads tensors that are fitted to a profile.",
            "Run: kvtune calibrate MODEL, and give --profile FILE.",
        )


def _cases(
    policies: Policies, known: Facts, share: float, context: int, told: str
) -> list[tuple[float, str, Policies]]:
    stored = shared(policies, share)
    most = weigh(stored, known, context).bytes
    cases = [(share, told, stored), (share, DROPPED, shared(policies, share, drop=True))]
    kind = next(type(policy.select) for policy in policies if policy.select)
    for other in parts.legal_values(kind, "share"):
        dropped = shared(policies, float(other), drop=True)
        if weigh(dropped, known, context).bytes >= most:
            return [*cases, (float(other), EQUAL_BYTES, dropped)]
    return cases  # never reached: to keep all tokens in `kept` takes at least the bytes of a rest


def unselected(policy: Policy) -> Policy:
    """The policy under which all tokens that leave the window are stored as its rest is."""
    if policy.rest is None:
        return policy
    keys, values = policy.rest
    return Policy(sinks=policy.sinks, recent=policy.recent, keys=keys, values=values)


def shared(policies: Policies, share: float, drop: bool = False) -> Policies:
    """The same policies, whose selectors keep another share; without their rest tiers on demand.

    Raises:
        UsageError: a share that a selector does not take.
    """
    return tuple(_shared(policy, share, drop) for policy in policies)


def _shared(policy: Policy, share: float, drop: bool) -> Policy:
    if policy.select is None:
        return policy
    try:
        select = parts.parse({**policy.select.table(), "share": share})
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    assert isinstance(select, Selector)
    return policy.model_copy(update={"select": select} | ({"rest": None} if drop else {}))
