"""Codecs that were fitted once, kept in the user's cache folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtune.bank import Sizes
from kvtune.errors import IntegrityError, MissingInputError
from kvtune.files import cache_home, canonical_json, sha256_bytes
from kvtune.models import fingerprint
from kvtune.packing import fitting
from kvtune.packing.codec import Codec
from kvtune.packing.fitting import Say
from kvtune.packing.layout import WIDEST
from kvtune.texts import Document, digest


def place(model: Any, documents: list[Document], sizes: Sizes, seed: int = 0) -> Path:
    """Where the codec of a model, a text and its settings lies, or will."""
    settings = [digest(documents), list(sizes), seed, fitting.FINEST, fitting.MOST, WIDEST]
    name = f"{_stem(model)}-{sha256_bytes(canonical_json(settings).encode())[:16]}.safetensors"
    return _folder() / name


def fitted(
    model: Any, tokenizer: Any, documents: list[Document], sizes: Sizes, say: Say, seed: int = 0
) -> tuple[Codec, Path]:
    """The codec from the shelf, or made and put there; errors as `fitting.fit`."""
    path = place(model, documents, sizes, seed)
    if path.is_file():
        try:
            return Codec.load(path), path
        except IntegrityError:
            pass  # it is made again, as it would be if it had been deleted
    codec = fitting.fit(model, tokenizer, documents, sizes=sizes, seed=seed, say=say)
    codec.save(path)
    return codec, path


def named(model: Any, wanted: str) -> Codec:
    """The codec of a digest.

    Raises:
        MissingInputError: the shelf has none such for the model.
    """
    for path in sorted(_folder().glob(f"{_stem(model)}-*.safetensors")):
        try:
            codec = Codec.load(path)
        except IntegrityError:
            continue
        if codec.digest == wanted:
            return codec
    what = f"The codec {wanted[:12]} that the packed cache was made with is not in {_folder()}."
    raise MissingInputError(what, "Give it with --codec FILE.")


def _folder() -> Path:
    return cache_home() / "codecs"


def _stem(model: Any) -> str:
    return fingerprint(model).removeprefix("sha256:")[:16]
