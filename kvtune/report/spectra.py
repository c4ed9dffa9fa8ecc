"""Spectra: how much of a layer's keys, values and queries the strongest directions hold."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.profile import Profile

SHARES = (0.9, 0.95, 0.99)


def energies(profile: Profile) -> dict[str, Tensor]:
    """Cumulative energy [L, D] by side: entry d is the share of the second moment that the d + 1
    strongest directions of a head hold, a mean over heads."""
    found = {}
    for side in ("keys", "values", "queries"):
        moment = profile.tensors.get(f"moments.{side}")
        if moment is not None and moment.dim() == 4:
            found[side] = _cumulative(moment)
    return found


def _cumulative(moment: Tensor) -> Tensor:
    """[L, H, D, D] to [L, D]."""
    values = torch.linalg.eigvalsh(moment.double()).flip(-1).clamp_min(0)  # rounding dips below 0
    total = values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    shares: Tensor = values.cumsum(-1) / total
    return shares.mean(1).clamp_max(1.0)


def directions(energy: Tensor, share: float) -> list[int]:
    """How many directions of each layer hold a share of its energy [L, D]."""
    return [int((row < share - 1e-9).sum()) + 1 for row in energy]
