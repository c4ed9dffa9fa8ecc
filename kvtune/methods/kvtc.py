"""Bits for groups of neighbouring components by exact dynamic programming, a scale and a shift for
each group of each token (KVTC, arXiv:2511.01815)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, NamedTuple

import torch
from kvtune_kernels import PAGE
from kvtune_kernels.groups import dequantize, quantize
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvtune.allotting import ROUNDING, SIDE, Floats, allot
from kvtune.marks import OneOf
from kvtune.parts import Code, Quantizer, Seen, Site

TYPES = (0, 2, 3, 4, 8)  # KVTC's bits of a component, and 3
MEASURED = 2**22  # values that the error of one kind of group is measured on, about
FIRST = 128  # the flag of the component that a group begins at
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Run(NamedTuple):
    """A group of one head: its components, and the bits of each."""

    start: int
    size: int
    bits: int

    @property
    def own(self) -> slice:
        """Its components."""
        return slice(self.start, self.start + self.size)


class Kvtc(Quantizer):
    """Components get 0, 2, 3, 4 or 8 bits: those that leave the least error within `bits` of each.

    The 16-bit scale and shift of every group are counted. Groups are of 1, 16, 64, 256 or 1,024
    neighbours whose errors weigh alike, so this pays behind a codec that orders its channels, by a
    metric of what reads them: `svd`, `klt`. A token is one record of so many bytes whatever its
    groups are, and no token knows another. KVTC entropy-codes such records and transforms all
    layers at once; here they are read as they lie.
    """

    bits: Annotated[float, OneOf((1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0))] = 2.0

    fits = True

    @property
    def payload_bits(self) -> float:
        """The mean bits, scales and shifts included."""
        return float(self.bits)

    @property
    def block(self) -> int:
        """Whole pages, as other codecs take, though tokens are apart."""
        return PAGE

    def record(self, head_dim: int) -> int:
        """The bytes of a token of one head."""
        return int(self.bits * head_dim) // 8

    def check(self, head_dim: int, side: str) -> None:
        """A record holds a group at the least."""
        if 8 * self.record(head_dim) < SIDE + 2:
            raise ValueError(
                f"kvtc has {8 * self.record(head_dim)} bits for the {head_dim} channels of a "
                f"token, and one group takes {SIDE + 2}"
            )

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """A byte for each component: its bits, and whether a group begins there."""
        return {"groups": torch.empty(heads, head_dim, dtype=torch.uint8, device="meta")}

    def fit(self, seen: Seen) -> dict[str, Tensor]:
        """Finds the groups by the errors that they leave in the sample."""
        rows = [self._allotted(own) for own in seen.sample.double()]
        return {"groups": torch.tensor(rows, dtype=torch.uint8)}

    def encode(self, x: Tensor, site: Site) -> Code:
        """Records [B, H, T, bytes]: scale and shift of each group, then the codes of all."""
        width = self.record(x.shape[-1])
        if x.is_meta:
            return Code(x.new_empty(*x.shape[:3], width, dtype=torch.uint8))
        heads = [self._encoded(x[:, h], runs, width) for h, runs in enumerate(self._runs(site))]
        return Code(torch.stack(heads, 1))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns x [B, H, T, D]; a component without bits is zero."""
        groups = self._groups(site)
        shape = (*code.body.shape[:3], groups.shape[-1])
        out = torch.zeros(shape, dtype=torch.float32, device=code.body.device)
        for h, runs in enumerate(self._runs(site)):
            self._decode(code.body[:, h], runs, out[:, h])
        return out.to(site.dtype)

    def _allotted(self, sample: Tensor) -> list[int]:
        """The groups of one head, of some of its tokens [n, D]."""
        errors = partial(_measured, sample)
        energies = sample.square().mean(0).numpy()
        found: list[int] = []
        room = 8 * self.record(sample.shape[-1])
        for size, bits in allot(energies, room, types=TYPES, errors=errors):
            found += [bits] * size
            if bits:
                found[-size] |= FIRST
        return found

    def _encoded(self, x: Tensor, runs: list[_Run], width: int) -> Tensor:
        """x [B, T, D] as records [B, T, width]."""
        sides, lanes = [], []
        for run in runs:
            codes, scale, shift = quantize(x[..., run.own].unsqueeze(-1), run.bits)
            sides.append(torch.cat([scale, shift], -1).flatten(-2))
            places = torch.arange(run.bits, dtype=torch.uint8, device=x.device)
            lanes.append((codes >> places & 1).flatten(-2))
        held = x.new_zeros(*x.shape[:2], width, dtype=torch.uint8)
        if runs:
            side = torch.cat(sides, -1).view(torch.uint8)
            held[..., : side.shape[-1]] = side
            packed = _packed(torch.cat(lanes, -1))
            held[..., side.shape[-1] : side.shape[-1] + packed.shape[-1]] = packed
        return held

    def _decode(self, held: Tensor, runs: list[_Run], out: Tensor) -> None:
        """Records [B, T, width] into out [B, T, D]."""
        behind = SIDE // 8 * len(runs)
        side = held[..., :behind].contiguous().view(torch.float16).unflatten(-1, (len(runs), 2))
        lanes = _unpacked(held[..., behind:])
        for i, run in enumerate(runs):
            own, lanes = lanes[..., : run.size * run.bits], lanes[..., run.size * run.bits :]
            places = torch.arange(run.bits, dtype=torch.uint8, device=held.device)
            codes = (own.unflatten(-1, (run.size, run.bits)) << places).sum(-1)
            scale, shift = side[..., i, :1], side[..., i, 1:]
            out[..., run.own] = dequantize(codes, scale, shift, torch.float32)

    def _groups(self, site: Site) -> Tensor:
        found: Tensor = site.tensors[f"{self.name()}.groups"]
        return found

    def _runs(self, site: Site) -> list[list[_Run]]:
        """The stored groups of each head, read off a tensor once."""
        groups = self._groups(site)
        if groups not in _read:
            _read[groups] = [_runs_of(row) for row in groups.tolist()]
        found: list[list[_Run]] = _read[groups]
        return found


def _measured(sample: Tensor, energies: Floats, size: int, bits: int) -> Floats:
    """The mean squared error [D - size + 1] of each group that may be, over tokens [n, D]."""
    every = max(1, sample.numel() * size // MEASURED)
    groups = sample[::every].unfold(-1, size, 1)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-30)
    left = ((groups - low) / step).round() * step + low - groups
    # what 16 bits leave of the shift tells single components apart
    found: Floats = (left.square() + low.square() * ROUNDING).sum(-1).mean(0).numpy()
    return found


def _runs_of(row: list[int]) -> list[_Run]:
    starts = [i for i, own in enumerate(row) if own & FIRST]
    found = []
    for start in starts:
        end = start + 1
        while end < len(row) and 0 < row[end] < FIRST:
            end += 1
        found.append(_Run(start, end - start, row[start] - FIRST))
    return found


def _packed(lanes: Tensor) -> Tensor:
    """Bits [..., n] as bytes [..., n / 8], the last one filled up with zeros."""
    lanes = torch.nn.functional.pad(lanes, (0, -lanes.shape[-1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=lanes.device)
    packed: Tensor = (lanes.unflatten(-1, (-1, 8)) << places).sum(-1).to(torch.uint8)
    return packed


def _unpacked(held: Tensor) -> Tensor:
    """Bytes [..., n] as bits [..., 8 * n]."""
    places = torch.arange(8, dtype=torch.uint8, device=held.device)
    return (held.unsqueeze(-1) >> places & 1).flatten(-2)
