"""Turns heads into the eigenvectors of what reads them, then by a Hadamard matrix (OSCAR, 2026)."""

import torch
from torch import Tensor

from kvtune.orthogonal import core, matrix
from kvtune.parts import Fold, Seen
from kvtune.turns import Turn


class Rotate(Turn):
    """x U H with the eigenvectors U of the second moment of what reads this side.

    That is of queries for keys, of attention's output for values. The Hadamard matrix then spreads
    what is read most over all channels, for quantisers whose groups lie along those of a token.
    """

    def check(self, head_dim: int, side: str) -> None:
        """There is a Hadamard matrix of the head's size."""
        if core(head_dim) is None:
            raise ValueError(
                f"rotate ends in a Hadamard matrix, which head_dim {head_dim} has none of"
            )

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """The basis of each head in 16 bits."""
        shape = (heads, head_dim, head_dim)
        return {"basis": torch.empty(shape, dtype=torch.float16, device="meta")}

    def fit(self, seen: Seen) -> dict[str, Tensor]:
        """Finds the basis."""
        _, vectors = torch.linalg.eigh(seen.read)
        return {"basis": (vectors.flip(-1) @ matrix(vectors.shape[-1]).double()).half()}

    def made(self, tensors: dict[str, Tensor]) -> Fold:
        """The basis as it is stored, and its transpose: it is orthonormal to its last bit."""
        turn = tensors["basis"]
        return Fold(turn.new_zeros(turn.shape[:2]), turn, turn.transpose(-1, -2))
