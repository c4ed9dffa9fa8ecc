"""KVTC's coding of components (arXiv:2511.01815): grouped codes of 2, 4 and 8 bits by dynamic
programming, then DEFLATE."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtune.allotting import Group, allot
from kvtune.errors import IntegrityError
from kvtune.packing.container import inflate

SINKS, RECENT = 4, 128  # first and last tokens that KVTC keeps exact
TYPES = (0, 2, 4, 8)
_SIDE = 4  # bytes of a 16-bit scale and a 16-bit shift


def allotted(deviations: Tensor, bits: int) -> list[Group]:
    """The groups of a token's components [R] that leave the least error at so many bits."""
    return list(_allotted(tuple(deviations.double().square().tolist()), bits))


@lru_cache(8)
def _allotted(energies: tuple[float, ...], bits: int) -> tuple[Group, ...]:
    return tuple(allot(energies, bits))


def encode(z: Tensor, groups: Sequence[Group], unit: float) -> bytes:
    """Codes components z [T, R]; 16-bit scales and shifts are in units."""
    values = (z / unit).numpy()
    parts, start = list[bytes](), 0
    for size, bits in groups:
        if bits:
            parts.append(_packed(values[:, start : start + size], bits))
        start += size
    return zlib.compress(b"".join(parts), 6)


def decode(data: bytes, tokens: int, groups: Sequence[Group], unit: float) -> Tensor:
    """Returns components z [T, R].

    Raises:
        IntegrityError: the data are damaged.
    """
    raw = inflate(data, sum(tokens * (_bytes(*group) + _SIDE) for group in groups if group.bits))
    found = np.zeros((tokens, sum(group.size for group in groups)), dtype=np.float32)
    start = place = 0
    for size, bits in groups:
        if bits:
            stop = place + tokens * (_bytes(size, bits) + _SIDE)
            found[:, start : start + size] = _unpacked(raw[place:stop], tokens, size, bits)
            place = stop
        start += size
    if not np.isfinite(found).all():
        raise IntegrityError("The packed cache holds values that are not finite.")
    return torch.from_numpy(found) * unit


def checked(groups: object, rank: int) -> list[Group]:
    """Groups as a header holds them.

    Raises:
        IntegrityError: they do not cover `rank` components, or have sizes and bits unknown here.
    """
    try:
        found = [Group(size, bits) for size, bits in groups]  # type: ignore[attr-defined]
        sound = all(type(n) is int and n > 0 and b in TYPES for n, b in found)
        if sound and sum(size for size, _ in found) == rank:
            return found
    except (TypeError, ValueError):
        pass
    raise IntegrityError(f"The packed cache's groups do not cover its {rank} components.")


def _bytes(size: int, bits: int) -> int:
    return -(-size * bits // 8)


def _packed(x: NDArray[np.float32], bits: int) -> bytes:
    """Scales, shifts and codes of one group [T, n]; codes by component, where neighbours agree."""
    low, high = x.min(1), x.max(1)
    shift = low.astype("<f2")
    scale = ((high - shift.astype(np.float32)) / (2**bits - 1)).astype("<f2")
    safe = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = np.rint((x - shift[:, None].astype(np.float32)) / safe[:, None])
    codes = codes.clip(0, 2**bits - 1).astype(np.uint8)
    per = 8 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
    planes = codes.reshape(len(codes), -1, per)
    joined = np.zeros(planes.shape[:2], dtype=np.uint8)
    for place in range(per):
        joined |= planes[:, :, place] << (place * bits)
    data: bytes = scale.tobytes() + shift.tobytes() + joined.T.tobytes()
    return data


def _unpacked(data: bytes, tokens: int, size: int, bits: int) -> NDArray[np.float32]:
    side = np.frombuffer(data, dtype="<f2", count=2 * tokens).reshape(2, tokens, 1)
    scale, shift = side.astype(np.float32)
    joined = np.frombuffer(data, dtype=np.uint8, offset=_SIDE * tokens).reshape(-1, tokens).T
    planes = [(joined >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)]
    codes = np.stack(planes, -1).reshape(tokens, -1)[:, :size]
    found: NDArray[np.float32] = codes * scale + shift
    return found
