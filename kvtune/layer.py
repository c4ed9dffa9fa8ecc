"""CompressedLayer: one layer's cache under a policy, as transformers wants a cache layer to be."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from kvtune_kernels import Workspace
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvtune.attention import Reading
from kvtune.errors import UnsupportedError
from kvtune.fused import FusedRows, serves
from kvtune.fused_tiers import make_tiers
from kvtune.pages import MakeSite
from kvtune.policy import Policy
from kvtune.rows import Rows
from kvtune.tiers import Tiers
from kvtune.view import Observed, Spot


class Group(NamedTuple):
    """Batch rows that are stored together; plain `Rows` have the same padding."""

    members: list[int]
    pads: list[int]  # padding tokens on the left of each
    rows: Rows | FusedRows | Tiers


class Shared:
    """What the layers of one cache share: the kernels' workspace, the padding read last, what
    selectors may know of their place, and how a prompt is to be taken.

    Of a prompt the last `ahead` tokens are only looked at; while `waits` is set it stays whole
    until `CompressedLayer.settle_prompt`; `kinds` [B, T], padding included, marks tokens that go
    before others.
    """

    def __init__(self, spots: Mapping[int, Spot] = MappingProxyType({})) -> None:
        self.workspace = Workspace()
        self.ahead, self.waits = 0, False
        self.kinds: Tensor | None = None
        self._spots = spots
        self._mask: weakref.ref[Tensor] | None = None
        self._pads: list[int] | None = None

    def paddings(self, mask: Tensor | None, batch: int) -> list[int] | None:
        """As `paddings`; a model hands the same mask to all its layers, which is read once."""
        if mask is None or self._mask is None or self._mask() is not mask:
            self._pads = paddings(mask, batch)
            self._mask = None if mask is None else weakref.ref(mask)
        return self._pads

    def spot(self, layer: int) -> Spot:
        """What selectors may know of their place in a layer."""
        return self._spots.get(layer) or Spot(layer)


class CompressedLayer(CacheLayerMixin):
    """`update` hands out a Reading; the attention function
    answers queries through it, then settles the window.

    Every row is stored from its own true position 0, so that a group of values never holds padding
    and a padded row is stored as the same row alone would be. Where kernels run, all rows are kept
    together; elsewhere rows of different padding are kept apart.
    """

    is_sliding = False
    is_croppable = False  # pages cannot be taken back; `crop` works within the exact window only

    def __init__(
        self, policy: Policy, sites: tuple[MakeSite, MakeSite], shared: Shared | None = None
    ) -> None:
        super().__init__()
        self.policy = policy
        self.seen = 0  # tokens, padding included
        self.heads: tuple[tuple[int, ...], int] | None = None  # own kv heads, of so many
        self._groups: list[Group] = []
        self._sites, self._shared = sites, shared or Shared()
        self._incoming: tuple[Tensor, Tensor] | None = None

    @property
    def groups(self) -> list[Group]:
        """Batch rows that are stored together."""
        return self._groups

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Notes dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Reading, Reading]:
        """Takes keys and values [B, H, n, D]; returns a Reading in place of both."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._incoming = (key_states, value_states)
        self.seen += key_states.shape[-2]
        return Reading(self), Reading(self)

    def attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Answers query [B, Hq, n, D] over all tokens so far, under
        transformers' mask (None or [B, 1, n, T])."""
        # kernels start on the current device, whichever their tensors live on
        with torch.cuda.device_of(query):
            return self._attend(query, mask, scale, softcap)

    def _attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        opens = not self.groups
        keys, values = self._admitted(mask)
        try:
            return self._read(query, keys, values, scale, softcap)
        finally:
            if opens and self.policy.select is not None:
                self.seen -= self._shared.ahead

    def _read(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        first = self.groups[0]
        if len(self.groups) == 1 and (first.rows.ragged or first.pads[0] == 0):
            return first.rows.attend(query, keys, values, scale, softcap)
        out = torch.zeros_like(query)
        for members, own, rows in self.groups:
            skip = max(0, own[0] - (self.seen - keys.shape[2]))
            q, k, v = (x[members][:, :, skip:] for x in (query, keys, values))
            out[members, :, skip:] = rows.attend(q, k, v, scale, softcap)
        return out

    def _admitted(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The keys and values [B, H, n, D] that `update` took, for rows that are there."""
        assert self._incoming is not None, "attend follows update"
        (keys, values), self._incoming = self._incoming, None
        pads = self._shared.paddings(mask, keys.shape[0])
        if not self.groups:
            self._open(pads, keys)
        elif (pads or [0] * keys.shape[0]) != self._pads():
            raise UnsupportedError(
                "The padding of a row changed while its cache was in use.", "Use a fresh cache."
            )
        return keys, values

    def fill(self, keys: Tensor, values: Tensor, observed: Observed | None = None) -> None:
        """Takes an unpadded context [B, H, T, D] that was computed densely, as a prompt's forward
        would leave it, with what a selector needs to know of it."""
        self.begin(keys)
        with torch.cuda.device_of(keys):
            self._open(None, keys)
            rows = self.groups[0].rows
            if isinstance(rows, Tiers):
                rows.fill(keys, values, observed or Observed())
            else:
                rows.fill(keys, values)

    def prompt(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] of an unpadded context, as they are read next: all exact
        while it waits."""
        return self.groups[0].rows.read(self.dtype)

    def settle_prompt(self, scores: Tensor | None) -> None:
        """Lets a prompt that has waited compete: by scores [B, H, T] of a replay, padding included,
        where a selector needs one."""
        for members, pads, rows in self.groups:
            assert isinstance(rows, Tiers), "only layers that select tokens wait"
            rows.decide(None if scores is None else scores[members][:, :, pads[0] :])

    def begin(self, keys: Tensor) -> None:
        """Notes the dtype, device and length of a context [B, H, T, D] that is about to be held."""
        self.lazy_initialization(keys, keys)
        self.seen = keys.shape[2]

    def hold(self, keys: Tensor, rows: Rows | FusedRows | Tiers) -> None:
        """Takes rows that hold an unpadded context, whose keys [B, H, T, D] are given, already."""
        self.begin(keys)
        batch = keys.shape[0]
        self._groups = [Group(list(range(batch)), [0] * batch, rows)]

    def fork(self) -> CompressedLayer:
        """A copy-on-write twin."""
        twin = CompressedLayer(self.policy, self._sites, self._shared)
        self._hand_over(twin)
        return twin

    def _hand_over(self, twin: CompressedLayer) -> None:
        twin._groups = [Group(members, pads, rows.fork()) for members, pads, rows in self._groups]
        twin.seen, twin.is_initialized, twin.heads = self.seen, self.is_initialized, self.heads
        if self.is_initialized:
            twin.dtype, twin.device = self.dtype, self.device

    @property
    def side_bytes(self) -> tuple[int, int]:
        """Bytes that the allocator holds for keys, and for values."""
        held = [group.rows.nbytes for group in self.groups]
        return sum(keys for keys, _ in held), sum(values for _, values in held)

    @property
    def nbytes(self) -> int:
        """Bytes that the allocator holds for this layer."""
        return sum(self.side_bytes)

    @property
    def exact(self) -> int:
        """How many of the last tokens are exact in every row."""
        return min((group.rows.exact for group in self.groups), default=0)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: the next token's place in the padded batch."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask, which spans all tokens
        whether they are still stored exactly or not."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.seen, self._groups, self._incoming, self.is_initialized = 0, [], None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens (given as a negative number)
        while they are in the exact window."""
        if tokens_to_remove > 0:
            raise UnsupportedError(
                "crop takes the number of tokens to remove as a negative number."
            )
        if tokens_to_remove == 0 or not self.groups:
            return
        # the row with the shortest window first: a refused crop takes nothing
        for group in sorted(self.groups, key=lambda group: group.rows.exact):
            group.rows.crop(-tokens_to_remove)
        self.seen += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        batch = sum(len(group.members) for group in self.groups)
        self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Batch row i becomes the old row indices[i]."""
        wanted = indices.tolist()
        moved = []
        for members, pads, rows in self.groups:
            place = {row: local for local, row in enumerate(members)}
            new = [i for i, row in enumerate(wanted) if row in place]
            if new:
                local = [place[wanted[i]] for i in new]
                chosen = rows.select(torch.tensor(local, device=self.device))
                moved.append(Group(new, [pads[i] for i in local], chosen))
        self._groups = moved

    def offload(self) -> NoReturn:
        """Refused: where a tier lives is the recipe's to say."""
        raise UnsupportedError("Compressed layers do not support transformers' cache offloading.")

    def prefetch(self) -> NoReturn:
        """Refused, as `offload`."""
        self.offload()

    def _open(self, pads: list[int] | None, keys: Tensor) -> None:
        batch, length = keys.shape[0], keys.shape[2]
        pads = pads or [0] * batch
        if max(pads) >= length:
            raise UnsupportedError(
                f"A row of the first {length} tokens is all padding.",
                "Prefill in larger chunks, or pad less.",
            )
        if self._fuses(keys):
            rows = FusedRows(self.policy, pads, self._shared.workspace, self._sites)
            self._groups.append(Group(list(range(batch)), pads, rows))
            return
        for pad in sorted(set(pads)):
            members = [row for row, own in enumerate(pads) if own == pad]
            own = [pad] * len(members)
            self._groups.append(Group(members, own, self._rows(members, pad, keys)))

    def _fuses(self, keys: Tensor) -> bool:
        """Whether kernels store and read all rows together."""
        return self.policy.select is None and serves(self.policy, keys)

    def _rows(self, members: list[int], pad: int, keys: Tensor) -> Rows | Tiers:
        """Empty rows with so much padding, for tokens as `keys` [B, H, T, D]."""
        if self.policy.select is None:
            return Rows(self.policy, self._sites)
        layer = self._sites[0](torch.arange(0), torch.float32).layer
        spot = self._shared.spot(layer)
        spot = spot.of_heads(*self.heads) if self.heads else spot
        tiers = make_tiers(self.policy, self._sites, spot, self._shared.workspace, keys)
        tiers.ahead, tiers.waits = self._shared.ahead, self._shared.waits
        if self._shared.kinds is not None:
            tiers.kinds = self._shared.kinds[members][:, pad:]
        return tiers

    def _pads(self) -> list[int]:
        by_row = {
            row: pad
            for group in self.groups
            for row, pad in zip(group.members, group.pads, strict=True)
        }
        return [by_row[row] for row in sorted(by_row)]


def paddings(mask: Tensor | None, batch: int) -> list[int] | None:
    """Reads each row's left padding off a boolean causal mask [B, 1, n, T]; None without a mask.

    Raises:
        UnsupportedError: any other mask, such as an additive, a bidirectional or a packed one.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.ndim != 4:
        raise UnsupportedError(
            "Compressed layers take a padding mask [B, T], not a custom 4-D mask."
        )
    pads = (~mask[:, 0, -1]).int().cumprod(-1).sum(-1)
    count, length = mask.shape[2], mask.shape[3]
    tokens = torch.arange(length, device=mask.device)
    causal = tokens <= tokens[length - count :, None]
    if not torch.equal(mask[:, 0], causal & (tokens >= pads[:, None, None])):
        raise UnsupportedError(
            "The mask is not causal with left padding only, so compressed layers cannot serve it."
        )
    found = pads.tolist()
    return found if len(found) == batch else found * batch
