"""Laws of attention to latents as they lie: kernels answer what decoded keys and values answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvtune_kernels import implementation, say_once
from torch import Tensor

from kvtune import lowrank, recipe
from kvtune.cache import load
from kvtune.layer import CompressedLayer
from kvtune.models import ropes
from kvtune.rope import Rope

DEROPE = '{ use = "derope" }'


def svd(rank: float, heads: str, metric: str = "plain", centre: str = "mean") -> str:
    return (
        f'{{ use = "svd", rank = {rank}, heads = {heads}, '
        f'metric = "{metric}", centre = "{centre}" }}'
    )


ALL = '"all"'
KEYS = {
    "joint": f"{DEROPE}, {svd(0.25, ALL, centre='none')}",
    "centred": f"{DEROPE}, {svd(0.375, ALL)}",
    "by-head": f"{DEROPE}, {svd(0.5, '1', 'whitened')}",
    "post-rope": svd(0.5, ALL),
}
VALUES = {
    "dense": "",
    "joint": svd(0.25, ALL, centre="none"),
    "centred": svd(0.5, "1", "whitened"),
}


def written(keys: str, values: str, more: str = "") -> recipe.Recipe:
    return recipe.loads(
        f'kvtune = 1\n[[layers]]\nspan = "all"\nsinks = 3\nrecent = 7\n{more}\n'
        f"kept.keys = [{keys}]\nkept.values = [{values}]\n"
    )


@torch.no_grad()
def answers(model: Any, made: recipe.Recipe, tokens: Tensor, how: str, prompt: int = 150) -> Tensor:
    """Returns the logits of tokens behind a prompt."""
    tokens = tokens.to(model.device)
    with implementation(how):
        cache = load(made, model)
        found = [model(tokens[:, :prompt], past_key_values=cache).logits[:, -1:]]
        for token in tokens[:, prompt:].split(1, 1):
            found.append(model(token, past_key_values=cache).logits)
    held = [x for x in cache.layers if isinstance(x, CompressedLayer)]
    assert all(x.groups[0].rows.keys.tokens for x in held)
    return torch.cat(found, 1).float()


@pytest.fixture
def half(model_of: Any) -> Any:
    """Returns a tiny Llama in bfloat16, whose kernels run in the interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = model_of("llama", num_hidden_layers=2, initializer_range=0.1)
    return made.bfloat16().to(device)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the answers that are made of latents as they lie."""
    calls: list[int] = []
    own = lowrank.attend

    def counting(*args: Any) -> Tensor:
        calls.append(1)
        return own(*args)

    monkeypatch.setattr(lowrank, "attend", counting)
    return calls


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("keys", KEYS)
def test_latents_answer_what_decoded_keys_answer(
    keys: str, values: str, half: Any, draw: Any, read: list[int]
) -> None:
    made, tokens = written(KEYS[keys], VALUES[values]), draw(2, 153)
    expected = answers(half, made, tokens, "reference")
    assert not read
    found = answers(half, made, tokens, "triton")
    assert len(read) == 6  # two layers, three tokens
    torch.testing.assert_close(found, expected, atol=0.06, rtol=0.05)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_group_of_layers_is_read_as_it_lies(
    layers: int, half: Any, draw: Any, read: list[int]
) -> None:
    share = f'share = {{ use = "xkv", layers = {layers}, key_rank = 0.375, value_rank = 0.375 }}'
    made, tokens = written("", "", share), draw(2, 223)
    expected = answers(half, made, tokens, "reference", 220)
    found = answers(half, made, tokens, "triton", 220)
    assert len(read) == 6
    torch.testing.assert_close(found, expected, atol=0.06, rtol=0.05)


def test_quantised_latents_are_decoded(half: Any, draw: Any, read: list[int]) -> None:
    codes = '{ use = "affine", bits = 8, group = "head", axis = "token" }'
    made = written(f"{KEYS['centred']}, {codes}", "")
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="other low ranks run in plain torch"):
        answers(half, made, draw(1, 152), "triton")
    assert not read


@pytest.mark.parametrize("name", ["llama", "glm4"])
def test_turns_are_the_models_own(name: str, model: Any) -> None:
    rope = ropes(model)[0]
    rotary = lowrank.rotary_of(rope, 40, torch.device("cpu"))
    keys = torch.randn(1, 2, 40, model.config.head_dim)
    positions = torch.arange(40)
    turned = rotary.turn(keys, positions.expand(1, 2, 40))
    torch.testing.assert_close(turned, rope.turn(keys, positions), atol=5e-3, rtol=5e-3)
    assert lowrank.rotary_of(rope, 4000, torch.device("cpu")) is rotary


def test_turns_that_no_frequencies_tell_are_read_from_a_table(llama: Any) -> None:
    rope = ropes(llama)[0]
    stretched = Rope(Stretched(rope.module))
    rotary = lowrank.rotary_of(stretched, 40, torch.device("cpu"))
    assert rotary.table is not None and len(rotary.table) >= 40
    keys, positions = torch.randn(1, 2, 40, 64), torch.arange(40)
    turned = rotary.turn(keys, positions.expand(1, 2, 40))
    torch.testing.assert_close(turned, stretched.turn(keys, positions), atol=5e-3, rtol=5e-3)
    longer = lowrank.rotary_of(stretched, 5000, torch.device("cpu"))
    assert longer.table is not None and len(longer.table) >= 5000


class Stretched(torch.nn.Module):
    """An embedding that turns half as fast as its frequencies say."""

    def __init__(self, own: torch.nn.Module) -> None:
        super().__init__()
        self.own, self.inv_freq = own, own.inv_freq

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.own(like, positions / 2)
        return found
