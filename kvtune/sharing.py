"""Sharing: which layers of a model store together, and which read another's cache."""

from __future__ import annotations

from collections.abc import Sequence

from kvtune.errors import UsageError
from kvtune.models import FULL, Facts, LayerFacts
from kvtune.policy import Policy

Unit = tuple[int, ...]  # layers that live and die together, in order


def groups(policies: Sequence[Policy], layers: Sequence[LayerFacts]) -> tuple[Unit, ...]:
    """The layers that store together: runs of full-attention layers of one policy and shape.

    Sliding layers between them are skipped. A run is cut into groups of the sharer's size, of which
    the last may be smaller; a layer that stores alone ends a run.
    """
    found: list[list[int]] = []
    before: tuple[Policy, int, int] | None = None
    for index, (policy, layer) in enumerate(zip(policies, layers, strict=True)):
        if layer.kind != FULL:
            continue
        alike = (policy, layer.kv_heads, layer.head_dim)
        if policy.sharer is None:
            before = None
        elif alike == before and len(found[-1]) < policy.sharer.layers:
            found[-1].append(index)
        else:
            found.append([index])
            before = alike
    return tuple(map(tuple, found))


def owners(policies: Sequence[Policy], layers: Sequence[LayerFacts]) -> dict[int, int]:
    """The owner of each layer that reads another's cache, because a recipe says so."""
    return {
        index: policy.borrower.layer
        for index, (policy, layer) in enumerate(zip(policies, layers, strict=True))
        if policy.borrower is not None and layer.kind == FULL
    }


def units(policies: Sequence[Policy], layers: Sequence[LayerFacts]) -> tuple[Unit, ...]:
    """All layers, those together that share: groups, and owners with their borrowers."""
    lent: dict[int, list[int]] = {}
    for borrower, owner in owners(policies, layers).items():
        lent.setdefault(owner, [owner]).append(borrower)
    shared = [*groups(policies, layers), *map(tuple, lent.values())]
    taken = {index for unit in shared for index in unit}
    alone = [(index,) for index in range(len(layers)) if index not in taken]
    return tuple(sorted([*shared, *alone]))


def settled(policies: Sequence[Policy], known: Facts) -> tuple[Policy, ...]:
    """The policies of a model whose groups are known: a group waits for the tokens that it learns.

    Raises:
        UsageError: a group that its sharer or its chains cannot store; an owner that cannot be one.
    """
    made, layers = list(policies), known.layers
    for group in groups(policies, layers):
        first, layer = policies[group[0]], layers[group[0]]
        least = _least(first, len(group), layer, group[0])
        for index in group:
            made[index] = first.model_copy(update={"least": least})
    for borrower, owner in owners(policies, layers).items():
        _check_owner(policies, layers, borrower, owner)
    for index, policy in enumerate(policies):
        if (policy.select is not None or policy.heads) and known.handed(index):
            raise UsageError(
                f"layer {index} is handed on to other layers by the model, so it can neither "
                "select tokens nor treat its heads differently.",
                "Leave select and heads out of this layer.",
            )
    return tuple(made)


def _least(policy: Policy, count: int, layer: LayerFacts, index: int) -> int:
    """How many tokens a group wants before it stores any; UsageError when it can store none."""
    assert policy.sharer is not None
    shape, found = (layer.kv_heads, layer.head_dim), 0
    try:
        found = policy.sharer.least(count, *shape)
        for side, chain in (("keys", policy.keys), ("values", policy.values)):
            body = policy.sharer.shape(side, count, *shape)
            chain.check(*body, side)
            if fitted := sorted(chain.blanks(*body)):
                raise ValueError(f"{fitted[0]} is fitted to one layer, not to what several share")
            found = max(found, chain.least(*body))
    except ValueError as error:
        raise UsageError(f"layer {index}, share: {error}.") from None
    return found


def _check_owner(
    policies: Sequence[Policy], layers: Sequence[LayerFacts], borrower: int, owner: int
) -> None:
    def refuse(why: str) -> UsageError:
        return UsageError(
            f"layer {borrower} cannot read the cache of layer {owner}: {why}.",
            "Name an earlier full-attention layer of equal shape that stores its own tokens.",
        )

    if owner >= borrower:
        raise refuse("an owner comes before those that read it")
    if layers[owner].kind != FULL:
        raise refuse(f"that is a {layers[owner].kind} layer")
    own, other = layers[owner], layers[borrower]
    if (own.kv_heads, own.head_dim) != (other.kv_heads, other.head_dim):
        raise refuse("their heads differ in shape")
    if policies[owner].share is not None:
        raise refuse("that layer shares what it stores itself")
    if policies[owner].select is not None or policies[owner].heads:
        raise refuse("that layer selects tokens, or treats its heads differently")


def pieces(policies: Sequence[Policy], seen: int, count: int) -> list[int]:
    """Sizes of the pieces in which `count` tokens behind `seen` are read as one by one.

    A group of layers takes in a block of tokens when its last layer has seen them, so within one
    forward its first layers cannot read what only that forward lets leave the window.
    """
    shared = list(dict.fromkeys(policy for policy in policies if policy.sharer is not None))
    found: list[int] = []
    before: tuple[int, ...] | None = None
    for place in range(seen, seen + count):
        due = tuple(policy.due(place) for policy in shared)
        if due == before:
            found[-1] += 1
        else:
            found.append(1)
        before = due
    return found
