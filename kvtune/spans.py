"""Layer spans: which layers an entry of a recipe speaks
for, and that each layer is covered exactly once."""

import re
from collections.abc import Sequence
from itertools import chain

from kvtune.errors import UsageError

_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_END = re.compile(r"(first|last) ([0-9]{1,5})")
_MOST = 100_000  # more layers than a span can name


def resolve(spans: Sequence[str], layers: int, what: str = "layer") -> list[int]:
    """Returns, for each layer, the index of the span that covers it.

    A span is `all`, `rest`, `first N`, `last N`, or ranges such as `0-3, 7`. Spans of other things
    than layers, such as kv heads, are told so by `what`.

    Raises:
        UsageError: a span that is none of these or leaves the model, or a layer covered twice or
        never.
    """
    owner: list[int | None] = [None] * layers
    for index, span in enumerate(spans):
        for layer in chain.from_iterable(_ranges(span, layers, what)):
            if (other := owner[layer]) is not None:
                raise UsageError(
                    f"{what} {layer} is covered twice, by {spans[other]!r} and {span!r}."
                )
            owner[layer] = index
    rests = [index for index, span in enumerate(spans) if span == "rest"]
    if len(rests) > 1:
        raise UsageError(f'"rest" stands twice, so {what}s would be covered twice.')
    full = [rests[0] if rests and found is None else found for found in owner]
    if missing := [layer for layer, found in enumerate(full) if found is None]:
        raise UsageError(
            f"{what}s {write(missing)} of {layers} are not covered.",
            'Add an entry with span = "rest".',
        )
    return [found for found in full if found is not None]


def check(span: str) -> None:
    """Raises UsageError when no model could have a span like this."""
    _ranges(span, _MOST)


def write(layers: Sequence[int]) -> str:
    """Returns the shortest span of sorted layer indices: [0, 1, 2, 7] is "0-2, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _ranges(span: str, layers: int, what: str = "layer") -> list[range]:
    """Returns ranges, not layers: a stranger's span may name one layer a million times."""
    if span == "rest":
        return []
    if span == "all":
        return [range(layers)]
    if found := _END.fullmatch(span):
        count = int(found[2])
        if count > layers:
            raise UsageError(f"span {span!r} is longer than the model's {layers} {what}s.")
        return [range(count) if found[1] == "first" else range(layers - count, layers)]
    covered: list[range] = []
    for piece in span.split(","):
        found = _RANGE.fullmatch(piece.strip())
        if not found:
            raise UsageError(
                f"span {span!r} is none of all, rest, first N, last N, or ranges.",
                'Write for example span = "0-3, 7".',
            )
        low, high = int(found[1]), int(found[2] or found[1])
        if low > high or high >= layers:
            raise UsageError(f"span {span!r} does not fit a model with {layers} {what}s.")
        covered.append(range(low, high + 1))
    return covered
