"""KVTuner's four errors (arXiv:2502.04420) of each layer and pair of settings, layers isolated."""

from __future__ import annotations

import torch
from kvtune_kernels import implementation
from torch import Tensor

from kvtune.measure import Bench
from kvtune.moments import probabilities
from kvtune.space import Opened

SEQUENCES = 2  # the ranking of layers is stable over prompts, so two sequences do


@torch.no_grad()
@implementation("reference")
def distortions(bench: Bench, layer: int, choices: Opened) -> Tensor:
    """Returns [key settings, value settings, 4]: e_k, e_v, e_a, e_o of what the next query reads.

    e_k, e_v and e_o are ||x - x'||_1 / ||x||_1 over keys, values and attention output; e_a is the
    mean absolute error of attention probabilities. The paper leaves the norms open. Queries are the
    last of each context.
    """
    bank = bench.bank
    rows = slice(0, SEQUENCES)
    query, keys, values = (x[layer][rows] for x in (bank.queries, bank.keys, bank.values))
    attention = probabilities(query, keys)
    out = _read(attention, values)
    stored_keys = [
        _stored(bench, layer, choices, "keys", index) for index in range(len(choices.keys))
    ]
    stored_values = [
        _stored(bench, layer, choices, "values", index) for index in range(len(choices.values))
    ]
    table = torch.zeros(len(stored_keys), len(stored_values), 4)
    table[:, :, 1] = torch.tensor([float(_relative(values, own)) for own in stored_values])
    for i, other_keys in enumerate(stored_keys):
        other = probabilities(query, other_keys)
        table[i, :, 0] = _relative(keys, other_keys)
        table[i, :, 2] = (attention - other).abs().mean()
        for j, other_values in enumerate(stored_values):
            table[i, j, 3] = _relative(out, _read(other, other_values))
    return table


def _stored(bench: Bench, layer: int, choices: Opened, side: str, index: int) -> Tensor:
    policy = (
        choices.cell("keys", choices.keys[index])
        if side == "keys"
        else choices.cell("values", choices.values[index])
    )
    rows = bench.filled(layer, policy).groups[0].rows
    return rows.read(bench.bank.keys[layer].dtype)[0 if side == "keys" else 1][:SEQUENCES]


def _read(attention: Tensor, values: Tensor) -> Tensor:
    grouped = attention.unflatten(1, (values.shape[1], -1)).to(values.dtype)
    return torch.einsum("nhgwt,nhtd->nhgwd", grouped, values)


def _relative(x: Tensor, other: Tensor) -> Tensor:
    return (x - other).abs().sum() / x.abs().sum()
