"""Two-bit planes, as many for each channel as reverse water-filling gives: 0, 2, 4, 6 or 8 bits."""

import heapq
from typing import Annotated

import torch
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.parts import Seen
from kvtune.planes import DIGITS, PlaneQuantizer

# the mean squared error of a channel with so many planes, in parts of its variance: of the best
# even steps for a normal distribution (Max 1960), to which groups of tokens are close
LEFT = (1.0, 0.1188, 0.01154, 0.00104, 0.000088)


class Waterfill(PlaneQuantizer):
    """Channels get `bits` each on average, more where their errors would weigh more.

    What a channel weighs is its variance times how strongly queries read it, so this pays most
    behind `klt`, whose channels are uncorrelated and fall steeply. Behind no centring codec a
    channel that gets no bits loses its mean as well, which is counted against it. Rates for the
    channels of a Gaussian source: Cover and Thomas, section 10.3.3.
    """

    bits: Annotated[float, OneOf((1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0))] = 2.0
    group: Annotated[int, OneOf((64, 128))] = 128

    @property
    def payload_bits(self) -> float:
        """The mean code bits."""
        return float(self.bits)

    @property
    def tokens(self) -> int:
        """The group."""
        return self.group

    def planes_of(self, head_dim: int) -> int:
        """Half the bits of a token."""
        return int(self.bits * head_dim) // DIGITS

    def counts(self, seen: Seen) -> Tensor:
        """Gives plane after plane to the channel that gains most by it."""
        power = torch.diagonal(seen.covariance, dim1=1, dim2=2) + seen.mean.square()
        weight = torch.diagonal(seen.weight, dim1=1, dim2=2)
        rows = [self._allotted(row) for row in (power * weight).tolist()]
        return torch.tensor(rows)

    def _allotted(self, energies: list[float]) -> list[int]:
        found = [0] * len(energies)
        heap = [(-energy * (LEFT[0] - LEFT[1]), i) for i, energy in enumerate(energies)]
        heapq.heapify(heap)
        for _ in range(self.planes_of(len(energies))):
            _, i = heapq.heappop(heap)
            found[i] += 1
            if found[i] + 1 < len(LEFT):
                gain = energies[i] * (LEFT[found[i]] - LEFT[found[i] + 1])
                heapq.heappush(heap, (-gain, i))
        return found
