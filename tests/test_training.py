"""Laws of training: what gradient descent makes of a fit, for one layer of a tiny model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tiny_fits import seen_by
from torch import Tensor

from kvtune import parts
from kvtune.calibrate import find_ropes
from kvtune.chains import Chain
from kvtune.fit import Fitter
from kvtune.lessons import Lesson, lessons
from kvtune.models import facts
from kvtune.parts import Code, Codec, Site
from kvtune.policy import Policy
from kvtune.training import Course, cost, judged, names, rebuilt, train

CODES = {
    "none": ((), ()),
    "affine": (
        ({"use": "affine", "bits": 4, "group": 64, "axis": "channel"},),
        ({"use": "affine", "bits": 2, "group": "head", "axis": "token"},),
    ),
    "turned": (({"use": "hadamard"}, {"use": "normal", "bits": 2}),) * 2,
}


class Gain(Codec):
    """A newcomer: every channel times a trained number on the way out."""

    fits = True
    trains = ("gain",)

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """A number for each channel."""
        return {"gain": torch.empty(heads, head_dim, dtype=torch.float16, device="meta")}

    def encode(self, x: Tensor, site: Site) -> Code:
        """As it is."""
        return Code(x.clone())

    def decode(self, code: Code, site: Site) -> Tensor:
        """Times the gain."""
        gain = site.tensors[f"{self.name()}.gain"].to(code.body)
        return (code.body * gain[:, None]).to(site.dtype)


SHORT = Course(steps=30, queries=16)
CONTEXT, AHEAD = 160, 32


def policy(codes: str, shrink: float = 0.8, recent: int = 7) -> Policy:
    keys, values = CODES[codes]
    cskv = {"use": "cskv", "shrink": shrink}
    tables = (({"use": "derope"}, cskv, *keys), (cskv, *values))
    chains = [Chain(tuple(parts.parse(t) for t in one)) for one in tables]  # type: ignore[misc]
    return Policy(sinks=3, recent=recent, keys=chains[0], values=chains[1])


@cache
def lesson_of(model: Any, layer: int = 1) -> Lesson:
    own = model.config._attn_implementation
    tokens = torch.randint(
        3, 61, (3, CONTEXT + AHEAD + 1), generator=torch.Generator().manual_seed(5)
    )
    found = lessons(model, tokens, CONTEXT, 0, {layer})[layer]
    model.set_attn_implementation(own)
    return Lesson(*(x.float() if isinstance(x, Tensor) else x for x in vars(found).values()))


def start_of(model: Any, own: Policy, layer: int = 1) -> dict[str, Tensor]:
    return Fitter(seen_by(model)).layer(layer, own)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_training_costs_less_than_the_fit(kind: str, codes: str, model_of: Any) -> None:
    model, own = tiny(kind, model_of), policy(codes)
    start, lesson = start_of(model, own), lesson_of(model)
    rope = find_ropes(model)[1]
    done = train(1, own, start, lesson, rope, SHORT)
    assert done.after < done.before
    assert done.after == judged(1, own, done.tensors, lesson, rope)
    for name, x in done.tensors.items():
        assert (x.shape, x.dtype) == (start[name].shape, start[name].dtype)
        assert torch.equal(x, start[name]) == (name not in set(names(1, own)))


@cache
def tiny(kind: str, model_of: Any) -> Any:
    return model_of(kind, head_dim=64)


def test_training_through_codes_costs_no_more_than_codes_put_behind_afterwards(
    model_of: Any,
) -> None:
    """Quantisation-aware training against quantisation after training, both by the loss with
    codes."""
    model = tiny("llama", model_of)
    lesson, rope = lesson_of(model), find_ropes(model)[1]
    plain, coded = policy("none"), policy("affine")
    start = start_of(model, coded)
    after = train(1, plain, start_of(model, plain), lesson, rope, SHORT)
    aware = train(1, coded, start, lesson, rope, SHORT)
    assert aware.after <= judged(1, coded, after.tensors, lesson, rope)


def test_what_is_not_better_is_not_taken(model_of: Any) -> None:
    model, own = tiny("llama", model_of), policy("none")
    start, lesson = start_of(model, own), lesson_of(model)
    done = train(1, own, start, lesson, find_ropes(model)[1], Course(steps=12, rate=30.0))
    assert done.after == done.before
    assert all(torch.equal(x, start[name]) for name, x in done.tensors.items())


@pytest.mark.parametrize("codes", CODES)
def test_what_training_reads_is_what_the_runtime_reads(codes: str, model_of: Any) -> None:
    model, own = tiny("llama", model_of), policy(codes)
    rope = find_ropes(model)[1]
    x = lesson_of(model).keys[:, :, :128]
    stem = "layer.1.keys."
    tensors = {k.removeprefix(stem): t for k, t in start_of(model, own).items() if stem in k}
    site = Site(1, "keys", torch.arange(128), torch.float32, rope, tensors)
    torch.testing.assert_close(
        rebuilt(own.keys, x, site), own.keys.decode(own.keys.encode(x, site), site)
    )


def test_the_loss_of_a_lesson_is_what_the_runtime_answers(model_of: Any) -> None:
    """A run of queries costs what a filled layer's answers do, token by token."""
    from kvtune.fitted import sites
    from kvtune.heads import make_layer

    model, own = tiny("llama", model_of), policy("affine")
    lesson, makers = lesson_of(model), sites(1, find_ropes(model)[1], start_of(model, own))
    layer = make_layer(own, makers)
    context = slice(0, CONTEXT)
    layer.fill(lesson.keys[:1, :, context], lesson.values[:1, :, context], None)
    outs = []
    for t in range(CONTEXT, CONTEXT + AHEAD):
        layer.update(lesson.keys[:1, :, t : t + 1], lesson.values[:1, :, t : t + 1])
        query = lesson.query[:1, :, t - CONTEXT : t - CONTEXT + 1]
        outs.append(layer.attend(query, None, lesson.scale, lesson.softcap))
    change = (torch.cat(outs, 2) - lesson.out[:1]).transpose(1, 2).flatten(2)
    expected = (change @ lesson.root).square().sum(-1).mean() / 2
    torch.testing.assert_close(cost(own, makers, lesson, 0, 0, AHEAD), expected)


