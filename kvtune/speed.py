"""Speed: the attention time of a whole recipe, from the latency table of a device."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from kvtune.bench import latency
from kvtune.bench.clock import device_name
from kvtune.chains import Chain
from kvtune.errors import UnsupportedError, UsageError
from kvtune.models import Facts
from kvtune.recipe import Policy
from kvtune.space import SIDES, Choices


class Speed:
    """Microseconds of attention per decoded token, summed over layers, at a context and batch.

    Sliding layers stay transformers' own and cost the same under every recipe: they are not
    counted.
    """

    def __init__(self, table: latency.Table, known: Facts, context: int, batch: int) -> None:
        self.table, self.known = table, known
        self.context, self.batch = context, batch
        self._pair = lru_cache(None)(self._timed)

    def recipe(self, policies: tuple[Policy, ...]) -> float:
        """The time of all compressible layers under their policies."""
        return sum(self.layer(policies[i]) for i in self.known.compressible())

    def layer(self, policy: Policy) -> float:
        """The time of one layer; heads of different formats are read by launches of their own."""
        if policy.is_dense:
            return self.dense()
        if not policy.heads:
            return self.pair(policy.keys, policy.values)
        count = self.table.kv_heads
        return sum(self.pair(own.keys, own.values, len(own.heads) / count) for own in policy.heads)

    def dense(self) -> float:
        """The time of bf16 attention in one layer."""
        return latency.dense(self.table, self.batch, self.context)

    def pair(self, keys: Chain, values: Chain, share: float = 1.0) -> float:
        """The time of one layer's heads, or a share of them, with these codes.

        Part of the heads cost what all of them do in a batch as much smaller, since the bytes are
        the same and every (row, head) is a program of its own.

        Raises:
            UnsupportedError: kernels do not read these codes, so nobody timed them.
        """
        return self._pair(keys, values, share)

    def knows(self, chain: Chain) -> bool:
        """Whether kernels read this chain, so that the table can time it."""
        return chain.format(self.table.head_dim) is not None

    def _timed(self, keys: Chain, values: Chain, share: float) -> float:
        formats = [chain.format(self.table.head_dim) for chain in (keys, values)]
        if formats[0] is None or formats[1] is None:
            untimed = keys if formats[0] is None else values
            what = f"There is no time for {untimed}: no kernel reads it."
            raise UnsupportedError(what, "Leave latency out of --objective, or fix other codecs.")
        batch = self.batch * share
        return latency.estimate(self.table, formats[0], formats[1], batch, self.context)


def open_table(known: Facts, device: torch.device, file: Path | None = None) -> latency.Table:
    """The latency table of a device for a model's heads, or the one in a file.

    Raises:
        MissingInputError: nobody measured it; the message has the command.
        UnsupportedError: layers differ in their heads, or the file is of other heads.
        IntegrityError: the file is damaged.
    """
    shapes = {
        (own.query_heads, own.kv_heads, own.head_dim)
        for own in (known.layers[i] for i in known.compressible())
    }
    if len(shapes) != 1:
        raise UnsupportedError("Latency is known for models whose layers have equal heads only.")
    shape = shapes.pop()
    if file is None:
        return latency.load(device_name(device), *shape)
    table = latency.read(file, latency.command(*shape))
    held = (table.heads, table.kv_heads, table.head_dim)
    if held != shape:
        spelled = " and ".join("/".join(map(str, own)) for own in (held, shape))
        what = f"The latency table {file} is of other heads than the model: {spelled}."
        raise UnsupportedError(what, latency.command(*shape))
    return table


def timed(windows: dict[str, Choices], speed: Speed) -> tuple[dict[str, Choices], int]:
    """The choices that the latency table knows, and how many it does not.

    Raises:
        UsageError: a layer has none left.
    """
    dropped, found = 0, {}
    for name, choices in windows.items():
        kept = {}
        for layer, own in choices.items():
            if own.selects:
                what = f"Layer {layer} opens tokens, and nobody timed kernels on those that stay."
                raise UsageError(what, "Leave latency out of --objective.")
            sides = {s: tuple(c for c in own.chains(s) if speed.knows(c)) for s in SIDES}
            dropped += sum(len(own.chains(s)) - len(sides[s]) for s in SIDES)
            if not all(sides.values()):
                what = f"No setting of layer {layer} has a known latency: kernels read none."
                raise UsageError(what, "Leave latency out of --objective.")
            kept[layer] = replace(own, keys=sides["keys"], values=sides["values"])
        found[name] = kept
    return found, dropped
