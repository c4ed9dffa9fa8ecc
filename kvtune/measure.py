"""Measuring: a recipe's divergence from the dense model,
from the bank, through the runtime that ships."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from kvtune_kernels import implementation
from torch import Tensor
from torch.nn.functional import kl_div
from transformers.cache_utils import Cache

from kvtune.bank import Bank
from kvtune.cache import CompressedCache
from kvtune.chains import Chain
from kvtune.errors import ResourceError
from kvtune.fitted import sites
from kvtune.fused import FusedRows, serves
from kvtune.heads import HeadedLayer, make_layer, observed_by, picked
from kvtune.layer import CompressedLayer, Shared
from kvtune.pages import MakeSite, narrowed
from kvtune.policy import Policy
from kvtune.rope import Rope
from kvtune.rows import Rows, Side
from kvtune.sharing import Unit, owners, pieces, units
from kvtune.spots import outputs
from kvtune.tiers import Tiers
from kvtune.units import forked, make_unit
from kvtune.view import Spot

MEMO_BYTES = 400 << 20
Fit = Callable[[int, Policy], Mapping[str, Tensor]]  # layer, policy -> the tensors that it reads


@dataclass(frozen=True)
class Together:
    """Layers that share."""

    layers: list[CompressedLayer]

    @property
    def nbytes(self) -> tuple[int, ...]:
        """Bytes held in each."""
        return tuple(layer.nbytes for layer in self.layers)


# what is memoised: a side of some heads; both where they lie so; all layers of a unit
Held = Side | FusedRows | Tiers | Together


@dataclass(frozen=True, eq=False)
class Quality:
    """How far a compressed model is from the dense one, per position [N, M]."""

    kl: Tensor  # KL(dense || compressed), nats
    flips: Tensor  # 1 where the argmax changed
    dnll: Tensor  # nats more for the true next token

    def means(self) -> dict[str, float]:
        """Means over all positions."""
        return {
            name: float(getattr(self, name).double().mean()) for name in ("kl", "flips", "dnll")
        }

    @classmethod
    def joined(cls, parts: Sequence[Quality]) -> Quality:
        """Sequences measured apart, in their order."""
        return cls(*(torch.cat(column) for column in zip(*map(_columns, parts), strict=True)))


def compare(dense: Tensor | Sequence[Tensor], logits: Tensor, targets: Tensor) -> Quality:
    """Compares dense log-probabilities [N, M, V] with logits
    [N, M, V]; one sequence at a time bounds memory."""
    rows = [_compare_row(*row) for row in zip(dense, logits, targets, strict=True)]
    return Quality(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _columns(quality: Quality) -> tuple[Tensor, Tensor, Tensor]:
    return quality.kl, quality.flips, quality.dnll


def _compare_row(dense: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.to(dense.device)  # a spread model may answer on its last device
    logp = logits.float().log_softmax(-1)
    kl = kl_div(logp, dense, reduction="none", log_target=True).sum(-1)
    flips = (dense.argmax(-1) != logits.argmax(-1)).float()
    dnll = (dense - logp).gather(-1, targets[:, None])[:, 0]
    return kl.cpu(), flips.cpu(), dnll.cpu()


class Bench:
    """A model and its bank, on which policies are measured.

    Encoded keys and values are memoised apart, by what decides their bytes, so that a search that
    changes one side of a layer encodes that side alone.
    """

    def __init__(
        self,
        model: Any,
        bank: Bank,
        ropes: dict[int, Rope] | None = None,
        fit: Fit | None = None,
    ) -> None:
        self.model, self.bank, self._ropes, self._fit = model, bank, ropes or {}, fit
        self._memo: OrderedDict[tuple[Any, ...], Held] = OrderedDict()
        self._held = 0

    def measure(
        self, policies: tuple[Policy, ...], memo: bool = True, rows: range | None = None
    ) -> Quality:
        """Runs the continuation teacher-forced in one forward on contexts stored under policies:
        of all sequences, or of some.

        Without `memo` nothing is kept for a later call: right for policies that come only once.
        When memory runs out the sequences are halved.

        Raises:
            ResourceError: one sequence alone does not fit.
        """
        return self._measured(policies, list(rows or range(self.bank.tokens.shape[0])), memo)

    def _measured(self, policies: tuple[Policy, ...], rows: list[int], memo: bool) -> Quality:
        try:
            return self._forward(policies, rows, memo)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                hint = "Give a smaller --context, or --device cpu."
                raise ResourceError("One sequence does not fit into memory.", hint) from None
        half = len(rows) // 2  # out here the failed forward's tensors are free again
        parts = [self._measured(policies, part, memo) for part in (rows[:half], rows[half:])]
        return Quality.joined(parts)

    @torch.no_grad()
    @implementation("reference")
    def _forward(self, policies: tuple[Policy, ...], rows: list[int], memo: bool) -> Quality:
        # In plain torch on any device: a trial asks a few questions of codes that no other trial
        # has, and a compiler would take longer than the answers. Proofs run the kernels.
        bank = self.bank
        cache = Cache(layers=self._layers(policies, rows, memo))
        cut = bank.inputs[rows].split(pieces(policies, bank.context, bank.continuation), 1)
        found = [self.model(piece, past_key_values=cache).logits for piece in cut]
        logits = torch.cat(found, 1) if len(found) > 1 else found[0]
        return compare([bank.logp[row] for row in rows], logits, bank.targets[rows])

    def cache(self, policies: tuple[Policy, ...]) -> Cache:
        """A cache that holds the contexts, for generation to go on from."""
        rows = list(range(self.bank.tokens.shape[0]))
        return Cache(layers=self._layers(policies, rows, False))

    @property
    def compiles(self) -> bool:
        """Whether generation runs kernels that are compiled at their first launch."""
        return self.bank.tokens.is_cuda

    def warm(self, recipes: Iterable[tuple[Policy, ...]]) -> None:
        """Compiles what generation on a GPU will launch for these recipes, many kernels at once.

        A kernel is compiled for each pair of formats; one by one they would take longer than
        generation does.
        """
        wanted = {(own, i) for recipe in recipes for i, own in enumerate(recipe)}
        first = {own: i for own, i in sorted(wanted, key=lambda pair: -pair[1]) if not own.is_dense}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._launched, first.values(), first.keys()))

    @torch.no_grad()
    def _launched(self, layer: int, policy: Policy) -> None:
        """Encodes the contexts in one layer and answers one token, as generation would."""
        filled = self.filled(layer, policy)
        keys, values, query = (
            x[layer][:, :, :1] for x in (self.bank.keys, self.bank.values, self.bank.queries)
        )
        filled.update(keys, values)
        filled.attend(query, None, None, None)

    def filled(self, layer: int, policy: Policy) -> CompressedLayer:
        """A layer that holds the bank's contexts under a policy."""
        made = self._empty(layer, policy)
        observed = self.bank.observed(layer, policy)
        made.fill(self.bank.keys[layer], self.bank.values[layer], observed)
        return made

    def _layers(self, policies: tuple[Policy, ...], rows: list[int], memo: bool) -> list[Any]:
        known, made = self.bank.facts, dict[int, Any]()
        if owners(policies, known.layers):
            return self._prefilled(policies, rows)
        for unit in units(policies, known.layers):
            if known.layers[unit[0]].reads is not None:
                continue
            alone = len(unit) == 1 and policies[unit[0]].sharer is None
            if alone and (policies[unit[0]].is_dense or not known.handed(unit[0])):
                made[unit[0]] = self._layer(unit[0], policies[unit[0]], rows, memo)
            else:
                made |= zip(unit, self._unit(unit, policies, rows, memo), strict=True)
        # layers that are handed another's keys come last, and have no cache
        return [made[index] for index in sorted(made)]

    @torch.no_grad()
    def _prefilled(self, policies: tuple[Policy, ...], rows: list[int]) -> list[Any]:
        """Layers after a forward over the contexts: where one reads another's cache, what later
        layers are given is not what the dense model gave them."""
        fitted = [dict(self._fit(i, own)) if self._fit else {} for i, own in enumerate(policies)]
        tensors = {name: x for one in fitted for name, x in one.items()}
        cache = CompressedCache(policies, self.model.config, self._ropes, tensors)
        contexts = self.bank.tokens[rows][:, : self.bank.context]
        self.model(contexts, past_key_values=cache, logits_to_keep=1)
        return cache.layers

    def _unit(
        self, unit: Unit, policies: tuple[Policy, ...], rows: list[int], memo: bool
    ) -> list[CompressedLayer]:
        """Layers that share, which hold the contexts."""

        def filled() -> Together:
            made = make_unit(
                unit,
                policies,
                lambda index: self._sites(index, policies[index]),
                handed=self.bank.facts.handed,
            )
            for index, layer in zip(unit, made, strict=True):
                layer.fill(self.bank.keys[index], self.bank.values[index])
            return Together(made)

        key = (unit, tuple(policies[index] for index in unit))
        held = self._kept(key, filled) if memo else filled()
        assert isinstance(held, Together)
        found = forked(held.layers)
        if len(rows) < self.bank.tokens.shape[0]:
            for layer in found:
                layer.batch_select_indices(torch.tensor(rows))
        return found

    def _layer(self, index: int, policy: Policy, rows: list[int], memo: bool) -> Any:
        part = len(rows) < self.bank.tokens.shape[0]
        if policy.is_dense:
            return self.bank.dense_layer(index, rows) if part else self.bank.dense_layer(index)
        layer = self._memoised(index, policy) if memo else self.filled(index, policy)
        if part:
            layer.batch_select_indices(torch.tensor(rows))
        return layer

    def _empty(self, layer: int, policy: Policy) -> CompressedLayer:
        shared = Shared({layer: self._spot(layer, policy)} if policy.select else {})
        return make_layer(policy, self._sites(layer, policy), shared)

    def _spot(self, layer: int, policy: Policy) -> Spot:
        stem = f"layer.{layer}.select."
        fitted = self._fit(layer, policy) if self._fit else {}
        own = {n.removeprefix(stem): x for n, x in fitted.items() if n.startswith(stem)}
        output = self._outputs[layer] if "output" in policy.needs else None
        rope = self._ropes.get(layer)
        return Spot(layer, len(self.bank.facts.layers), own, rope, output)

    @functools.cached_property
    def _outputs(self) -> dict[int, Tensor]:
        return outputs(self.model)

    def _sites(self, layer: int, policy: Policy) -> tuple[MakeSite, MakeSite]:
        tensors = self._fit(layer, policy) if self._fit else {}
        device = self.bank.keys[layer].device
        moved = {name: x.to(device) for name, x in tensors.items()}
        return sites(layer, self._ropes.get(layer), moved)

    def _memoised(self, layer: int, policy: Policy) -> CompressedLayer:
        """As `filled`, from what is memoised: a copy-on-write twin of it."""
        made = self._empty(layer, policy)
        whole = self.bank.keys[layer]
        made.begin(whole)
        every = tuple(range(whole.shape[1]))
        parts = made.parts if isinstance(made, HeadedLayer) else [(every, made)]
        with torch.cuda.device_of(whole):  # where kernels start that encode
            for heads, part in parts:
                part.hold(picked(whole, heads), self._rows(layer, heads, part.policy))
        return made

    def _rows(self, layer: int, heads: tuple[int, ...], policy: Policy) -> Rows | FusedRows | Tiers:
        keys, values = (picked(x[layer], heads) for x in (self.bank.keys, self.bank.values))
        if policy.select is not None or serves(policy, keys):
            whole = self._kept((layer, heads, policy), lambda: self._whole(layer, heads, policy))
            assert isinstance(whole, FusedRows | Tiers)
            return whole.fork()
        own, every = self._sites(layer, policy), tuple(range(self.bank.keys[layer].shape[1]))
        makers = own if heads == every else (narrowed(own[0], heads), narrowed(own[1], heads))
        sides: list[Side] = []
        ends = policy.sinks, policy.due(keys.shape[2])
        for name, x, maker in zip(("keys", "values"), (keys, values), makers, strict=True):
            chain: Chain = getattr(policy, name)
            made = functools.partial(Side.of, x, chain, maker, *ends)
            side = self._kept((layer, heads, name, chain, ends), made)
            assert isinstance(side, Side)
            sides.append(side)
        rows = Rows(policy, makers)
        rows.hold(sides[0], sides[1], keys.shape[2])
        return rows

    def _whole(self, layer: int, heads: tuple[int, ...], policy: Policy) -> FusedRows | Tiers:
        keys, values = (picked(x[layer], heads) for x in (self.bank.keys, self.bank.values))
        made, every = self._empty(layer, policy), self.bank.keys[layer].shape[1]
        observed = self.bank.observed(layer, policy)
        if len(heads) < every:
            made.heads = (heads, every)
            observed = observed and observed_by(observed, heads, every)
        made.fill(keys, values, observed)
        rows = made.groups[0].rows
        assert not isinstance(rows, Rows)
        return rows

    def _kept(self, key: tuple[Any, ...], make: Callable[[], Held]) -> Held:
        """What was made under a key before; the least recently used gives way to new ones."""
        if key not in self._memo:
            self._memo[key] = make()
            self._held += _nbytes(self._memo[key])
            while self._held > MEMO_BYTES and len(self._memo) > 1:
                self._held -= _nbytes(self._memo.popitem(last=False)[1])
        self._memo.move_to_end(key)
        return self._memo[key]


def _nbytes(held: Held) -> int:
    return held.nbytes if isinstance(held, Side) else sum(held.nbytes)
