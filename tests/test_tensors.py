"""Laws of kvtune/tensors.py: the same bytes each time, and no file is trusted."""

import json
import random
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from kvtune.errors import IntegrityError, KvtuneError, MissingInputError
from kvtune.tensors import HEADER_LIMIT, Artifact

META: dict[str, object] = {"format": 1, "name": "é", "spans": [1, 2.5, None]}


def sample() -> Artifact:
    wide = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "layer.3.keys": wide.t(),  # not contiguous, and sharing memory with the next
        "layer.3.row": wide[1],
        "codes-8": torch.arange(5, dtype=torch.uint8),
        "half": torch.ones(2, 3, dtype=torch.bfloat16),
        "small": torch.ones(3).to(torch.float8_e4m3fn),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 4),
    }
    return Artifact(tensors, META)


def raw(header: object, body: bytes = b"", meta: bool = True) -> bytes:
    """Returns a safetensors file with this header; a text stands as it is."""
    if isinstance(header, dict) and meta:
        header = {"__metadata__": {"kvtune": "{}"}, **header}
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    before = sample()
    sha256 = before.save(tmp_path / "a")
    after = Artifact.load(tmp_path / "a", sha256)
    assert after.meta == META
    assert list(after.tensors) == sorted(before.tensors)
    for name, tensor in before.tensors.items():
        assert after.tensors[name].dtype == tensor.dtype
        assert torch.equal(after.tensors[name].float(), tensor.float()), name
        assert after.tensors[name].is_contiguous()


def test_equal_artifacts_have_equal_bytes_whatever_the_order(tmp_path: Path) -> None:
    one = sample()
    other = Artifact(dict(reversed(one.tensors.items())), dict(reversed(META.items())))
    assert one.save(tmp_path / "a") == other.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_reader_of_safetensors_finds_one_metadata_key(tmp_path: Path) -> None:
    sample().save(tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["kvtune"]
    assert json.loads(metadata["kvtune"]) == META


def test_loaded_tensors_may_be_written_to(tmp_path: Path) -> None:
    sample().save(tmp_path / "a")
    row = Artifact.load(tmp_path / "a").tensors["layer.3.row"]
    row += 1
    assert row[0] == 7


def test_every_changed_byte_is_detected_before_parsing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    sha256 = Artifact({"a": torch.ones(3)}).save(path)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(IntegrityError, match=f"{path} has changed: .* {sha256}, but is"):
            Artifact.load(path, sha256)


def test_every_mutation_loads_or_is_an_integrity_error(tmp_path: Path) -> None:
    path, chance = tmp_path / "a", random.Random(0)
    sample().save(path)
    data = path.read_bytes()
    refused = 0
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        del changed[chance.choice((chance.randrange(len(changed)), len(changed))) :]
        path.write_bytes(changed)
        try:
            Artifact.load(path)
        except IntegrityError as error:
            refused += 1
            assert str(path) in str(error)
    assert 500 < refused <= 1500


MALFORMED = {
    "empty": b"",
    "short": b"\x00\x00",
    "cut": raw({"a": entry()}),
    "longer than said": raw({"a": entry()}, b"\0" * 8),
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "big header": raw("{}" + " " * HEADER_LIMIT),
    "no json": raw("{"),
    "not utf-8": struct.pack("<Q", 2) + b"\xff\xff",
    "list": raw("[]"),
    "deep": raw("[" * 100_000),
    "nan": raw('{"__metadata__":{"kvtune":"{}"},"a":NaN}'),
    "no metadata": raw({"a": entry()}, b"\0" * 4, meta=False),
    "two keys": raw({"__metadata__": {"kvtune": "{}", "format": "pt"}}),
    "other key": raw({"__metadata__": {"format": "pt"}}),
    "metadata number": raw({"__metadata__": {"kvtune": 1}}),
    "metadata list": raw({"__metadata__": {"kvtune": "[]"}}),
    "metadata nan": raw({"__metadata__": {"kvtune": '{"a":NaN}'}}),
    "metadata twice": raw({"__metadata__": {"kvtune": '{"a":1,"a":2}'}}),
    "tensor twice": raw(
        '{"__metadata__":{"kvtune":"{}"},"a":%s,"a":%s}' % ((json.dumps(entry()),) * 2), b"\0" * 4
    ),
    "slash": raw({"a/b": entry()}, b"\0" * 4),
    "dots": raw({"a..b": entry()}, b"\0" * 4),
    "no name": raw({"": entry()}, b"\0" * 4),
    "dtype": raw({"a": entry("C64", (1,), (0, 8))}, b"\0" * 8),
    "dtype list": raw({"a": {"dtype": []}}),
    "no entry": raw({"a": 3}),
    "negative shape": raw({"a": entry(shape=(-1,))}, b"\0" * 4),
    "wrong shape": raw({"a": entry(shape=(2,))}, b"\0" * 4),
    "huge shape": raw({"a": entry(shape=(2**62, 2**62))}, b"\0" * 4),
    "offsets": raw({"a": entry(offsets=(4, 8))}, b"\0" * 4),
    "overlap": raw({"a": entry(), "b": entry()}, b"\0" * 4),
    "hole": raw({"a": entry(), "b": entry(offsets=(8, 12))}, b"\0" * 12),
    "not finite": raw({"a": entry()}, struct.pack("<f", float("inf"))),
    "not finite half": raw({"a": entry("BF16", (1,), (0, 2))}, b"\xff\xff"),
    "not finite byte": raw({"a": entry("F8_E4M3", (1,), (0, 1))}, b"\x7f"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_an_integrity_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(MALFORMED[name])
    with pytest.raises(IntegrityError, match=r"a\.safetensors is not a sound artifact"):
        Artifact.load(path)


def test_a_sound_file_of_another_writer_loads(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(raw({"a": entry()}, struct.pack("<f", 2.5)))
    assert Artifact.load(tmp_path / "a").tensors["a"].tolist() == [2.5]


def test_a_missing_file_is_a_missing_input_and_a_folder_is_refused(tmp_path: Path) -> None:
    for missing in (tmp_path / "none", tmp_path / "nul\0byte"):
        with pytest.raises(MissingInputError, match="cannot be read"):
            Artifact.load(missing)
    with pytest.raises(IntegrityError, match="not a regular file"):
        Artifact.load(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a/b": torch.ones(1)},
        {"..": torch.ones(1)},
        {"a": torch.tensor([1.0, float("nan")])},
        {"a": torch.ones(1, dtype=torch.complex64)},
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(KvtuneError):
        Artifact(tensors).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_shapes_must_be_exactly_the_expected_ones() -> None:
    artifact = Artifact({"a": torch.ones(2, 3), "b": torch.ones(1)})
    artifact.check_shapes({"a": (2, 3), "b": (1,)})
    wrong: list[tuple[dict[str, tuple[int, ...]], str]] = [
        ({"a": (2, 3)}, "b is unknown"),
        ({"a": (2, 3), "b": (1,), "c": ()}, "c is missing"),
        ({"a": (3, 2), "b": (1,)}, r"a is \[2, 3\], not \[3, 2\]"),
    ]
    for expected, words in wrong:
        with pytest.raises(IntegrityError, match=words):
            artifact.check_shapes(expected)
