"""The laws of codecs that are fitted, and of those that kernels fold into queries and outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_cases import CODECS, HEADS, draw, fitted, home

from kvtune.parts import Codec

every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)


@every_codec
def test_fitted_tensors_are_those_that_were_foretold(codec: Codec) -> None:
    found, dim = fitted(codec), (home(codec) or (0, ""))[0]
    blank = codec.blanks(HEADS, dim)
    assert {f"{codec.name()}.{name}" for name in blank} == found.keys()
    for name, x in blank.items():
        own = found[f"{codec.name()}.{name}"]
        assert (own.shape, own.dtype) == (x.shape, x.dtype)
        assert own.shape[0] == HEADS or not codec.apart, "axis 0 is the kv heads"
        assert own.isfinite().all()
    assert codec.fits or not found


@every_codec
def test_a_linear_codec_stores_its_fold(codec: Codec, place: Any) -> None:
    if not codec.linear:
        return
    x = draw(codec, 2 * codec.block)
    site = place(codec, x.shape[2])
    shift, turn, back = (part.float() for part in codec.fold(site, *x.shape[1::2]))
    y = (x - shift[:, None]) @ turn
    torch.testing.assert_close(codec.encode(x, site).body, y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y @ back + shift[:, None], x, rtol=1e-3, atol=1e-2)
