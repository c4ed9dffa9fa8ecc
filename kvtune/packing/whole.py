"""What a packed cache stores as it is: the prefix's ids, and layers with a sliding window."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache

from kvtune.errors import IntegrityError
from kvtune.files import sha256_bytes
from kvtune.models import Facts, places
from kvtune.packing.checks import counted
from kvtune.packing.codec import SIDES
from kvtune.packing.container import Container, inflate

IDS, OTHERS = "prompt", "others"  # sections


def ids(tokens: Tensor) -> tuple[bytes, str]:
    """The section of a prefix's ids [T], and their hash."""
    raw = tokens.flatten().to(torch.int32).cpu().numpy().astype("<i4").tobytes()
    return zlib.compress(raw, 9), f"sha256:{sha256_bytes(raw)}"


def read_ids(held: Container) -> Tensor | None:
    """The ids of the prefix, where they went along."""
    if IDS not in held.facts:
        return None
    if counted(held.facts, "ids") > counted(held.facts, "tokens") + 1:
        raise IntegrityError("The packed cache has more ids than tokens.")
    raw = inflate(held.section(IDS), 4 * counted(held.facts, "ids"))
    if held.facts[IDS] != f"sha256:{sha256_bytes(raw)}":
        raise IntegrityError("The packed cache's prompt does not match its hash.")
    return torch.from_numpy(np.frombuffer(raw, dtype="<i4").astype(np.int64))


def values(known: Facts, tokens: int) -> int:
    """How many values a cache of the model holds, those of sliding layers too."""
    return sum(
        2 * layer.kv_heads * layer.head_dim * _kept(layer.window, tokens) for layer in known.layers
    )


def _kept(window: int | None, tokens: int) -> int:
    return tokens if window is None else min(tokens, max(1, window - 1))


def others(cache: DynamicCache, known: Facts) -> dict[str, bytes]:
    """The section of the layers that are not coded, if there are any."""
    full = set(known.compressible())
    tensors = {
        f"{i}.{side}": getattr(layer, side).detach().cpu().contiguous()
        for i, layer in enumerate(cache.layers)
        if i not in full
        for side in SIDES
    }
    return {OTHERS: safetensors.torch.save(tensors)} if tensors else {}


def restored(
    held: Container,
    model: Any,
    known: Facts,
    sides: dict[int, tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    tokens: int,
) -> DynamicCache:
    """A cache of both sides [1, H, T, D] of coded layers, and of the others, on their devices."""
    cache, devices = DynamicCache(config=model.config), places(model)
    for i, (keys, values) in _read_others(held, known, dtype, tokens).items():
        sides[i] = keys, values
    for i, (keys, values) in sorted(sides.items()):
        layer, device = cache.layers[i], devices[i]
        layer.update(keys.to(device, dtype), values.to(device, dtype))
        if known.layers[i].window is not None:
            layer.cumulative_length = tokens
    return cache


def _read_others(
    held: Container, known: Facts, dtype: torch.dtype, tokens: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """The layers that are stored as they are."""
    wanted = [i for i in range(len(known.layers)) if i not in set(known.compressible())]
    if not wanted:
        return {}
    try:
        tensors = safetensors.torch.load(held.section(OTHERS))
        found = {i: (tensors[f"{i}.keys"], tensors[f"{i}.values"]) for i in wanted}
    except (SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError(f"The packed cache's sliding layers are damaged: {error}.") from None
    for i, pair in found.items():
        own = known.layers[i]
        shape = (1, own.kv_heads, _kept(own.window, tokens), own.head_dim)
        if any(tuple(x.shape) != shape or x.dtype != dtype for x in pair):
            raise IntegrityError(f"The packed cache's sliding layer {i} is not {list(shape)}.")
    return found
