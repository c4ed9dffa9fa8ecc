"""What an error of a key or a value costs in nats, from one backward pass over continuations."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.prices import Pull
from kvtune.rope import Rope

DRAWN = 64  # tokens drawn for each query, by what their errors cost


def weigh(
    pull: Pull, keys: Tensor, values: Tensor, rope: Rope | None, sinks: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns the weights W [H, D, D] of keys and of values of one layer.

    KL is about half the mean of (g . do)^2 (`prices.pulls`), and to first order an error e moves
    the output by a_t e_t, on values, and by a_t (v_t - o)(q . e_t) scale, on keys. Errors of tokens
    are taken to be independent, so KL is about 1/2 sum over tokens of e^T W e with

        values:  W = mean over tokens and queries of a_t^2 g g^T
        keys:    W = the same of a_t^2 (g . (v_t - o))^2 scale^2 r r^T, r = q turned back by t.

    Layers, heads, keys and values are thereby weighed in one currency.

    Args:
        keys: of the contexts, post-RoPE, [N, H, C, D], as values.
        sinks: first tokens, which are stored apart and do not count.
        seed: of the tokens that stand for all in the keys' sum.
    """
    generator = torch.Generator(keys.device).manual_seed(seed)
    heads, dim = keys.shape[1], keys.shape[3]
    found = torch.zeros(2, heads, dim, dim, device=keys.device)
    count = keys.shape[0] * pull.query.shape[2] * max(1, keys.shape[2] - sinks)
    for row in range(keys.shape[0]):
        query, gradient, out = (
            x[row].float().unflatten(0, (heads, -1)) for x in (pull.query, pull.gradient, pull.out)
        )
        squared = _attention(pull, query, keys[row], row).square()
        squared[..., :sinks] = 0
        found[1] += torch.einsum("hgm,hgmd,hgme->hde", squared.sum(-1), gradient, gradient)
        lever = torch.einsum("hgmd,htd->hgmt", gradient, values[row].float())
        lever = (lever - (gradient * out).sum(-1, keepdim=True)) * _scale(pull)
        cost = (squared * lever.square()).flatten(0, 2)
        found[0] += _drawn(query.flatten(0, 2), cost, heads, rope, generator)
    found /= count
    return found[0].cpu(), found[1].cpu()


def _scale(pull: Pull) -> float:
    return pull.scale if pull.scale is not None else float(pull.query.shape[-1] ** -0.5)


def _attention(pull: Pull, query: Tensor, keys: Tensor, row: int) -> Tensor:
    """Probabilities [H, G, M, C] of the context's tokens, under the continuation's own as well."""
    own = pull.keys[row]
    logits = torch.einsum("hgmd,htd->hgmt", query, torch.cat([keys, own], 1).float())
    logits *= _scale(pull)
    if pull.softcap:
        logits = pull.softcap * (logits / pull.softcap).tanh()
    count, context = own.shape[1], keys.shape[1]
    hidden = torch.ones(count, context + count, dtype=torch.bool, device=keys.device)
    logits = logits.masked_fill(hidden.triu(context + 1), float("-inf"))
    found: Tensor = logits.softmax(-1)[..., :context]
    return found


def _drawn(
    query: Tensor, cost: Tensor, heads: int, rope: Rope | None, generator: torch.Generator
) -> Tensor:
    """sum over t of cost_t r r^T, [H, D, D], r = query turned back by t: over tokens t that are
    drawn in proportion to their cost, as all of them would be too many."""
    total = cost.sum(-1, keepdim=True)
    places = torch.multinomial(cost + 1e-30, DRAWN, replacement=True, generator=generator)
    turned = query[:, None].expand(-1, DRAWN, -1)
    if rope is not None:
        turned = rope.unturn(turned.reshape(1, 1, -1, query.shape[-1]), places.flatten())[0, 0]
        turned = turned.view(*places.shape, -1)
    rows = (turned * (total / DRAWN).sqrt()[..., None]).unflatten(0, (heads, -1)).flatten(1, 2)
    found: Tensor = rows.mT @ rows
    return found
