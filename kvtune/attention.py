"""The attention and mask functions registered as "kvtune":
where a model's attention meets a compressed layer."""

from typing import Any, NoReturn, Protocol

import torch
from kvtune_kernels import attend
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvtune.errors import UnsupportedError

NAME = "kvtune"


class Reader(Protocol):
    """A cache layer that answers queries itself."""

    def attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Attends with query [B, Hq, M, D] over all that the layer holds; returns [B, Hq, M, D]."""
        ...


class Reading:
    """What a layer's `update` returns in place of keys and of
    values: a handle that our attention reads from."""

    def __init__(self, layer: Reader) -> None:
        self.layer = layer

    def to(self, *args: Any, **kwargs: Any) -> "Reading":
        """Stays where it is: a model that hands it on to a layer elsewhere moves it there first."""
        return self

    def __getattr__(self, name: str) -> NoReturn:
        raise UnsupportedError(
            f"The model's attention reads the cached keys itself (.{name}); compressed layers "
            "cannot serve it.",
            'Set model.set_attn_implementation("kvtune"); where it is set, the architecture is '
            "not supported.",
        )


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Reading,
    value: Tensor | Reading,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Answers query [B, Hq, M, D] with [B, M, Hq, D], from a
    compressed layer or from dense keys and values.

    Dense tensors go to transformers' own sdpa, so that a plain cache gives exactly what it gives
    without kvtune.

    Raises:
        UnsupportedError: learned attention sinks or position biases on a compressed layer.
    """
    if isinstance(key, Reading):
        if odd := [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]:
            raise UnsupportedError(f"Compressed layers do not support attention with {odd[0]}.")
        out = key.layer.attend(query, attention_mask, scaling, softcap)
        return out.transpose(1, 2).contiguous(), None
    assert isinstance(value, Tensor)
    if softcap is None:
        dense, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return dense, None
    return _softcapped(query, key, value, attention_mask, scaling, softcap), None


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
) -> Tensor:
    """Dense attention with capped logits (Gemma 2), which sdpa lacks."""
    if mask is None and query.shape[2] > 1:
        mask = causal(query.shape[2], key.shape[2], query.device)[None, None]
    rows = [
        attend(query[b : b + 1], key[b : b + 1], value[b : b + 1], _row(mask, b), scale, softcap)
        for b in range(query.shape[0])
    ]
    return torch.cat(rows).transpose(1, 2).contiguous()


def _row(mask: Tensor | None, row: int) -> Tensor | None:
    return None if mask is None else mask[min(row, mask.shape[0] - 1), 0]


def causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """Mask [queries, keys] in which the last query sees every key."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones.tril(keys - queries)


AttentionInterface.register(NAME, attention)
# sdpa's masks carry causality and padding; compressed layers read the padding off their last row
AttentionMaskInterface.register(NAME, sdpa_mask)
