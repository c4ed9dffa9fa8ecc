"""What must be true of a cache, a codec, settings and a packed file before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvtune.errors import IntegrityError, UnsupportedError, UsageError, suggest
from kvtune.models import Facts, facts, fingerprint
from kvtune.packing.codec import Codec
from kvtune.packing.span import Span

CODINGS = ("entropy", "kvtc")


def belongs(codec: Codec, model: Any) -> None:
    """Raises IntegrityError unless a codec is the model's."""
    known = facts(model.config)
    covered = sorted(i for keys, _ in codec.spans for i in keys.layers)
    fits = covered == list(known.compressible()) and all(
        _fits(span, known) for pair in codec.spans for span in pair
    )
    if not fits or codec.fingerprint != fingerprint(model):
        raise IntegrityError(
            "The codec was made for another model.", "Run kvtune pack without --codec to make one."
        )


def _fits(span: Span, known: Facts) -> bool:
    """Whether a span's layers, which the model has, are all of its shape."""
    shapes = {(known.layers[i].kv_heads, known.layers[i].head_dim) for i in span.layers}
    if len(shapes) != 1:
        return False
    ((count, dim),) = shapes
    return tuple(span.root.shape) == (count * len(span.layers), dim, dim)


def length_of(cache: DynamicCache, known: Facts) -> int:
    """How many tokens a cache holds; UnsupportedError when it cannot be packed."""
    layers = cache.layers
    if len(layers) != len(known.layers) or not all(layer.is_initialized for layer in layers):
        what = f"The cache has {len(layers)} filled layers, the model {len(known.layers)}."
        raise UnsupportedError(what, "Run the prefill with this model first.")
    for i in known.compressible():
        if type(layers[i]) is not DynamicLayer:
            what = f"Layer {i} of the cache is a {type(layers[i]).__name__}."
            raise UnsupportedError(what, "Pack a DynamicCache: pass none, or DynamicCache().")
    if (batch := layers[0].keys.shape[0]) != 1:
        what = f"The cache holds a batch of {batch} sequences; one file holds one."
        raise UnsupportedError(what, "Pack each row alone: cache.batch_select_indices.")
    return int(cache.get_seq_length(known.compressible()[0]))


def settings(
    step: float, bits: float | None, coding: str, tokens: Tensor | None, length: int
) -> None:
    """Raises UsageError for settings that cannot be."""
    if coding not in CODINGS:
        raise UsageError(f"There is no coding {coding!r}.", suggest(coding, CODINGS))
    if coding == "kvtc" and bits is None:
        raise UsageError("KVTC's coding is told its bits.", "Give --bits or --ratio.")
    for name, value in (("step", step), ("bits", bits)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"A {name} of {value} cannot be.", "Give a positive number.")
    if tokens is not None and tokens.numel() not in (length, length + 1):
        raise UsageError(f"{tokens.numel()} ids were given for a cache of {length} tokens.")


def counted(held: Mapping[str, Any], name: str) -> int:
    """A count out of a header; IntegrityError when it is none."""
    value = held.get(name)
    if type(value) is not int or value < 0:
        raise IntegrityError(f"The packed cache says {name} = {value!r}.")
    return value


def same(held: Mapping[str, Any], codec: Codec) -> None:
    """Raises IntegrityError unless a file was made with this codec."""
    if held.get("fingerprint") != codec.fingerprint:
        raise IntegrityError("The packed cache is another model's.", "Give the model it names.")
    if held.get("codec") != codec.digest:
        what = f"The packed cache was made with the codec {str(held.get('codec'))[:12]}, not with "
        raise IntegrityError(f"{what}{codec.digest[:12]}.", "Give its own codec: --codec FILE.")
