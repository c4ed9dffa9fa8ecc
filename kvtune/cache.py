"""CompressedCache and load(): a recipe and a model become a
transformers cache; and what a recipe weighs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvtune import recipe as recipes
from kvtune.attention import NAME
from kvtune.errors import IntegrityError
from kvtune.fitted import blanks, check, sites
from kvtune.layer import CompressedLayer, Shared
from kvtune.models import Facts, LayerFacts, facts, fingerprint, places, ropes
from kvtune.pages import MakeSite
from kvtune.placement import input_device
from kvtune.policy import Policy
from kvtune.recipe import Recipe
from kvtune.rope import Rope
from kvtune.sharing import units
from kvtune.shortening import Shortener
from kvtune.spots import spots
from kvtune.tensors import Artifact
from kvtune.units import make_unit
from kvtune.view import Observed, Spot


class CompressedCache(Cache):
    """A cache of compressed layers; layers without codecs, and
    sliding layers, stay transformers' own.

    Pass it to `model.generate(..., past_key_values=cache)`. One cache serves one call; `fresh()`
    gives the next one.
    """

    layers: list[Any]

    def __init__(
        self,
        policies: tuple[Policy, ...],
        config: Any,
        rope: Mapping[int, Rope],
        tensors: Mapping[str, Tensor],
        spots: Mapping[int, Spot] = MappingProxyType({}),
    ) -> None:
        layers = list(DynamicCache(config=config).layers)
        self.shared = Shared(spots)
        known = facts(config)

        def places(index: int) -> tuple[MakeSite, MakeSite]:
            return sites(index, rope.get(index), tensors)

        for unit in units(policies, known.layers):
            if all(policies[index].is_dense for index in unit):
                continue
            made = make_unit(unit, policies, places, self.shared, known.handed)
            for index, layer in zip(unit, made, strict=True):
                layers[index] = layer
        super().__init__(layers=layers)
        self.policies = policies
        self.shortener: Shortener | None = None  # what cuts a prompt before it is read
        self._made_of = (policies, config, rope, tensors, spots)

    def fresh(self) -> CompressedCache:
        """An empty cache of the same recipe and model."""
        made = CompressedCache(*self._made_of)
        made.shortener = self.shortener
        return made

    def reset(self) -> None:
        """Forgets everything; older transformers only zero their own layers."""
        fresh = self.fresh()
        self.layers, self.shared = fresh.layers, fresh.shared

    @property
    def nbytes(self) -> int:
        """Bytes that the allocator holds: codes, scales, zeros, sinks, windows, slack and fitted
        tensors, in all layers, and tables by which several layers turn keys."""
        fitted = sum(x.untyped_storage().nbytes() for x in self._made_of[3].values())
        turns = sum(rope.nbytes for rope in set(self._made_of[2].values()))
        return sum(_nbytes(layer) for layer in self.layers) + fitted + turns


def _nbytes(layer: Any) -> int:
    if isinstance(layer, CompressedLayer):
        return layer.nbytes
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(tensor.untyped_storage().nbytes() for tensor in held if isinstance(tensor, Tensor))


def load(
    recipe: Recipe | Path | str,
    model: Any,
    force: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
) -> CompressedCache:
    """Returns an empty cache that applies a recipe (a Recipe, or a path) to a transformers model.

    `tensors` are those that `fit` found, for a recipe that has no file of them beside it.

    Switches the model's attention to "kvtune" when a layer is compressed; other caches then work as
    before.

    Raises:
        IntegrityError: the recipe was tuned for another model (unless forced), or its tensors were
        changed.
        UsageError: settings that do not fit the model.
        UnsupportedError: the model cannot be compressed.
    """
    read = recipe if isinstance(recipe, Recipe) else recipes.load(Path(recipe))
    policies, placed = resolved(recipe, model, force, tensors)
    needs_rope = any("rope" in policy.needs for policy in policies)
    turns = ropes(model) if needs_rope else {}
    found = spots(model, policies, turns, placed)
    cache = CompressedCache(policies, model.config, turns, placed, found)
    cache.shortener = read.shortener
    if not all(policy.is_dense for policy in policies):
        model.set_attn_implementation(NAME)
    return cache


def resolved(
    recipe: Recipe | Path | str,
    model: Any,
    force: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
) -> tuple[tuple[Policy, ...], Mapping[str, Tensor]]:
    """One policy for each layer of a model, and the tensors that a recipe's codecs read, checked.

    Raises:
        IntegrityError, UsageError: see `load`.
    """
    folder = None
    if not isinstance(recipe, Recipe):
        path = Path(recipe)
        recipe, folder = recipes.load(path), path if path.is_dir() else path.parent
    check_model(recipe, model, force)
    known = facts(model.config)
    policies = recipe.policies(known)
    held = _artifact(recipe, folder) if tensors is None else tensors
    check(held, policies, known)
    return policies, _placed(held, model)


def check_model(recipe: Recipe, model: Any, force: bool = False) -> None:
    """Raises IntegrityError when a recipe is bound to another model, unless forced."""
    if recipe.model is None or force:
        return
    if (found := fingerprint(model)) != recipe.model.fingerprint:
        raise IntegrityError(
            f"The recipe was tuned for {recipe.model.name}, whose fingerprint "
            f"{recipe.model.fingerprint[:19]}... is not this model's ({found[:19]}...).",
            "Tune this model with `kvtune tune`, or pass --force to apply it all the same.",
        )


def _artifact(recipe: Recipe, folder: Path | None) -> Mapping[str, Tensor]:
    if recipe.artifact is None:
        return {}
    if folder is None:
        raise IntegrityError("The recipe has tensors beside it: load it by its path.")
    return Artifact.load(folder / recipe.artifact.file, recipe.artifact.sha256).tensors


def _placed(tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """What belongs to a layer lives where that layer computes."""
    found, first = places(model), input_device(model)
    moved = {}
    for name, tensor in tensors.items():
        layer = re.match(r"layer\.(\d+)\.", name)
        moved[name] = tensor.to(found.get(int(layer[1]), first) if layer else first)
    return moved


class Weight(NamedTuple):
    """What a recipe stores at a context length and batch, to the last scale."""

    bytes: int
    dense_bytes: int  # the model's own 16-bit cache
    payload_bits: float  # mean code bits of the compressible layers, without metadata and windows

    @property
    def ratio(self) -> float:
        """How many times smaller than the 16-bit cache."""
        return self.dense_bytes / self.bytes

    @property
    def bits(self) -> float:
        """True bits per cached value."""
        return 16 * self.bytes / self.dense_bytes


def weigh(policies: tuple[Policy, ...], known: Facts, context: int, batch: int = 1) -> Weight:
    """Counts bytes by running the shipping path on tensors
    without data, so that no formula can drift from it."""
    stored = dense = fixed = 0
    for unit in units(policies, known.layers):
        first, layer = policies[unit[0]], known.layers[unit[0]]
        shape = layer.kv_heads, layer.head_dim
        full = [_full(known.layers[index], context) for index in unit]
        dense += sum(full)
        if first.sharer is not None:
            stored += sum(group_bytes(first, len(unit), *shape, context))
            continue
        # of several layers the first is the owner, and the others store nothing
        own = layer_bytes(first, *shape, context, layer.query_heads)
        stored += full[0] if first.is_dense else sum(own)
        fixed += sum(fitted_bytes(first, *shape, layer.query_heads))
    bits = [policies[i].payload_bits for i in known.compressible()]
    payload = sum(bits) / max(1, len(bits))
    return Weight(stored * batch + fixed, dense * batch, payload)


def _full(layer: LayerFacts, context: int) -> int:
    """Bytes of a layer of the model's own 16-bit cache."""
    if layer.reads is not None:
        return 0
    length = context if layer.window is None else min(context, layer.window - 1)
    return 4 * layer.kv_heads * layer.head_dim * length


