"""HeadedLayer: one layer's cache whose kv heads follow different policies, group by group."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvtune.attention import Reading
from kvtune.layer import CompressedLayer, Group, Shared
from kvtune.pages import MakeSite, narrowed
from kvtune.policy import Policy
from kvtune.view import Observed


def make_layer(
    policy: Policy, sites: tuple[MakeSite, MakeSite], shared: Shared | None = None
) -> CompressedLayer:
    """An empty layer under a policy, whether its kv heads are alike or not."""
    kind = HeadedLayer if policy.heads else CompressedLayer
    return kind(policy, sites, shared)


def picked(x: Tensor, heads: tuple[int, ...], share: int = 1) -> Tensor:
    """Returns the part of x [B, H * share, n, D] that belongs to some of H kv heads, a view where
    they are neighbours; `share` query heads read one kv head."""
    return x[:, _places(heads, share, x.device)]


def observed_by(observed: Observed, heads: tuple[int, ...], kv_heads: int) -> Observed:
    """What is known of a prompt's tokens in some of its kv heads."""
    attention, queries, ahead = observed.attention, observed.queries, observed.ahead
    if queries is not None:
        queries = picked(queries, heads, queries.shape[1] // kv_heads)
    return observed._replace(
        attention=None if attention is None else picked(attention, heads),
        queries=queries,
        ahead=None if ahead is None else picked(ahead, heads),
    )


class HeadedLayer(CompressedLayer):
    """A CompressedLayer for each group of kv heads that are alike; queries go where their keys are.

    Heads of equal policy are stored together, so kernels are launched once for each format, and a
    group that they cannot read takes no other group off them.
    """

    def __init__(
        self, policy: Policy, sites: tuple[MakeSite, MakeSite], shared: Shared | None = None
    ) -> None:
        super().__init__(policy, sites, shared)
        self.parts = [
            (heads, CompressedLayer(own, _narrowed(sites, heads), self._shared))
            for heads, own in policy.parts()
        ]
        self._kv_heads = sum(len(heads) for heads, _ in self.parts)
        for heads, part in self.parts:
            part.heads = (heads, self._kv_heads)

    @property
    def groups(self) -> list[Group]:
        """Batch rows that are stored together, of every group of heads."""
        return [group for _, part in self.parts for group in part.groups]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Notes dtype and device, everywhere."""
        super().lazy_initialization(key_states, value_states)
        for _, part in self.parts:
            part.lazy_initialization(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Reading, Reading]:
        """Takes keys and values [B, H, n, D]; returns a Reading in place of both."""
        for heads, part in self.parts:
            part.update(picked(key_states, heads), picked(value_states, heads))
        return super().update(key_states, value_states)

    def _attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        self._incoming = None
        share = query.shape[1] // self._kv_heads
        out = torch.empty_like(query)
        for heads, part in self.parts:
            places = _places(heads, share, query.device)
            out[:, places] = part.attend(query[:, places], mask, scale, softcap)
        self.seen = self.parts[0][1].seen
        return out

    def fill(self, keys: Tensor, values: Tensor, observed: Observed | None = None) -> None:
        """Takes an unpadded context [B, H, T, D], as a prompt's forward would leave it."""
        self.begin(keys)
        for heads, part in self.parts:
            own = observed and observed_by(observed, heads, self._kv_heads)
            part.fill(picked(keys, heads), picked(values, heads), own)

    def prompt(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] of an unpadded context, as they are read next."""
        order = torch.tensor([head for heads, _ in self.parts for head in heads]).argsort()
        keys, values = zip(*(part.prompt() for _, part in self.parts), strict=True)
        return torch.cat(keys, 1)[:, order], torch.cat(values, 1)[:, order]

    def settle_prompt(self, scores: Tensor | None) -> None:
        """Lets a prompt that has waited compete, by scores [B, H, T] of a replay."""
        for heads, part in self.parts:
            part.settle_prompt(None if scores is None else picked(scores, heads))

    def fork(self) -> HeadedLayer:
        """A copy-on-write twin."""
        twin = HeadedLayer(self.policy, self._sites, self._shared)
        self._hand_over(twin)
        twin.parts = [(heads, part.fork()) for heads, part in self.parts]
        return twin

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        for _, part in self.parts:
            part.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens (given as a negative number)
        while they are in the exact window of every head."""
        # the heads with the shortest window first: a refused crop takes nothing
        for _, part in sorted(self.parts, key=lambda held: held[1].exact):
            part.crop(tokens_to_remove)
        self.seen = self.parts[0][1].seen

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        for _, part in self.parts:
            part.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Batch row i becomes the old row indices[i]."""
        for _, part in self.parts:
            part.batch_select_indices(indices)


def _narrowed(
    sites: tuple[MakeSite, MakeSite], heads: tuple[int, ...]
) -> tuple[MakeSite, MakeSite]:
    return narrowed(sites[0], heads), narrowed(sites[1], heads)


@lru_cache(maxsize=1024)
def _places(heads: tuple[int, ...], share: int, device: torch.device) -> slice | Tensor:
    """Where some heads are: a view where they are neighbours, else an index on their device.

    An index from the host would be copied in every step, and no CUDA graph could hold that.
    """
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0] * share, (heads[-1] + 1) * share)
    with torch.inference_mode(False):  # it is kept beyond the caller's mode
        return torch.tensor([head * share + i for head in heads for i in range(share)]).to(device)
