"""The price table: what each setting of each layer costs in KL, from one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from kvtune_kernels import attend, implementation
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvtune.attention import Reading, causal
from kvtune.bank import Bank
from kvtune.layer import CompressedLayer
from kvtune.measure import Bench
from kvtune.recipe import Policy

Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True, eq=False)
class Pull:
    """What one layer's attention did on the continuation, and
    how the likelihood pulls at its output.

    query, out and gradient are [N, Hq, M, D]; keys and values [N, H, M, D] are the continuation's
    own.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    gradient: Tensor  # of log p(y), y sampled from the dense model at every position
    scale: float | None
    softcap: float | None

    def of(self, count: int) -> Pull:
        """The same of the first sequences."""
        tensors = {
            name: getattr(self, name)[:count]
            for name in ("query", "keys", "values", "out", "gradient")
        }
        return replace(self, **tensors)


class Probe(DynamicLayer):
    """A dense layer whose attention output can be differentiated."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Reading, Reading]:
        """Stores densely; keeps the new keys and values apart."""
        self.new = (key_states.detach(), value_states.detach())
        super().update(key_states, value_states)
        return Reading(self), Reading(self)

    def attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Answers query [B, Hq, n, D] exactly, plus a zero whose gradient is asked for later."""
        seen = causal(query.shape[2], self.keys.shape[2], query.device)
        out = attend(query, self.keys, self.values, seen, scale, softcap)
        self.seen_by = (query.detach(), out.detach(), scale, softcap)
        self.nudge = torch.zeros_like(out, requires_grad=True)
        return out + self.nudge


def pulls(model: Any, bank: Bank, seed: int) -> dict[int, Pull]:
    """Runs the continuation once forward and once backward per
    sequence, with y sampled from the dense model.

    g = grad of sum log p(y) at every attention output; then KL of a change d is about mean of (g .
    d)^2 / 2, since the KL's Hessian is the Fisher information E[g g^T].
    """
    generator = torch.Generator().manual_seed(seed)
    full = bank.facts.compressible()
    rows = [_pull_row(model, bank, row, generator) for row in range(bank.tokens.shape[0])]
    return {i: _joined([row[i] for row in rows]) for i in full}


def _pull_row(model: Any, bank: Bank, row: int, generator: torch.Generator) -> dict[int, Pull]:
    one = slice(row, row + 1)
    layers = [bank.dense_layer(i, one) for i in range(len(bank.facts.layers))]
    probes: dict[int, Probe] = {}
    for i in bank.facts.compressible():
        probes[i] = layers[i] = Probe()
        DynamicLayer.update(probes[i], bank.keys[i][one], bank.values[i][one])
    with torch.enable_grad():
        logp = (
            model(bank.inputs[one], past_key_values=Cache(layers=layers))
            .logits.float()
            .log_softmax(-1)
        )
        sampled = torch.multinomial(bank.logp[row].exp().cpu(), 1, generator=generator)[None].to(
            logp.device
        )
        total = logp.gather(-1, sampled).sum()
        gradients = torch.autograd.grad(total, [probe.nudge for probe in probes.values()])
    return {i: _pull(probe, g) for (i, probe), g in zip(probes.items(), gradients, strict=True)}


def _pull(probe: Probe, gradient: Tensor) -> Pull:
    query, out, scale, softcap = probe.seen_by
    return Pull(query, *probe.new, out, gradient, scale, softcap)


def _joined(rows: list[Pull]) -> Pull:
    columns = {
        name: torch.cat([getattr(row, name) for row in rows])
        for name in Pull.__annotations__
        if name not in ("scale", "softcap")
    }
    return Pull(**columns, scale=rows[0].scale, softcap=rows[0].softcap)


@torch.no_grad()
@implementation("reference")  # as a trial: a compiler would take longer than the answers
def price(bench: Bench, layer: int, policy: Policy, pull: Pull) -> Tensor:
    """Returns the KL in nats [H + 1] that a policy costs in one
    layer: of the whole layer, then of each kv head alone.

    The layer is filled and read by the runtime itself, so whatever changes attention's output is
    priced alike.
    """
    filled = bench.filled(layer, policy)
    return cost(pull, _answers(filled, pull))


def cost(pull: Pull, answers: Tensor) -> Tensor:
    """Returns the KL in nats [H + 1] of a layer that answers [N, Hq, M, D] otherwise than it did:
    of the whole layer, then of each kv head alone."""
    effect = ((answers - pull.out) * pull.gradient).sum(-1)  # [N, Hq, M]
    heads = effect.unflatten(1, (pull.keys.shape[1], -1)).sum(2)  # [N, H, M]
    whole = heads.sum(1, keepdim=True)
    return torch.cat([whole, heads], 1).double().square().mean((0, 2)) / 2


def _answers(layer: CompressedLayer, pull: Pull) -> Tensor:
    layer.update(pull.keys, pull.values)
    return layer.attend(pull.query, None, pull.scale, pull.softcap)


def table(
    bench: Bench, cells: Sequence[tuple[int, Policy]], found: dict[int, Pull], progress: Progress
) -> Tensor:
    """Prices all cells [cells, H + 1], on the CPU: layers may live on different devices."""
    rows = []
    for index, (layer, policy) in enumerate(cells):
        rows.append(price(bench, layer, policy, found[layer]).cpu())
        progress(index + 1, len(cells))
    return torch.stack(rows)


def exact(bench: Bench, cells: Sequence[tuple[int, Policy]], progress: Progress) -> Tensor:
    """Measures all cells [cells] in nats, one isolated forward each: the check of `table`."""
    kls = []
    dense = (Policy(),) * len(bench.bank.facts.layers)
    for index, (layer, policy) in enumerate(cells):
        quality = bench.measure((*dense[:layer], policy, *dense[layer + 1 :]), memo=False)
        kls.append(quality.kl.double().mean())
        progress(index + 1, len(cells))
    return torch.stack(kls)
