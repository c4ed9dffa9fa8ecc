"""Laws of what GPU kernels read: a method is marked as its chains are served."""

from __future__ import annotations

import pytest

from kvtune import parts
from kvtune.bench import latency
from kvtune.chains import Chain
from kvtune.parts import Codec
from kvtune.reading import reading, readings

KNOWN = {
    "affine": "kernels",
    "waterfill": "kernels",
    "promote": "kernels",
    "normal": "some settings",
    "hadamard": "folded",
    "klt": "folded",
    "derope": "plain torch",
    "codebook": "plain torch",
    "ternary": "plain torch",
    "attention": "plain torch",
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_method_is_marked_as_it_is_read(name: str) -> None:
    assert reading(parts.find(name)) == KNOWN[name]


@pytest.mark.parametrize("name", parts.names())
def test_a_chain_has_a_format_only_of_what_is_read(name: str) -> None:
    kind = parts.find(name)
    if not issubclass(kind, Codec):
        return
    codes = parts.find("affine")(group="head")
    assert isinstance(codes, Codec)
    behind = Chain((kind(), codes)).format(128)
    assert (behind is not None) == (reading(kind) == "folded")
    alone = Chain((kind(),)).format(128)
    assert alone is None or reading(kind) in ("kernels", "some settings")


def test_a_latency_table_keeps_the_marks() -> None:
    held = latency.Table("card", 32, 8, 128, {}, (), dict(readings()))
    assert set(held.methods) == set(parts.names())
