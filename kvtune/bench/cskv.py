"""CSKV: what its maps cost from the paper's starts, in closed form, and trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtune.bank import Sizes, build, text_tokens
from kvtune.bench.codecs import TEMPLATE
from kvtune.bench.compositions import SINKS
from kvtune.calibrate import Say, calibrate, find_ropes, quiet
from kvtune.chains import Chain
from kvtune.errors import UnsupportedError
from kvtune.fit import Fitter
from kvtune.lessons import Lesson, lessons
from kvtune.measure import Bench
from kvtune.methods.affine import Affine
from kvtune.methods.cskv import Cskv
from kvtune.methods.derope import Derope
from kvtune.placement import input_device
from kvtune.policy import Policy
from kvtune.space import SIDES
from kvtune.spectral import top
from kvtune.texts import Document
from kvtune.training import Course, Tensors, train

CALIBRATED = Sizes()  # what moments are taken of: as `kvtune calibrate` takes it
RECENT = 32  # the paper's window
SVD, ASVD = "weights, SVD", "weights, ASVD"
WHITENED = "weights, whitened SVD"
SQUARES = "least squared error, centred"
CLOSED = "closed form of kvtune fit"
TRAINED = "trained"
AWARE = "trained through the codes"
ALPHA = 0.5  # of ASVD: scales are mean magnitudes to this power


@dataclass(frozen=True)
class Row:
    """What some maps cost in 16 bits, and with 4-bit codes behind: KL in nats and flips; and the
    seconds that their training took."""

    maps: str
    kl: float
    flips: float
    coded_kl: float
    coded_flips: float
    seconds: float = 0.0


def plain(shrink: float) -> Policy:
    """All layers' policy with latents in 16 bits."""
    cskv = Cskv(shrink=shrink)
    return Policy(sinks=SINKS, recent=RECENT, keys=Chain((Derope(), cskv)), values=Chain((cskv,)))


def coded(shrink: float) -> Policy:
    """The same with the paper's 4 bits: keys per channel over 32 tokens, values per token."""
    own = plain(shrink)
    keys = Chain((*own.keys.codecs, Affine(bits=4, group=32, axis="channel")))
    values = Chain((*own.values.codecs, Affine(bits=4, group="head", axis="token")))
    return own.model_copy(update={"keys": keys, "values": values})


def rows(
    model: Any,
    tokenizer: Any,
    texts: dict[str, list[Document]],
    sizes: Sizes,
    taught: Sizes,
    shrink: float,
    course: Course,
    say: Say = quiet,
) -> list[Row]:
    """Measures all maps on held-out text.

    Args:
        sizes: of the held-out text.
        taught: of the text that is trained on.

    Raises:
        MissingInputError: too little text.
        UsageError: a context beyond the model's positions.
        UnsupportedError: projections that maps cannot be made of.
    """
    tokens = text_tokens(texts["calibrate"], tokenizer, taught, "calibrate")
    fitter = _fitter(model, tokenizer, texts, course.seed, say)
    layers = build(model, tokens[:1, :3], 1).facts.compressible()
    starts = dict(_starts(model, tokens, fitter, layers, plain(shrink)))
    say("held-out text", 0, 1)
    held = text_tokens(texts["proof"], tokenizer, sizes, "proof")
    bank = build(model, held, sizes.context)
    say("held-out text", 1, 1)
    measure = _measurer(model, bank, layers)
    found = [measure(name, shrink, maps) for name, maps in starts.items()]
    say("dense pass", 0, 1)
    seen = lessons(model, tokens, taught.context, course.seed, layers)
    say("dense pass", 1, 1)
    for name, own in ((TRAINED, plain(shrink)), (AWARE, coded(shrink))):
        began = time.perf_counter()
        maps = _trained(model, own, starts[CLOSED], seen, course, name, say)
        found.append(measure(name, shrink, maps, time.perf_counter() - began))
    return found


def _fitter(
    model: Any, tokenizer: Any, texts: dict[str, list[Document]], seed: int, say: Say
) -> Fitter:
    documents = texts["calibrate"]
    return Fitter(
        calibrate(model, tokenizer, documents, TEMPLATE, sizes=CALIBRATED, seed=seed, say=say)
    )


