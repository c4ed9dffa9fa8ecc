"""The codec of a model's caches: what was fitted once, in one safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtune.errors import IntegrityError, KvtuneError
from kvtune.files import canonical_json
from kvtune.packing.span import Span
from kvtune.tensors import Artifact

FORMAT = 1
SIDES = ("keys", "values")
_PARTS = ("mean", "root", "basis", "deviations")


@dataclass(frozen=True, eq=False)
class Codec:
    """Spans of layers, keys and values of each, and where they come from.

    Args:
        spans: in the order of the layers; keys and values of a span have the same layers.
        meta: the model's fingerprint, the hash of the text, sizes and settings.
    """

    spans: tuple[tuple[Span, Span], ...]
    meta: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of the model whose caches it codes."""
        return str(self.meta["fingerprint"])

    @property
    def pre_rope(self) -> bool:
        """Whether keys are coded before the rotary embedding."""
        return bool(self.meta["pre_rope"])

    @property
    def nbytes(self) -> int:
        """What it takes in memory and in a file."""
        return sum(x.nbytes for _, x in self._tensors())

    @cached_property
    def digest(self) -> str:
        """sha256 over all that is in it, 64 hex digits."""
        total = hashlib.sha256(canonical_json(dict(self.meta)).encode())
        for name, x in self._tensors():
            total.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
            total.update(x.contiguous().view(torch.uint8).numpy().data)
        return total.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(self.spans):
            for side, span in zip(SIDES, pair, strict=True):
                for part in _PARTS:
                    yield f"{number}.{side}.{part}", getattr(span, part)

    def save(self, path: Path) -> None:
        """Writes it atomically."""
        layers = [list(keys.layers) for keys, _ in self.spans]
        meta = {**self.meta, "packing_codec": FORMAT, "layers": layers}
        Artifact(dict(self._tensors()), meta).save(path)

    @classmethod
    def load(cls, path: Path) -> Codec:
        """Reads a file that nobody vouches for.

        Raises:
            MissingInputError: there is no such file.
            IntegrityError: it is damaged, or no codec of caches.
        """
        held = Artifact.load(path)
        meta = dict(held.meta)
        try:
            if (found := meta.pop("packing_codec")) != FORMAT:
                raise IntegrityError(f"it has format {found!r}, not {FORMAT}")
            layers: Any = meta.pop("layers")
            spans = tuple(
                (_span(held, number, "keys", own), _span(held, number, "values", own))
                for number, own in enumerate(layers)
            )
            held.check_shapes(_expected(spans))
            _check_meta(meta)
        except (KvtuneError, KeyError, TypeError, ValueError, IndexError) as error:
            what = f"{path} is no codec of caches: {error}."
            raise IntegrityError(what, "Run kvtune pack without --codec to make one.") from None
        return cls(spans, meta)


def _span(held: Artifact, number: int, side: str, layers: Any) -> Span:
    tensors = (held.tensors[f"{number}.{side}.{part}"] for part in _PARTS)
    return Span(tuple(int(layer) for layer in layers), *tensors)


def _expected(spans: tuple[tuple[Span, Span], ...]) -> dict[str, tuple[int, ...]]:
    """The shapes that parts must have beside one another."""
    found: dict[str, tuple[int, ...]] = {}
    for number, pair in enumerate(spans):
        for side, span in zip(SIDES, pair, strict=True):
            blocks, dim, _ = span.root.shape
            stem, rank = f"{number}.{side}", span.basis.shape[1]
            found[f"{stem}.mean"] = (blocks * dim,)
            found[f"{stem}.root"] = (blocks, dim, dim)
            found[f"{stem}.basis"] = (blocks * dim, rank)
            found[f"{stem}.deviations"] = (rank,)
    return found


def _check_meta(meta: dict[str, Any]) -> None:
    if not isinstance(meta["fingerprint"], str) or not isinstance(meta["pre_rope"], bool):
        raise ValueError("it names no model")
