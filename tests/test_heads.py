"""Laws of kvtune/heads.py: a layer of groups of heads is the heads, and refuses as a layer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvtune_kernels import implementation
from torch import Tensor

from kvtune.cache import load, sites
from kvtune.errors import UnsupportedError
from kvtune.fused import FusedRows
from kvtune.heads import HeadedLayer, make_layer, picked
from kvtune.layer import CompressedLayer
from kvtune.models import facts, ropes
from kvtune.policy import HeadEntry, HeadGroup, Policy
from kvtune.rows import Rows

KV_HEADS, SHARE, DIM = 4, 3, 16
AFFINE = 'use = "affine", bits = {}, group = "head"'
EIGHT = {"use": "affine", "bits": 8, "group": "head"}
STEPS = (70, 1, 1, 60, 1, 7)


@pytest.fixture
def feed(llama: Any) -> Callable[..., Tensor]:
    """Lets random tokens pass through a layer; returns all answers [B, Hq, T, D]."""

    def run(layer: Any, heads: tuple[int, ...] = tuple(range(KV_HEADS)), first: int = 0) -> Tensor:
        generator, answers = torch.Generator().manual_seed(first), []
        for count in STEPS:
            draws = [
                torch.randn(2, number, count, DIM, dtype=torch.float64, generator=generator)
                for number in (KV_HEADS, KV_HEADS, KV_HEADS * SHARE)
            ]
            keys, values = (picked(x, heads) for x in draws[:2])
            layer.update(keys, values)
            answers.append(layer.attend(picked(draws[2], heads, SHARE), None, None, None))
        return torch.cat(answers, 2)

    return run


@pytest.fixture
def policy(recipe_of: Any, llama: Any) -> Policy:
    """Two policies of the list on the heads of one layer, in turn."""
    known = facts(llama.config)
    one, two = (recipe_of(name).policies(known)[0] for name in ("k4v2-windowed", "derope-k4"))
    return Policy.by_head(3, 7, [(own.keys, own.values) for own in (one, two, two, one)])


@pytest.fixture
def make(model_of: Any) -> Callable[[Policy], CompressedLayer]:
    """An empty layer under a policy."""
    rope = ropes(model_of("llama", head_dim=DIM, num_hidden_layers=1))[0]
    return lambda policy: make_layer(policy, sites(0, rope, {}))


def test_each_head_is_answered_as_it_would_be_alone(
    policy: Policy, make: Callable[[Policy], Any], feed: Any
) -> None:
    together = feed(make(policy))
    for head, (keys, values) in enumerate(policy.pairs):
        alone = make(Policy(sinks=3, recent=7, keys=keys, values=values))
        found = picked(together, (head,), SHARE)
        torch.testing.assert_close(found, feed(alone, (head,)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "groups", [((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0, 2), (1, 3)), ((3,), (0, 1, 2))]
)
def test_heads_of_the_same_policy_are_the_plain_layer_bit_for_bit(
    groups: tuple[tuple[int, ...], ...], policy: Policy, make: Callable[[Policy], Any], feed: Any
) -> None:
    keys, values = policy.pairs[0]
    plain = Policy(sinks=3, recent=7, keys=keys, values=values)
    apart = plain.model_copy(
        update={"heads": tuple(HeadGroup(own, keys, values) for own in groups)}
    )
    one, two = make(plain), make(apart)
    assert isinstance(two, HeadedLayer) and not isinstance(one, HeadedLayer)
    assert torch.equal(feed(two), feed(one))
    assert two.nbytes == one.nbytes
    assert two.side_bytes == one.side_bytes
    assert Policy.by_head(3, 7, [(keys, values)] * KV_HEADS) == plain


def test_a_refused_crop_takes_nothing_from_any_head(
    llama: Any, recipe_of: Any, draw: Any, play: Any
) -> None:
    """Heads page in blocks of their own, so their windows differ."""
    recipe, tokens = recipe_of("heads-apart"), draw(1, 150)
    cache, other = load(recipe, llama), load(recipe, llama)
    for each in (cache, other):
        play(llama, each, tokens[:, :140], [140])
    layer = cache.layers[0]
    assert isinstance(layer, HeadedLayer)
    with pytest.raises(UnsupportedError, match="crop"):
        cache.crop(-layer.exact - 1)
    with pytest.raises(UnsupportedError, match="negative"):
        cache.crop(5)
    rest = tokens[:, 140:]
    assert torch.equal(play(llama, cache, rest, [10]), play(llama, other, rest, [10]))


def test_a_crop_within_every_window_is_forgotten(
    llama: Any, recipe_of: Any, draw: Any, play: Any
) -> None:
    recipe, tokens = recipe_of("heads-apart"), draw(1, 160)
    cache, short = load(recipe, llama), load(recipe, llama)
    play(llama, cache, tokens[:, :145], [145])
    play(llama, short, tokens[:, :140], [140])
    cache.crop(-5)
    assert cache.get_seq_length() == 140
    found = play(llama, cache, tokens[:, 140:], [20])
    expected = play(llama, short, tokens[:, 140:], [20])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_a_fork_and_its_trunk_do_not_know_each_other(
    policy: Policy, make: Callable[[Policy], Any], feed: Any
) -> None:
    trunk, again = make(policy), make(policy)
    feed(trunk)
    feed(again)
    twin = trunk.fork()
    feed(twin, first=1)
    assert torch.equal(feed(trunk, first=2), feed(again, first=2))
    assert twin.seen == trunk.seen == 2 * sum(STEPS)
    trunk.reset()
    assert trunk.seen == trunk.nbytes == 0


@pytest.mark.filterwarnings("ignore:Kernels read one quantiser on each side")  # said on a GPU
def test_kernels_read_each_group_of_heads(written: Any, model_of: Any, draw: Any) -> None:
    """In bfloat16, with a padded row; a dense group is read in plain torch beside them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of("llama", num_key_value_heads=4, num_hidden_layers=1).to(device, torch.bfloat16)
    plain = written(keys=AFFINE.format(4), values=AFFINE.format(2), sinks=3, recent=7)
    named = tuple(
        HeadEntry.model_validate({"span": span, "kept": kept})
        for span, kept in (("1", {"keys": [EIGHT], "values": [EIGHT]}), ("2", {}))
    )
    entry = plain.layers[0].model_copy(update={"heads": named})
    recipe = plain.model_copy(update={"layers": (entry,)})
    tokens, mask = draw(2, 90).to(device), torch.ones(2, 90, dtype=torch.long, device=device)
    mask[1, :10] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    found = {}
    for name in ("reference", "triton"):
        with implementation(name), torch.no_grad():
            cache, out = load(recipe, model), []
            for start, end in ((0, 88), (88, 89), (89, 90)):
                given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
                inputs = tokens[:, start:end]
                out.append(model(inputs, past_key_values=cache, **given).logits)
            found[name] = torch.cat(out, 1).float()[mask.bool()]
    kinds = [[type(group.rows) for group in part.groups] for _, part in cache.layers[0].parts]
    assert [heads for heads, _ in cache.layers[0].parts] == [(0, 3), (1,), (2,)]
    assert kinds == [[FusedRows], [FusedRows], [Rows, Rows]]
    error = (found["triton"] - found["reference"]).norm() / found["reference"].norm()
    assert error <= 0.03