def _measurer(model: Any, bank: Any, layers: tuple[int, ...]) -> Callable[..., Row]:
    ropes, count = find_ropes(model), len(bank.facts.layers)

    def measure(name: str, shrink: float, maps: dict[int, Tensors], seconds: float = 0.0) -> Row:
        bench = Bench(model, bank, ropes, lambda layer, policy: maps[layer])
        sixteen, four = (
            bench.measure(
                tuple(own if i in layers else Policy() for i in range(count)), memo=False
            ).means()
            for own in (plain(shrink), coded(shrink))
        )
        return Row(name, sixteen["kl"], sixteen["flips"], four["kl"], four["flips"], seconds)

    return measure


def _trained(
    model: Any,
    policy: Policy,
    start: dict[int, Tensors],
    seen: dict[int, Lesson],
    course: Course,
    stage: str,
    say: Say,
) -> dict[int, Tensors]:
    ropes, found = find_ropes(model), {}
    say(stage, 0, len(seen))
    for i, lesson in seen.items():
        found[i] = train(i, policy, start[i], lesson, ropes.get(i), course).tensors
        say(stage, len(found), len(seen))
    return found


def _starts(
    model: Any, tokens: Tensor, fitter: Fitter, layers: tuple[int, ...], policy: Policy
) -> Iterator[tuple[str, dict[int, Tensors]]]:
    """The maps of each start, by layer."""
    weights = projections(model, tokens[:, :-1])
    for name in (SVD, ASVD, WHITENED, SQUARES):
        yield name, {i: _maps(name, i, fitter, weights[i], policy) for i in layers}
    yield CLOSED, {i: fitter.layer(i, policy) for i in layers}


def _maps(
    name: str, layer: int, fitter: Fitter, weights: tuple[Tensor, ...], policy: Policy
) -> Tensors:
    """Of keys and values: an orthonormal basis down, and up by its transpose."""
    found: Tensors = {}
    for side, weight in zip(SIDES, weights[:2], strict=True):
        seen = fitter.seen(layer, side, pre_rope=True)
        heads, dim = seen.mean.shape
        joint = seen.grouped(heads)
        if name in (SVD, ASVD):
            scaled = weight * (weights[-1] ** ALPHA if name == ASVD else 1)
            second = scaled @ scaled.T
        else:
            mean = joint.mean * (name == WHITENED)
            second = joint.covariance[0] + mean.T @ mean
        cskv = getattr(policy, side).codecs[-1]
        basis = top(second, cskv.shape(heads, dim)[1]).half().unflatten(0, (heads, dim))
        stem = f"layer.{layer}.{side}.cskv."
        found[f"{stem}down"] = basis.contiguous()
        found[f"{stem}up"] = basis.transpose(1, 2).contiguous()
        found[f"{stem}bias"] = seen.mean.half() * (name == SQUARES)
    return found


def projections(model: Any, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Weights [H * D, E] of keys and of values, and mean magnitudes [E] of what they are given, of
    each layer, in float64 on the CPU; whitening a weight by its inputs is to take the moments of
    what it makes of them.

    Raises:
        UnsupportedError: no `k_proj` and `v_proj` without biases and norms, as in the paper.
    """
    modules = {m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx")}
    plainly = all(
        hasattr(m, "k_proj") and m.k_proj.bias is None and not hasattr(m, "k_norm")
        for m in modules.values()
    )
    if not modules or not plainly:
        raise UnsupportedError(
            f"{type(model).__name__} has no key projections without biases and norms, which the "
            "paper factors.",
            "Give another model: Llama, Mistral or demo.",
        )
    sums: dict[int, Tensor] = {}

    def keeper(layer: int) -> Callable[[Any, Any], None]:
        def keep(module: Any, given: tuple[Tensor, ...]) -> None:
            own = given[0].abs().double().sum((0, 1)).cpu()
            sums[layer] = sums[layer] + own if layer in sums else own

        return keep

    hooks = [m.k_proj.register_forward_pre_hook(keeper(i)) for i, m in modules.items()]
    try:
        with torch.no_grad():
            for row in tokens.to(input_device(model)).split(1):
                model(row, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        i: (
            m.k_proj.weight.detach().double().cpu(),
            m.v_proj.weight.detach().double().cpu(),
            sums[i] / tokens.numel() + 1e-6,
        )
        for i, m in modules.items()
    }
