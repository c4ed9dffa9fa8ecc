"""Measuring: a recipe's divergence from the dense model,
from the bank, through the runtime that ships."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers.cache_utils import Cache

from kvtune.bank import Bank
from kvtune.cache import sites
from kvtune.layer import CompressedLayer
from kvtune.recipe import Policy
from kvtune.rope import Rope

MEMO_BYTES = 400 << 20


@dataclass(frozen=True, eq=False)
class Quality:
    """How far a compressed model is from the dense one, per position [N, M]."""

    kl: Tensor  # KL(dense || compressed), nats
    flips: Tensor  # 1 where the argmax changed
    dnll: Tensor  # nats more for the true next token

    def means(self) -> dict[str, float]:
        """Means over all positions."""
        return {
            name: float(getattr(self, name).double().mean()) for name in ("kl", "flips", "dnll")
        }


def compare(dense: Tensor, logits: Tensor, targets: Tensor) -> Quality:
    """Compares dense log-probabilities [N, M, V] with logits
    [N, M, V]; one sequence at a time bounds memory."""
    rows = [_compare_row(*row) for row in zip(dense, logits, targets, strict=True)]
    return Quality(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _compare_row(dense: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp = logits.float().log_softmax(-1)
    kl = kl_div(logp, dense, reduction="none", log_target=True).sum(-1)
    flips = (dense.argmax(-1) != logits.argmax(-1)).float()
    dnll = (dense - logp).gather(-1, targets[:, None])[:, 0]
    return kl.cpu(), flips.cpu(), dnll.cpu()


class Bench:
    """A model and its bank, on which policies are measured;
    filled layers are memoised by their policy."""

    def __init__(self, model: Any, bank: Bank, ropes: dict[int, Rope] | None = None) -> None:
        self.model, self.bank, self._ropes = model, bank, ropes or {}
        self._memo: OrderedDict[tuple[int, Policy], CompressedLayer] = OrderedDict()
        self._held = 0

    @torch.no_grad()
    def measure(self, policies: tuple[Policy, ...], memo: bool = True) -> Quality:
        """Runs the continuation teacher-forced in one forward on
        contexts stored under the policies.

        Without `memo` nothing is kept for a later call: right for policies that come only once.
        """
        layers = [self._layer(index, policy, memo) for index, policy in enumerate(policies)]
        logits = self.model(self.bank.inputs, past_key_values=Cache(layers=layers)).logits
        return compare(self.bank.logp, logits, self.bank.targets)

    def filled(self, layer: int, policy: Policy) -> CompressedLayer:
        """A layer that holds the bank's contexts under a policy."""
        made = CompressedLayer(policy, sites(layer, self._ropes.get(layer), {}))
        made.fill(self.bank.keys[layer], self.bank.values[layer])
        return made

    def _layer(self, index: int, policy: Policy, memo: bool) -> Any:
        if policy.is_dense:
            return self.bank.dense_layer(index)
        return self._memoised(index, policy).fork() if memo else self.filled(index, policy)

    def _memoised(self, layer: int, policy: Policy) -> CompressedLayer:
        key = (layer, policy)
        if key not in self._memo:
            self._memo[key] = self.filled(layer, policy)
            self._held += self._memo[key].nbytes
            while self._held > MEMO_BYTES and len(self._memo) > 1:
                self._held -= self._memo.popitem(last=False)[1].nbytes
        self._memo.move_to_end(key)
        return self._memo[key]
