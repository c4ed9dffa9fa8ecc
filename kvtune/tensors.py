"""Artifact: named tensors and their facts in one safetensors file, reproducible byte for byte."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from kvtune import files
from kvtune.errors import IntegrityError, MissingInputError

META_KEY = "kvtune"
HEADER_LIMIT = 16 * 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True, eq=False)
class Artifact:
    """Tensors by name, with JSON facts about them.

    Args:
        tensors: any shapes; names are letters, digits, `_`, `.` and `-`, without `..`.
        meta: what JSON can hold.
    """

    tensors: dict[str, torch.Tensor]
    meta: dict[str, object] = field(default_factory=dict)

    def save(self, path: Path) -> str:
        """Writes the file atomically; returns its sha256, 64 hex digits.

        Raises:
            IntegrityError: a name, dtype or value that `load` would refuse.
            ResourceError, UsageError: as `files.write_atomic` does.
        """
        for name, tensor in self.tensors.items():
            _check_name(name)
            if tensor.dtype not in _DTYPES.values():
                raise IntegrityError(f"tensor {name!r} has the unsupported dtype {tensor.dtype}")
        plain = {name: _plain(self.tensors[name]) for name in sorted(self.tensors)}
        _check_finite(plain)
        data = safetensors.torch.save(plain, {META_KEY: files.canonical_json(self.meta)})
        files.write_atomic(path, data)
        return files.sha256_bytes(data)

    @classmethod
    def load(cls, path: Path, sha256: str | None = None) -> "Artifact":
        """Reads a file that nobody vouches for.

        Args:
            path: the safetensors file.
            sha256: 64 hex digits that the bytes must have; checked before anything is parsed.

        Raises:
            MissingInputError: there is no such file.
            IntegrityError: the file is changed, damaged or not an artifact.
        """
        data = _read(path)
        found = files.sha256_bytes(data)
        if sha256 is not None and found != sha256:
            raise IntegrityError(
                f"{path} has changed: its sha256 should be {sha256}, but is {found}.",
                "Fetch or fit it again.",
            )
        try:
            return _parse(data)
        except (IntegrityError, SafetensorError, ValueError, RecursionError, RuntimeError) as error:
            raise IntegrityError(f"{path} is not a sound artifact: {error}") from error

    def check_shapes(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises IntegrityError unless there are exactly these tensors, in these shapes."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        faults = [f"{name} is missing" for name in sorted(expected.keys() - shapes.keys())]
        faults += [f"{name} is unknown" for name in sorted(shapes.keys() - expected.keys())]
        faults += [
            f"{name} is {list(shapes[name])}, not {list(expected[name])}"
            for name in sorted(expected.keys() & shapes.keys())
            if shapes[name] != tuple(expected[name])
        ]
        if faults:
            raise IntegrityError(f"The tensors do not fit: {'; '.join(faults)}.")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous copy on the CPU that shares memory with no other tensor."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or ".." in name:
        raise IntegrityError(f"{name!r} is not a name for a tensor")


def _check_finite(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        # one-byte floats have no `isfinite` of their own
        wide = tensor.float() if tensor.element_size() == 1 else tensor
        if not bool(torch.isfinite(wide).all()):
            raise IntegrityError(f"tensor {name!r} holds values that are not finite")


def _read(path: Path) -> bytes:
    """Returns the bytes of a regular file; a pipe or device could go on for ever."""
    try:
        if path.exists() and not path.is_file():
            raise IntegrityError(f"{path} is not a regular file.")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MissingInputError(f"{path} cannot be read: {reason}.") from error


def _parse(data: bytes) -> Artifact:
    header = _header(data)
    meta = _meta(header.pop("__metadata__", None))
    for name, entry in header.items():
        _check_name(name)
        if not isinstance(entry, dict) or str(entry.get("dtype")) not in _DTYPES:
            raise IntegrityError(f"tensor {name!r} has no dtype that an artifact may have")
    tensors = safetensors.torch.load(data)
    _check_finite(tensors)
    return Artifact({name: tensors[name] for name in sorted(tensors)}, meta)


def _header(data: bytes) -> dict[str, object]:
    """Returns the JSON object that opens a safetensors file, after its 8-byte length."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise IntegrityError("it is cut short")
    if size > HEADER_LIMIT:
        raise IntegrityError(f"its header has {size} bytes, more than {HEADER_LIMIT}")
    return _object(data[8 : 8 + size].decode(), "the header")


def _meta(metadata: object) -> dict[str, object]:
    """Returns the facts out of the one metadata key that an artifact has."""
    if not isinstance(metadata, dict) or set(metadata) != {META_KEY}:
        raise IntegrityError(f"its metadata is not the one key {META_KEY!r}")
    text = metadata[META_KEY]
    if not isinstance(text, str):
        raise IntegrityError("its metadata is not a text")
    return _object(text, "the metadata")


def _object(text: str, where: str) -> dict[str, object]:
    """Parses a JSON object strictly: no key twice, no NaN."""
    found: object = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    if not isinstance(found, dict):
        raise IntegrityError(f"{where} is not a JSON object")
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise IntegrityError("a JSON object has a key twice")
    return found


def _no_constant(word: str) -> object:
    raise IntegrityError(f"{word} is not a JSON number")