@lru_cache(8192)  # layers are alike, and so are most of the policies of a search
def layer_bytes(
    policy: Policy, kv_heads: int, head_dim: int, context: int, query_heads: int = 0
) -> tuple[int, int]:
    """Bytes of a compressed layer's keys, and values, after a prompt of `context` tokens; with as
    many query heads as kv heads, unless more are given: some selectors keep queries."""
    return group_bytes(policy, 1, kv_heads, head_dim, context, query_heads)


@lru_cache(8192)
def group_bytes(
    policy: Policy, layers: int, kv_heads: int, head_dim: int, context: int, query_heads: int = 0
) -> tuple[int, int]:
    """As `layer_bytes`, of so many layers that store together."""
    own = sites(0, _NO_ROPE, blanks(0, policy, kv_heads, head_dim))
    unit = tuple(range(layers))
    made = make_unit(unit, (policy,) * layers, lambda index: own)
    x = torch.empty(1, kv_heads, context, head_dim, dtype=torch.bfloat16, device="meta")
    for layer in made:
        layer.fill(x, x.clone(), _observed(policy, x, query_heads or kv_heads))
    keys, values = zip(*(layer.side_bytes for layer in made), strict=True)
    return sum(keys), sum(values)


def _observed(policy: Policy, x: Tensor, query_heads: int) -> Observed | None:
    """What is known of keys [B, H, T, D] without data where a selector wants it."""
    needs, found = policy.needs, Observed()
    if needs & {"attention", "replay"}:
        found = found._replace(attention=torch.empty(x.shape[:3], device="meta"))
    if "queries" in needs:
        asked = (x.shape[0], query_heads, min(policy.observed, x.shape[2]), x.shape[3])
        found = found._replace(queries=x.new_empty(asked))
    return found


def fitted_bytes(
    policy: Policy, kv_heads: int, head_dim: int, query_heads: int = 0
) -> tuple[int, int]:
    """Bytes of the tensors that a layer's keys, and values, are read with, whatever the batch; what
    a selector reads counts as keys'."""
    found = blanks(0, policy, kv_heads, head_dim, query_heads)
    values = sum(x.nbytes for name, x in found.items() if name.startswith("layer.0.values."))
    return sum(x.nbytes for x in found.values()) - values, values


_NO_ROPE = Rope(torch.nn.Identity())  # on tensors without data a turn only passes the shape on
