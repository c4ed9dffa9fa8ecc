"""Spectra: the strongest directions of many vectors, from their Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune import subspace

LEAST = 1e-4  # of the largest: directions that are read less are taken to be read this much


def gram(x: Tensor) -> Tensor:
    """The sums of x x^T [*, w, w] over the tokens of x [*, T, w], in float32 at least."""
    if x.is_cuda and x.dtype != torch.float64 and x.shape[-1] > subspace.SMALL:
        return subspace.quick_gram(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    found: Tensor = wide.transpose(-1, -2) @ wide
    return found


def top(gram: Tensor, rank: int) -> Tensor:
    """The `rank` strongest directions [*, w, rank] of a Gram matrix [*, w, w], strongest first:
    orthonormal columns, so that x @ top is what a truncated SVD of x keeps (Eckart and Young)."""
    if gram.is_meta:  # only shapes are asked for
        return gram.new_empty(*gram.shape[:-1], rank)
    if subspace.pays(gram, rank):
        flat = [subspace.strongest(one, rank) for one in gram.flatten(0, -3)]
        found = torch.stack(flat).to(gram.dtype).reshape(*gram.shape[:-1], rank)
    else:
        _, vectors = torch.linalg.eigh(gram)
        found = vectors.flip(-1)[..., :rank]
    # a direction's sign is anyone's: without a rule the last bit of a sum would move codes
    largest = found.gather(-2, found.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -found, found)


def span(gram: Tensor, rank: int) -> Tensor:
    """About the same subspace as `top`, in no order: much faster for many channels on a GPU."""
    if gram.is_meta or not subspace.pays(gram, rank):
        return top(gram, rank)
    flat = [subspace.spanning(one, rank) for one in gram.flatten(0, -3)]
    return torch.stack(flat).to(gram.dtype).reshape(*gram.shape[:-1], rank)


def root(weight: Tensor) -> Tensor:
    """The symmetric root [*, D, D] of a weight [*, D, D], of full rank."""
    values, vectors = torch.linalg.eigh(weight)
    values = values.clamp_min(values.amax(-1, keepdim=True).clamp_min(1e-30) * LEAST)
    found: Tensor = vectors @ (values.sqrt()[..., None] * vectors.transpose(-1, -2))
    return found
