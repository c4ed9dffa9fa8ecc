"""Laws of packed caches: they come back, in every family, and no changed byte gets by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COMPRESSIBLE, tiny
from torch import Tensor
from transformers import DynamicCache

from kvtune import packing
from kvtune.bank import Sizes
from kvtune.errors import IntegrityError, KvtuneError, UnsupportedError, UsageError
from kvtune.models import facts
from kvtune.packing.codec import Codec
from kvtune.packing.container import Container, inflate
from kvtune.packing.fitting import fit
from kvtune.packing.layout import spans
from kvtune.packing.whole import values
from kvtune.texts import Document

TOKENS = 70  # behind the window of the sliding families
FINE = 1e-5


class Digits:
    """A tokenizer of tiny models: one id for each character."""

    def __call__(self, text: list[str], **_: Any) -> dict[str, list[list[int]]]:
        """Ids of 3 to 60."""
        return {"input_ids": [[3 + ord(letter) % 58 for letter in own] for own in text]}


@cache
def codec_of(name: str) -> Codec:
    """The codec of a tiny model, of random text."""
    letters = np.random.default_rng(0).integers(0, 58, 600)
    text = Document("random", "".join(map(chr, letters + 64)))
    return fit(tiny(name), Digits(), [text], sizes=Sizes(4, 96, 8))


@torch.no_grad()
def filled(model: Any, ids: Tensor, dtype: torch.dtype | None = None) -> DynamicCache:
    """The cache of a prompt [1, T]."""
    held = DynamicCache(config=model.config)
    model(ids, past_key_values=held)
    for layer in held.layers:
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
    return held


def errors(held: DynamicCache, other: DynamicCache) -> list[float]:
    """How far each layer's keys and values are off, of their norms."""
    pairs = zip(held.layers, other.layers, strict=True)
    return [
        float((getattr(a, side) - getattr(b, side)).norm() / getattr(a, side).norm())
        for a, b in pairs
        for side in ("keys", "values")
    ]


@pytest.fixture(scope="module")
def packed() -> tuple[bytes, DynamicCache]:
    """The smallest sound file: a few tokens of a tiny model."""
    model = tiny("yi")
    ids = torch.arange(3, 11)[None]
    held = filled(model, ids)
    return packing.pack(held, model, codec_of("yi"), tokens=ids, step=1e-2), held


