"""Fit: profile + policies -> the tensors that parts read (rotations, codebooks, channel sets)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtune.allotted import allotted
from kvtune.chains import Chain
from kvtune.errors import IntegrityError
from kvtune.fitted import SELECT
from kvtune.models import Facts, LayerFacts
from kvtune.parts import Codec, Seen, Site
from kvtune.policy import Policy
from kvtune.profile import Profile
from kvtune.recipe import RECIPE_FILE, ArtifactRef, ModelBinding, Recipe, load
from kvtune.retrieval import ROW
from kvtune.space import SIDES, Side
from kvtune.tensors import Artifact

TENSORS_FILE = "kvtune.safetensors"
BEGUN = 8  # beginnings of chains that are kept with what is seen behind them
Tensors = dict[str, Tensor]
Fitted = tuple[Tensors, Seen]


class Fitter:
    """Fits chains to a profile, each once; what it finds depends on profile and settings alone."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._found: dict[tuple[int, Side, Chain], Tensors] = {}
        self._begun: dict[tuple[tuple[int, Side, bool], tuple[Codec, ...]], Fitted] = {}

    def layer(self, layer: int, policy: Policy) -> Tensors:
        """The fitted tensors of a layer, named "layer.3.keys.METHOD.NAME"; axis 0 is the kv heads.

        Where kv heads differ, each has its row from its own chain. Those of a selector are named
        "layer.3.select.METHOD.NAME".
        """
        groups = policy.heads or (None,)
        found: Tensors = {}
        for side in SIDES:
            for group in groups:
                chain: Chain = getattr(policy if group is None else group, side)
                rows = slice(None) if group is None else list(group.heads)
                for name, x in self.chain(layer, side, chain).items():
                    held = found.setdefault(f"layer.{layer}.{side}.{name}", torch.zeros_like(x))
                    held[rows] = x[rows]
            if policy.rest:
                rest = self.chain(layer, side, policy.rest[SIDES.index(side)])
                found |= {f"layer.{layer}.{side}.{name}": x for name, x in rest.items()}
        if policy.select is not None and policy.select.fits:
            stem = f"layer.{layer}.{SELECT}.{policy.select.name()}"
            own = policy.select.fit(Rows(self, layer))
            found |= {f"{stem}.{name}": x for name, x in own.items()}
        return found

    def chain(self, layer: int, side: Side, chain: Chain) -> Tensors:
        """The fitted tensors of one chain, named "METHOD.NAME".

        Raises:
            IntegrityError: the profile lacks what a fit needs, or holds no such layer.
        """
        if not any(codec.fits for codec in chain.codecs):
            return {}
        key = (layer, side, chain)
        if key not in self._found:
            self._found[key] = self.around(layer, side, chain.codecs, {})
        return self._found[key]

    def around(
        self, layer: int, side: Side, codecs: Sequence[Codec], held: Mapping[str, Tensor]
    ) -> Tensors:
        """As `chain`, around tensors "METHOD.NAME" that are there already, from training say."""
        turned = any("rope" in codec.needs for codec in codecs)
        place = (layer, side, turned)
        if not held and codecs:
            found, seen = self._behind(place, tuple(codecs[:-1]))
            return {**found, **_fitted(codecs[-1], seen)}
        seen, known = self.seen(layer, side, pre_rope=turned), Tensors()
        for index, codec in enumerate(codecs):
            own = _fitted(codec, seen)
            known |= {name: held.get(name, x) for name, x in own.items()}
            if index < len(codecs) - 1:
                seen = codec.behind(seen, _nowhere(place, known))
        return known

    def _behind(self, place: tuple[int, Side, bool], before: tuple[Codec, ...]) -> Fitted:
        """What codecs are fitted to, and what one behind them sees; of the last few asked for,
        since chains that differ in their bits begin alike."""
        key = (place, before)
        if key not in self._begun:
            if before:
                found, seen = self._behind(place, before[:-1])
                found = {**found, **_fitted(before[-1], seen)}
                made = found, before[-1].behind(seen, _nowhere(place, found))
            else:
                made = Tensors(), self.seen(*place[:2], pre_rope=place[2])
            self._begun[key] = made
            if len(self._begun) > BEGUN:
                del self._begun[next(iter(self._begun))]
        return self._begun[key]

    def seen(self, layer: int, side: Side, pre_rope: bool = False) -> Seen:
        """What calibration saw of a side of a layer: of keys as they are cached, or before RoPE."""
        stem = "" if pre_rope or side == "values" or not self._cached else "cached."
        mean, second = (self.row(layer, f"{stem}{name}.{side}") for name in ("means", "moments"))
        reads = "outputs" if side == "values" else "queries"
        read = self.row(layer, f"{'' if side == 'values' else stem}moments.{reads}")
        facing = pre_rope and self._cached
        weight = "facing.queries" if facing else f"{stem}moments.queries"
        return Seen(
            mean,
            second - mean[:, :, None] * mean[:, None],
            self.row(layer, "moments.pulls" if side == "values" else weight),
            self.row(layer, f"{stem}samples.{side}"),
            read,
            self.row(layer, f"{'' if side == 'values' else stem}samples.{reads}"),
            side == "keys",
            self._together(layer, side, mean) if pre_rope or side == "values" else None,
        )

    def _together(self, layer: int, side: Side, mean: Tensor) -> Tensor | None:
        name = f"joint.{side}"
        if name not in self._profile.tensors:
            return None  # an older profile, or heads too many to hold
        flat = mean.flatten()
        return self.row(layer, name) - flat[:, None] * flat

    def rows(self, name: str, layers: Sequence[int]) -> Tensor:
        """As `row`, of some layers in their order."""
        return torch.stack([self.row(layer, name) for layer in layers])

    @property
    def names(self) -> tuple[str, ...]:
        """What the profile holds of each layer."""
        return tuple(name for name in self._profile.tensors if "." in name)

    @property
    def _cached(self) -> bool:
        return "cached.moments.keys" in self._profile.tensors

    def row(self, layer: int, name: str) -> Tensor:
        """What the profile holds of a layer, in float64.

        Raises:
            IntegrityError: nothing of that name, or of that layer.
        """
        layers = self._profile.meta.get("layers")
        again = f"Run: kvtune calibrate MODEL{' --heads' if name == ROW else ''}"
        if name not in self._profile.tensors or not isinstance(layers, list):
            raise IntegrityError(f"The profile lacks {name}, which a fit needs.", again)
        if layer not in layers:
            raise IntegrityError(f"The profile knows no layer {layer}.", again)
        return self._profile.tensors[name][layers.index(layer)].double()


