"""The container of a packed cache: a header, named sections, and a hash over every byte."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvtune.errors import IntegrityError
from kvtune.files import canonical_json, sha256_bytes

MAGIC = b"KVPACK\r\n"  # as PNG's: a transfer as text would change its line end
FORMAT = 1
HEADER_LIMIT = 1 << 20
_HEAD = len(MAGIC) + 4
_HASH = 32


@dataclass(frozen=True)
class Container:
    """Facts that JSON can hold, and bytes by name."""

    facts: Mapping[str, Any]
    sections: Mapping[str, bytes]

    def to_bytes(self) -> bytes:
        """Returns the file: magic, length of the header, header, sections, sha256 over all."""
        names = sorted(self.sections)
        sizes = [[name, len(self.sections[name])] for name in names]
        whole = {"format": FORMAT, "facts": dict(self.facts), "sections": sizes}
        header = canonical_json(whole).encode()
        if len(header) > HEADER_LIMIT:
            raise IntegrityError(f"A header of {len(header)} bytes exceeds {HEADER_LIMIT}.")
        body = b"".join(self.sections[name] for name in names)
        data = MAGIC + len(header).to_bytes(4, "little") + header + body
        return data + bytes.fromhex(sha256_bytes(data))

    @classmethod
    def parse(cls, data: bytes) -> Container:
        """Reads what `dump` made; nothing is larger in memory than in the file.

        Raises:
            IntegrityError: cut short, changed, too new, or no packed cache at all.
        """
        if data[: len(MAGIC)] != MAGIC:
            raise IntegrityError("This is no packed cache: its first bytes differ.")
        if len(data) < _HEAD + _HASH or bytes.fromhex(sha256_bytes(data[:-_HASH])) != data[-_HASH:]:
            raise IntegrityError("The packed cache is cut short or changed: its sha256 differs.")
        size = int.from_bytes(data[len(MAGIC) : _HEAD], "little")
        if size > min(HEADER_LIMIT, len(data) - _HEAD - _HASH):
            raise IntegrityError(f"The packed cache has a header of {size} bytes.")
        try:
            header = json.loads(data[_HEAD : _HEAD + size])
            return cls._parsed(header, data[_HEAD + size : -_HASH])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"The packed cache's header is damaged: {error}.") from None

    @classmethod
    def _parsed(cls, header: Any, body: bytes) -> Container:
        if (found := header["format"]) != FORMAT:
            hint = "Update kvtune." if isinstance(found, int) and found > FORMAT else ""
            raise IntegrityError(f"The packed cache has format {found!r}, not {FORMAT}.", hint)
        sections, start = {}, 0
        for name, size in header["sections"]:
            if type(name) is not str or type(size) is not int or size < 0 or name in sections:
                raise ValueError(f"section {name!r} of {size!r} bytes")
            sections[name] = body[start : start + size]
            start += size
        if start != len(body) or type(header["facts"]) is not dict:
            raise ValueError(f"sections of {start} bytes in a body of {len(body)}")
        return cls(header["facts"], sections)

    def section(self, name: str) -> bytes:
        """Returns the bytes of a name; IntegrityError when there are none."""
        if name not in self.sections:
            raise IntegrityError(f"The packed cache lacks its section {name!r}.")
        return self.sections[name]


def inflate(data: bytes, size: int) -> bytes:
    """Undoes DEFLATE into exactly `size` bytes; never allocates more.

    Raises:
        IntegrityError: it is damaged, or longer or shorter.
    """
    engine = zlib.decompressobj()
    try:
        found = engine.decompress(data, size + 1)
    except zlib.error as error:
        raise IntegrityError(f"A section of the packed cache is damaged: {error}.") from None
    if len(found) != size or not engine.eof or engine.unused_data:
        raise IntegrityError(f"A section of the packed cache does not hold {size} bytes.")
    return found
