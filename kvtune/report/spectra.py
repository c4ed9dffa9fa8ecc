"""Spectra: how much of a layer's keys, values and queries the strongest directions hold."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.profile import Profile

SHARES = (0.9, 0.95, 0.99)


# what is shown, and the moments [L, H, D, D] or [L, H * D, H * D] that it is of
MOMENTS = {
    "keys": "moments.keys",
    "keys after RoPE": "cached.moments.keys",
    "values": "moments.values",
    "queries": "moments.queries",
    "keys, all heads": "joint.keys",
    "values, all heads": "joint.values",
}
TURNED, TURNED_SPECTRA = "keys after RoPE, all heads", "cached.spectra.keys"


def energies(profile: Profile) -> dict[str, Tensor]:
    """Cumulative energy [L, D] by side: entry d is the share of the second moment that the d + 1
    strongest directions hold; of a head, a mean over heads, or of all kv heads together."""
    found = {}
    for side, name in MOMENTS.items():
        moment = profile.tensors.get(name)
        if moment is not None and moment.dim() in (3, 4):
            every = moment if moment.dim() == 4 else moment[:, None]
            # rounding dips below 0
            values = torch.linalg.eigvalsh(every.double()).flip(-1).clamp_min(0)
            found[side] = _cumulative(values)
    if (turned := profile.tensors.get(TURNED_SPECTRA)) is not None:
        found[TURNED] = _cumulative(turned.double()[:, None])
    return found


def _cumulative(values: Tensor) -> Tensor:
    """Eigenvalues [L, H, D] to shares [L, D]."""
    total = values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    shares: Tensor = values.cumsum(-1) / total
    return shares.mean(1).clamp_max(1.0)


def told(profile: Profile) -> dict[str, str]:
    """How many directions hold 90, 95 and 99 % of the energy, means over layers, by side."""
    found = {}
    for side, energy in energies(profile).items():
        ranks = [directions(energy, share) for share in SHARES]
        means = " / ".join(f"{sum(rank) / len(rank):.0f}" for rank in ranks)
        found[side] = f"{means} of {energy.shape[1]}"
    return found


def directions(energy: Tensor, share: float) -> list[int]:
    """How many directions of each layer hold a share of its energy [L, D]."""
    return [int((row < share - 1e-9).sum()) + 1 for row in energy]
