"""A copy of a model whose keys carry large biases, as those of Qwen2.5 do, and which answers alike.

A bias is turned by RoPE with its key, except where the turn is slow: there it adds nearly the same
to the logits of all tokens, which softmax does not see. Such biases are what makes low-bit keys of
Qwen2.5 collapse (transformers issue 35185; KVTuner, arXiv:2502.04420), and no small model without
a hub has them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvtune.errors import UnsupportedError
from kvtune.models import facts, ropes
from kvtune.placement import input_device

FACTOR = 30.0  # standard deviations of a head's keys
PAIRS = 2  # channel pairs of each head that carry a bias: the slowest


@torch.no_grad()
def biased(model: Any, tokens: Tensor, factor: float = FACTOR, pairs: int = PAIRS) -> Any:
    """Returns a copy with biases on the slowest channel pairs of every layer's keys.

    A pair's bias points to where its queries lie on average, so that what is left of the turn adds
    least: the logit of a query q with a bias b turned by a small angle a is q . b - a (q x b).

    Args:
        tokens: [N, T], a text that standard deviations and directions are measured on.
        factor: how large the bias of a pair is, in standard deviations of the head's keys.

    Raises:
        UnsupportedError: no `k_proj` and `q_proj` of its own, norms of keys, or a rotary embedding
        that is not laid out in halves.
    """
    places = slowest(model, pairs)
    made = copy.deepcopy(model)
    known = facts(model.config)
    seen = _projected(model, tokens)
    for name, module in made.named_modules():
        if name in seen:
            heads = known.layers[module.layer_idx].kv_heads
            queries, keys = (x.flatten(0, 1).unflatten(-1, (heads, -1)) for x in seen[name])
            bias = _bias(queries, keys, places, factor).flatten().to(module.k_proj.weight)
            own = module.k_proj.bias
            module.k_proj.bias = nn.Parameter(bias if own is None else own + bias, False)
    return made


def slowest(model: Any, pairs: int = PAIRS) -> Tensor:
    """The channels [pairs, 2] of a head that RoPE turns together and least.

    Raises:
        UnsupportedError: see `biased`.
    """
    name = type(model).__name__
    rope = next(iter(ropes(model).values()), None)
    frequencies = getattr(rope.module, "inv_freq", None) if rope else None
    if rope is None or rope.interleaved or not isinstance(frequencies, Tensor):
        raise UnsupportedError(
            f"{name} does not turn its keys in halves by one table, so biases cannot be added.",
            "Leave out --biased.",
        )
    first = frequencies.argsort()[:pairs].cpu()
    return torch.stack([first, first + len(frequencies)], 1)


def _bias(queries: Tensor, keys: Tensor, places: Tensor, factor: float) -> Tensor:
    """Biases [H, D] for queries [n, H, G * D] and keys [n, H, D]."""
    count, heads, dim = keys.shape
    asked = queries.reshape(count, heads, -1, dim).transpose(0, 1).flatten(1, 2)
    spread = (keys - keys.mean(0)).square().mean((0, 2)).sqrt()
    found = torch.zeros(heads, dim, dtype=keys.dtype, device=keys.device)
    for pair in places.tolist():
        x = asked[..., pair].double()
        moment = x.transpose(1, 2) @ x
        direction = torch.linalg.eigh(moment).eigenvectors[..., -1]
        found[:, pair] = (factor * spread[:, None] * direction).to(found.dtype)
    return found


def _projected(model: Any, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each attention module's projections make of tokens: queries and keys [N, T, *]."""
    name = type(model).__name__
    modules = {n: m for n, m in model.named_modules() if hasattr(m, "layer_idx")}
    modules = {n: m for n, m in modules.items() if hasattr(m, "k_proj") and hasattr(m, "q_proj")}
    if not modules or any(hasattr(module, "k_norm") for module in modules.values()):
        raise UnsupportedError(
            f"{name} has no key projection whose bias would reach its cache.", "Leave out --biased."
        )
    found: dict[tuple[str, str], Tensor] = {}

    def keeper(place: tuple[str, str]) -> Callable[[Any, Any, Tensor], None]:
        def keep(module: Any, given: Any, made: Tensor) -> None:
            found[place] = made.detach()

        return keep

    hooks = [
        getattr(module, side).register_forward_hook(keeper((place, side)))
        for place, module in modules.items()
        for side in ("q_proj", "k_proj")
    ]
    try:
        model(tokens.to(input_device(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return {place: (found[place, "q_proj"], found[place, "k_proj"]) for place in modules}