@pytest.mark.parametrize("name", COMPRESSIBLE)
def test_a_cache_comes_back_in_every_family(name: str, draw: Callable[..., Tensor]) -> None:
    model, codec, ids = tiny(name), codec_of(name), draw(1, TOKENS)
    held = filled(model, ids)
    other = packing.unpack(packing.pack(held, model, codec, step=FINE), model, codec)
    assert other.get_seq_length() == TOKENS
    assert max(errors(held, other)) < 5e-3
    full = set(facts(model.config).compressible())
    for i, (a, b) in enumerate(zip(held.layers, other.layers, strict=True)):
        assert i in full or (torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_generation_goes_on_from_a_fine_cache_as_from_a_dense_one(
    name: str, draw: Callable[..., Tensor]
) -> None:
    model, codec, ids = tiny(name), codec_of(name), draw(1, TOKENS + 1)
    held = filled(model, ids[:, :-1])
    other = packing.unpack(packing.pack(held, model, codec, step=FINE), model, codec)
    said = [
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=own,
            max_new_tokens=5,
            do_sample=False,
        )
        for own in (held, other)
    ]
    assert torch.equal(*said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_cache_comes_back_in_its_own_dtype(
    dtype: torch.dtype, draw: Callable[..., Tensor]
) -> None:
    model, codec = tiny("mistral"), codec_of("mistral")
    held = filled(model, draw(1, TOKENS), dtype)
    other = packing.unpack(packing.pack(held, model, codec, step=FINE), model, codec)
    assert all(layer.keys.dtype == layer.values.dtype == dtype for layer in other.layers)
    assert max(errors(held, other)) < 1e-2


@pytest.mark.parametrize("tokens", [1, 2, 9, 515])
def test_a_cache_of_any_length_comes_back(tokens: int, draw: Callable[..., Tensor]) -> None:
    model, codec = tiny("yi"), codec_of("yi")
    held = filled(model, draw(1, tokens))
    for words in ({"step": FINE}, {"bits": 400.0, "coding": "kvtc"}):
        data = packing.pack(held, model, codec, **words)  # type: ignore[arg-type]
        assert max(errors(held, packing.unpack(data, model, codec))) < 0.1


def test_a_smaller_step_takes_more_bytes_and_leaves_less_error(draw: Callable[..., Tensor]) -> None:
    model, codec = tiny("llama"), codec_of("llama")
    held = filled(model, draw(1, TOKENS))
    files = [packing.pack(held, model, codec, step=step) for step in (1e-1, 1e-2, 1e-3)]
    worst = [sum(errors(held, packing.unpack(data, model, codec))) for data in files]
    assert sorted(files, key=len) == files
    assert sorted(worst, reverse=True) == worst


@pytest.mark.parametrize(
    ("kind", "bits"), [("entropy", 2.0), ("entropy", 5.0), ("kvtc", 7.0), ("kvtc", 9.0)]
)
def test_a_file_keeps_to_the_bits_that_are_asked_for(
    kind: str, bits: float, draw: Callable[..., Tensor]
) -> None:
    model, codec = tiny("llama"), codec_of("llama")
    length = 400
    data = packing.pack(filled(model, draw(1, length)), model, codec, bits=bits, coding=kind)
    true = 8 * len(data) / values(facts(model.config), length)
    assert true <= bits * 1.03
    if kind == "entropy":
        assert true >= bits * 0.97


def test_the_same_cache_is_the_same_file(packed: tuple[bytes, DynamicCache]) -> None:
    ids = torch.arange(3, 11)
    again = packing.pack(packed[1], tiny("yi"), codec_of("yi"), tokens=ids, step=1e-2)
    assert again == packed[0]


def test_ids_go_along(packed: tuple[bytes, DynamicCache], draw: Callable[..., Tensor]) -> None:
    found = packing.prompt(packed[0])
    assert found is not None and found.tolist() == list(range(3, 11))
    bare = packing.pack(packed[1], tiny("yi"), codec_of("yi"))
    assert packing.prompt(bare) is None


def test_any_changed_byte_is_found(packed: tuple[bytes, DynamicCache]) -> None:
    data = packed[0]
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x10
        with pytest.raises(IntegrityError):
            Container.parse(bytes(changed))


def test_a_file_that_is_cut_short_is_found(packed: tuple[bytes, DynamicCache]) -> None:
    for size in (0, 5, 12, 60, len(packed[0]) // 2, len(packed[0]) - 1):
        with pytest.raises(IntegrityError):
            packing.header(packed[0][:size])


@pytest.mark.parametrize("seed", range(6))
def test_a_hostile_file_with_a_sound_hash_is_an_error_and_no_more(
    packed: tuple[bytes, DynamicCache], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    model, codec, held = tiny("yi"), codec_of("yi"), Container.parse(packed[0])
    for _ in range(40):
        sections = dict(held.sections)
        name = str(generator.choice(sorted(sections)))
        part = bytearray(sections[name])
        for place in generator.integers(0, len(part), 3):
            part[place] = generator.integers(256)
        sections[name] = bytes(part[: generator.integers(1, len(part) + 1)])
        data = Container(held.facts, sections).to_bytes()
        try:
            packing.prompt(data)
            other = packing.unpack(data, model, codec)
        except KvtuneError:
            continue
        assert [layer.keys.shape for layer in other.layers] == [
            layer.keys.shape for layer in packed[1].layers
        ]


@pytest.mark.parametrize(
    "lie",
    [
        {"tokens": 10**12},
        {"tokens": -1},
        {"tokens": True},
        {"ids": 10**12},
        {"step": float("1e300")},
        {"step": "1"},
        {"step": None},
        {"dtype": "int8"},
        {"coding": "kvtc", "groups": [[[1, 2]]]},
        {"coding": "kvtc", "groups": 3},
        {"first": -1},
        {"last": "x"},
        {"codec": "0" * 64},
        {"fingerprint": "sha256:0"},
    ],
)
def test_a_header_that_lies_is_an_error(
    packed: tuple[bytes, DynamicCache], lie: dict[str, Any]
) -> None:
    held = Container.parse(packed[0])
    data = Container({**held.facts, **lie}, held.sections).to_bytes()
    with pytest.raises(IntegrityError):
        packing.prompt(data)
        packing.unpack(data, tiny("yi"), codec_of("yi"))


def test_a_bomb_is_not_inflated() -> None:
    import zlib

    with pytest.raises(IntegrityError):
        inflate(zlib.compress(bytes(1 << 24)), 1000)


def test_another_model_is_refused(
    packed: tuple[bytes, DynamicCache], model_of: Callable[..., Any]
) -> None:
    other = model_of("yi", seed=1)
    with pytest.raises(IntegrityError, match="another model"):
        packing.unpack(packed[0], other, codec_of("yi"))
    with pytest.raises(IntegrityError, match="another model"):
        packing.pack(packed[1], other, codec_of("yi"))


def test_another_codec_is_refused(packed: tuple[bytes, DynamicCache]) -> None:
    codec = codec_of("yi")
    (keys, own), *_ = codec.spans
    other = Codec(((replace(keys, mean=keys.mean + 1), own),), codec.meta)
    with pytest.raises(IntegrityError, match="codec"):
        packing.unpack(packed[0], tiny("yi"), other)


def test_a_batch_is_refused_by_name(draw: Callable[..., Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="batch of 2"):
        packing.pack(filled(tiny("yi"), draw(2, 9)), tiny("yi"), codec_of("yi"))


def test_values_that_are_not_finite_are_refused(draw: Callable[..., Tensor]) -> None:
    held = filled(tiny("yi"), draw(1, 9))
    held.layers[0].keys[0, 0, 5, 0] = float("nan")
    with pytest.raises(UnsupportedError, match="not finite"):
        packing.pack(held, tiny("yi"), codec_of("yi"))


@pytest.mark.parametrize(
    "words",
    [
        {"coding": "kvtcc"},
        {"coding": "kvtc"},
        {"step": 0.0},
        {"bits": 1e-9},
        {"bits": -1.0},
        {"tokens": torch.arange(3)},
    ],
)
def test_settings_that_cannot_be_are_refused(
    packed: tuple[bytes, DynamicCache], words: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        packing.pack(packed[1], tiny("yi"), codec_of("yi"), **words)


def test_a_model_of_sliding_layers_alone_has_nothing_to_pack() -> None:
    with pytest.raises(UnsupportedError, match="nothing to pack"):
        codec_of("mistral-sliding")


def test_a_codec_comes_back_from_its_file(tmp_path: Path) -> None:
    codec = codec_of("gemma2")
    codec.save(tmp_path / "codec.safetensors")
    other = Codec.load(tmp_path / "codec.safetensors")
    assert (other.digest, other.nbytes) == (codec.digest, codec.nbytes)
    (tmp_path / "codec.safetensors").write_bytes(b"no codec")
    with pytest.raises(IntegrityError):
        Codec.load(tmp_path / "codec.safetensors")


def test_layers_share_bases_evenly_within_the_widest(model_of: Callable[..., Any]) -> None:
    known = facts(tiny("llama").config)  # 4 layers of 128 values
    assert spans(known) == [(0, 1, 2, 3)]
    assert spans(known, 3 * 128) == [(0, 1), (2, 3)]
    assert spans(known, 1) == [(0,), (1,), (2,), (3,)]
    assert spans(facts(tiny("gemma2").config)) == [(1,)]
