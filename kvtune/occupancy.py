"""Occupancy: what budgets of tokens go by, as calibration finds it: who is looked at, and what
eviction costs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from kvtune_kernels import attend, implementation
from torch import Tensor
from torch.nn.functional import pad

from kvtune.attention import causal
from kvtune.bank import Bank
from kvtune.errors import UsageError
from kvtune.pooling import pooled
from kvtune.prices import Pull, cost
from kvtune.splits import gathered, parted
from kvtune.view import received

STEPS = 256  # of a curve over all tokens
SEQUENCES = 4  # curves and the order of layers are stable over texts (PrefixKV: one does nearly)
SHARES = (
    0.0,
    0.02,
    0.05,
    0.1,
    0.2,
    0.4,
    0.7,
)  # of the tokens that leave the window, which are priced
FEW = 32  # tokens of the budget whose errors are profiled (CompressKV)
SINKS, POOL = 4, 5  # tokens


class Crowd(NamedTuple):
    """One layer's contexts: what the last queries look at among the tokens that compete."""

    keys: Tensor  # [N, H, C, D]
    values: Tensor
    score: Tensor  # [N, H, T], pooled attention of the window's queries (SnapKV, arXiv:2404.14469)
    sinks: int

    def kept(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [N, H, n, D] of sinks, the `count` best of each head, and window."""
        places = pad(parted(self.score, count)[0] + self.sinks, (self.sinks, 0))
        places[..., : self.sinks] = torch.arange(self.sinks, device=places.device)
        last = torch.arange(self.sinks + self.score.shape[2], self.keys.shape[2])
        window = last.to(places.device).expand(*places.shape[:2], -1)
        places = torch.cat([places, window], 2)
        return gathered(self.keys, places), gathered(self.values, places)


@torch.no_grad()
@implementation("reference")
def occupancy(bank: Bank, found: dict[int, Pull]) -> dict[str, Tensor]:
    """What allocators read, layers in ascending order, from a bank that summed attention up.

    `tokens.curves` [L, 257]: the part of a layer's attention that the best of the tokens that
    compete got, by their part of these in even steps. Attention is that of `tokens.heads`, all
    heads together (PrefixKV, arXiv:2412.03409, counts all tokens, and then how much goes to sinks,
    which stay in any case, decides what a layer gets).
    `tokens.variances` [L]: of the attention that a kv head's tokens got, as a part of the largest
    among all heads of the model; the mean of the heads (D2O, arXiv:2406.13035, whose code scales
    the heads of each layer apart, which leaves nothing to compare where a layer has one or two).
    `tokens.heads` [L, H, 257]: pooled attention of the window's queries to the tokens that
    compete, from the best to the worst (Ada-KV, arXiv:2407.11550).
    `tokens.errors` [L]: ||O' - O||_F / ||O||_F of attention's output of each further token, when
    each head holds 32 tokens; the mean (CompressKV, arXiv:2508.02401, behind the projection).
    `tokens.prices` [L, S, 2]: shares of the tokens that leave the window, and the KL in nats of
    keeping just these (see `prices`).
    `tokens.prices_by_head` [L, H, S, 2]: the same of each kv head, scaled to add up to the layer's.

    Raises:
        UsageError: the bank did not sum attention up.
    """
    if found.keys() - bank.attention.keys():
        hint = 'Build the bank with needs = {"attention"}.'
        raise UsageError("Budgets go by attention, which this bank did not sum up.", hint)
    rows: dict[str, list[Tensor]] = {}
    for layer, pull in sorted(found.items()):
        few = pull.of(SEQUENCES)
        got = bank.attention[layer][:SEQUENCES].float()
        crowd = crowd_of(bank, layer, few)
        prices = priced(crowd, few)
        for name, x in {
            "curves": curve(crowd.score),
            "variances": got.var(2, unbiased=False).mean(0),
            "heads": levels(crowd.score),
            "errors": error(crowd, few),
            "prices": prices[0],
            "prices_by_head": prices[1:],
        }.items():
            rows.setdefault(f"tokens.{name}", []).append(x.cpu())
    made = {name: torch.stack(own) for name, own in rows.items()}
    spread = made["tokens.variances"]
    made["tokens.variances"] = (spread / spread.max().clamp_min(1e-30)).mean(1)
    return made


def crowd_of(bank: Bank, layer: int, pull: Pull) -> Crowd:
    """The contexts of the sequences of a pull, with their scores."""
    keys, values, queries = (
        x[layer][: len(pull.query)] for x in (bank.keys, bank.values, bank.queries)
    )
    context = keys.shape[2]
    sinks, window = min(SINKS, context // 4), max(1, min(queries.shape[2], context // 4))
    got = received(queries[:, :, -window:], keys, pull.scale, pull.softcap)
    looks = window * queries.shape[1] // keys.shape[1]
    score = pooled(got[:, :, sinks : context - window] / looks, POOL, "mean")
    return Crowd(keys, values, score, sinks)


def curve(got: Tensor) -> Tensor:
    """The part of attention [N, H, T], summed over heads, that the best tokens cover: [257]."""
    mass = got.sum(1).double().sort(-1, descending=True).values
    covered = pad((mass / mass.sum(-1, keepdim=True)).cumsum(-1), (1, 0)).clamp(max=1)
    covered[:, -1] = 1
    return sampled(covered).mean(0)


def levels(score: Tensor) -> Tensor:
    """Scores [N, H, T] from the best to the worst, the mean of the sequences: [H, 257]."""
    return sampled(score.double().sort(-1, descending=True).values).mean(0)


def sampled(x: Tensor) -> Tensor:
    """A row [..., n] of points in even steps, at 257 of them [..., 257], straight in between."""
    at = torch.linspace(0, x.shape[-1] - 1, STEPS + 1, dtype=x.dtype, device=x.device)
    left = at.long().clamp(max=max(0, x.shape[-1] - 2))
    right = (left + 1).clamp(max=x.shape[-1] - 1)
    return torch.lerp(x[..., left], x[..., right], at - left)


def error(crowd: Crowd, pull: Pull) -> Tensor:
    """The mean error of attention's output when each head holds 32 tokens."""
    exact = crowd.keys.shape[2] - crowd.score.shape[2]
    answer = answered(crowd, pull, max(0, min(FEW - exact, crowd.score.shape[2])))
    norms = [x.double().square().sum((1, 3)).sqrt() for x in (answer - pull.out, pull.out)]
    return (norms[0] / (norms[1] + 1e-6)).mean()


def priced(crowd: Crowd, pull: Pull) -> Tensor:
    """Shares and the KL in nats of keeping just these, [1 + H, S, 2]: of a layer as a whole, and of
    each kv head in proportion to what it costs alone."""
    compete = crowd.score.shape[2]
    costs = [cost(pull, answered(crowd, pull, round(share * compete))).cpu() for share in SHARES]
    prices = torch.stack(costs, 1)
    whole, heads = prices[:1], prices[1:]
    heads = heads * (whole / heads.sum(0, keepdim=True).clamp_min(1e-30))
    shares = torch.tensor(SHARES, dtype=prices.dtype).expand(len(prices), -1)
    return torch.stack([shares, torch.cat([whole, heads])], -1)


def answered(crowd: Crowd, pull: Pull, count: int) -> Tensor:
    """What the further tokens' queries read, [N, Hq, M, D], of `count` tokens that compete, what
    is exact, and one another: eviction leaves what it keeps as it is."""
    keys, values = (
        torch.cat(pair, 2) for pair in zip(crowd.kept(count), (pull.keys, pull.values), strict=True)
    )
    seen = causal(pull.query.shape[2], keys.shape[2], keys.device)
    return attend(pull.query, keys, values, seen, pull.scale, pull.softcap)
