"""Turns heads into their Karhunen-Loeve basis, weighted by what reads them: uncorrelated channels
that fall steeply."""

from typing import Literal

import torch
from torch import Tensor

from kvtune import spectral
from kvtune.parts import Fold, Seen
from kvtune.turns import Turn


class Klt(Turn):
    """y = (x - mean) A with A = W^1/2 U.

    W is how strongly each direction is read (queries
    for keys, the likelihood's pull for values) and U the eigenvectors of W^1/2 C W^1/2.

    Errors of y then cost alike in all channels, and the channels are uncorrelated, the strongest
    first: the transform that scalar codes of mixed bits gain most by (Goyal, Theoretical
    foundations of transform coding, 2001). KVTC (arXiv:2511.01815) takes W = 1, `weight =
    "plain"`; queries as weights as in OSCAR (2026). Exact but for rounding: alone it saves nothing.
    """

    weight: Literal["reads", "plain"] = "reads"

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """Mean, basis and its inverse, transposed as queries are turned by it, in 16 bits."""
        half = torch.empty(heads, head_dim, head_dim, dtype=torch.float16, device="meta")
        return {"basis": half, "inverse": half.clone(), "mean": half[:, 0].clone()}

    def fit(self, seen: Seen) -> dict[str, Tensor]:
        """Finds mean and basis."""
        root = (
            spectral.root(seen.weight) if self.weight == "reads" else torch.eye(seen.mean.shape[1])
        )
        root = root.double().expand_as(seen.covariance)
        _, vectors = torch.linalg.eigh(root @ seen.covariance @ root)
        basis = root @ vectors.flip(-1)
        basis = (basis / basis.abs().amax((1, 2), keepdim=True)).half()
        inverse = torch.linalg.inv(basis.double()).transpose(-1, -2).half()
        return {"basis": basis, "inverse": inverse, "mean": seen.mean.half()}

    def made(self, tensors: dict[str, Tensor]) -> Fold:
        """As it is stored."""
        back = tensors["inverse"].transpose(-1, -2)
        return Fold(tensors["mean"], tensors["basis"], back)