class Rows(Mapping[str, Tensor]):
    """What a profile holds of one layer, by name: what a selector's `fit` finds its tensors from.

    A row that is not there is an IntegrityError, which names the run that makes it.
    """

    def __init__(self, fitter: Fitter, layer: int) -> None:
        self._fitter, self._layer = fitter, layer

    def __getitem__(self, name: str) -> Tensor:
        return self._fitter.row(self._layer, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fitter.names)

    def __len__(self) -> int:
        return len(self._fitter.names)


def _fitted(codec: Codec, seen: Seen) -> Tensors:
    return {f"{codec.name()}.{name}": x for name, x in codec.fit(seen).items()}


def _nowhere(place: tuple[int, Side, bool], found: Tensors) -> Site:
    return Site(*place[:2], torch.arange(0), torch.float32, None, found)


def fitted(policies: Sequence[Policy], fitter: Fitter) -> Tensors:
    """The tensors of a whole recipe; none when no codec of it is fitted."""
    found: Tensors = {}
    for layer, policy in enumerate(policies):
        found |= fitter.layer(layer, policy)
    return found


def ship(recipe: Recipe, tensors: Tensors, path: Path) -> Recipe:
    """Writes a recipe to a file, and its fitted tensors beside it; returns it with their hash."""
    if tensors:
        beside = path.with_name(
            TENSORS_FILE if path.name == RECIPE_FILE else f"{path.stem}.safetensors"
        )
        sha256 = Artifact(tensors).save(beside)  # tensors first, the recipe last
        recipe = recipe.model_copy(
            update={"artifact": ArtifactRef(file=beside.name, sha256=sha256)}
        )
    recipe.save(path)
    return recipe


def copy(source: Path, target: Path) -> None:
    """Copies a recipe and its tensors."""
    recipe = load(source)
    tensors: Tensors = {}
    if recipe.artifact:
        beside = source.with_name(recipe.artifact.file)
        tensors = Artifact.load(beside, recipe.artifact.sha256).tensors
    ship(recipe, tensors, target)


def fit(recipe: Recipe, profile: Profile) -> tuple[Recipe, Tensors]:
    """Returns a recipe bound to the profile's model, with every shared budget written out, and the
    tensors that its parts read.

    Raises:
        IntegrityError: the profile lacks what a fit needs, or the recipe is of another model.
        UsageError: a template, or settings that do not fit the model.
    """
    known = known_by(profile)
    found = str(profile.meta["fingerprint"])
    if recipe.model and recipe.model.fingerprint != found:
        raise IntegrityError(
            f"The recipe was tuned for {recipe.model.name}; the profile is of another model "
            f"({found[:19]}...).",
            "Calibrate that model: kvtune calibrate MODEL",
        )
    first = known.layers[known.compressible()[0]]
    bound = recipe.model or ModelBinding(
        name=str(profile.meta.get("model", "")),
        fingerprint=found,
        architecture=known.architecture,
        layers=len(known.layers),
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
    )
    fitter = Fitter(profile)
    entries = allotted(recipe.layers, known, fitter.rows)
    recipe = recipe.model_copy(update={"model": bound, "layers": entries})
    return recipe, fitted(recipe.policies(known), fitter)


def known_by(profile: Profile) -> Facts:
    """What the profile says of its model."""
    found: Any = profile.meta.get("facts")
    if not isinstance(found, dict):
        raise IntegrityError("The profile lacks its model's facts.", "Run: kvtune calibrate MODEL")
    layers = tuple(LayerFacts(**layer) for layer in found["layers"])
    return Facts(**{**found, "layers": layers})