def test_layers_know_only_their_seed(model_of: Any) -> None:
    """So a resumed training equals an uninterrupted one, layer by layer."""
    model, own = tiny("llama", model_of), policy("affine")
    start, lesson = start_of(model, own), lesson_of(model)
    again = [
        train(1, own, start, lesson, find_ropes(model)[1], Course(5, queries=16, seed=seed)).tensors
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(again[0][name], x) for name, x in again[1].items())
    assert any(not torch.equal(again[0][name], x) for name, x in again[2].items())


def test_all_layers_of_a_lesson_have_the_models_shapes(model_of: Any) -> None:
    model = tiny("qwen2", model_of)
    lesson, known = lesson_of(model), facts(model.config).layers[1]
    assert lesson.keys.shape == (3, known.kv_heads, CONTEXT + AHEAD, 64)
    assert lesson.query.shape == lesson.out.shape == (3, 4, AHEAD, 64)
    assert lesson.root.shape == (4 * 64, 4 * 64)


def test_a_newcomer_that_trains_is_its_tensors_names_and_two_methods(model_of: Any) -> None:
    """Nothing else of it is asked for: its numbers find their way back to one."""
    model, own = tiny("llama", model_of), Policy(sinks=3, recent=7, values=Chain((Gain(),)))
    (name,) = names(1, own)
    start = {name: torch.full((2, 64), 0.7).half()}
    done = train(1, own, start, lesson_of(model), None, Course(60, rate=0.03, queries=16))
    assert done.after < 0.2 * done.before
    assert (done.tensors[name] > start[name]).float().mean() > 0.9
