"""Laws of fits: what a profile gives codecs to read, how it is shipped, that bases are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_fits import fits_of, seen_by
from torch import Tensor

from kvtune import fit, parts
from kvtune import recipe as recipes
from kvtune.cache import fitted_bytes, load, weigh
from kvtune.chains import Chain
from kvtune.errors import IntegrityError
from kvtune.files import sha256
from kvtune.fit import Fitter
from kvtune.fitted import blanks
from kvtune.models import facts, fingerprint
from kvtune.parts import Site
from kvtune.policy import Policy
from kvtune.profile import Profile

KLT = ({"use": "klt"}, {"use": "waterfill", "bits": 2.0, "group": 64})
CHAINS = {
    "klt": KLT,
    "pre-rope": ({"use": "derope"}, *KLT),
    "centred-codebook": ({"use": "centre"}, {"use": "codebook", "axis": "channel", "group": 64}),
    "promoted": ({"use": "promote", "share": 0.5},),
    "rotated": ({"use": "rotate"}, {"use": "normal", "bits": 2}),
}


def chain(*tables: dict[str, Any]) -> Chain:
    return Chain(tuple(parts.parse(table) for table in tables))  # type: ignore[misc]


@pytest.fixture
def profile(llama: Any) -> Profile:
    """What calibration saw of the tiny Llama."""
    seen = seen_by(llama)
    known = facts(llama.config)
    layers = [vars(layer) for layer in known.layers]
    told = {**vars(known), "layers": layers}
    meta = {**seen.meta, "facts": told, "fingerprint": fingerprint(llama), "model": "tiny"}
    return Profile(seen.cells, seen.tensors, meta)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_fit_finds_exactly_what_was_foretold(name: str, side: Any, profile: Profile) -> None:
    found_chain = chain(*CHAINS[name])
    if "rope" in found_chain.needs and side == "values":
        return
    found = Fitter(profile).chain(1, side, found_chain)
    blank = found_chain.blanks(2, 64)
    assert found.keys() == blank.keys()
    for key, x in found.items():
        assert (x.shape, x.dtype) == (blank[key].shape, blank[key].dtype)


def test_equal_chains_are_fitted_once_and_alike(profile: Profile) -> None:
    fitter, other = Fitter(profile), Fitter(profile)
    first = fitter.chain(0, "keys", chain(*KLT))
    assert fitter.chain(0, "keys", chain(*KLT)) is first
    again = other.chain(0, "keys", chain(*KLT))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_each_head_has_the_row_of_its_own_chain(profile: Profile) -> None:
    few, many = (chain(KLT[0], {**KLT[1], "bits": bits}) for bits in (1.0, 3.0))
    fitter = Fitter(profile)
    found = fitter.layer(2, Policy.by_head(0, 0, [(few, Chain()), (many, Chain())]))
    planes = found["layer.2.keys.waterfill.planes"]
    assert planes.sum(1).tolist() == [32, 96]
    alone = fitter.chain(2, "keys", few)["waterfill.planes"]
    assert torch.equal(planes[0], alone[0])


def test_planes_go_where_errors_weigh_most(profile: Profile) -> None:
    """Behind klt the channels fall, so planes never rise from one channel to the next."""
    planes = Fitter(profile).chain(0, "keys", chain(*KLT))["waterfill.planes"].int()
    assert planes.sum(1).tolist() == [64, 64]
    assert (planes.diff(dim=1) <= 0).all()


def test_klt_makes_channels_uncorrelated(profile: Profile) -> None:
    fitter = Fitter(profile)
    seen = fitter.seen(1, "keys")
    found = fitter.chain(1, "keys", chain({"use": "klt"}, {"use": "affine"}))
    codec: Any = parts.parse({"use": "klt"})
    site = Site(1, "keys", torch.arange(0), torch.float32, None, found)
    behind = seen.behind(codec.fold(site, 2, 64))
    diagonal = behind.covariance.diagonal(dim1=1, dim2=2)
    rest = behind.covariance - torch.diag_embed(diagonal)
    assert rest.abs().max() < 0.02 * diagonal.max()
    assert behind.mean.abs().max() < 0.01 * seen.mean.abs().max()


@pytest.mark.parametrize("name", CHAINS)
def test_what_a_fit_weighs_is_counted_once_whatever_the_batch(name: str, llama: Any) -> None:
    known, keys = facts(llama.config), chain(*CHAINS[name])
    policies = (Policy(keys=keys),) * len(known.layers)
    one, many = (weigh(policies, known, 4096, batch).bytes for batch in (1, 5))
    fixed = sum(
        x.nbytes for i in range(len(policies)) for x in blanks(i, policies[i], 2, 64).values()
    )
    assert fixed == len(policies) * sum(fitted_bytes(policies[0], 2, 64)) > 0
    assert many - fixed == 5 * (one - fixed)


@pytest.mark.parametrize("file", ["recipe.toml", "front/03.toml"])
def test_a_shipped_fit_is_read_back_and_bound(
    file: str, llama: Any, profile: Profile, recipe_of: Any, tmp_path: Path
) -> None:
    bound, tensors = fit.fit(recipe_of("klt-k2"), profile)
    path = tmp_path / file
    (tmp_path / "front").mkdir()
    written = fit.ship(bound, tensors, path)
    assert written.artifact and written.artifact.sha256 == sha256(
        path.with_name(written.artifact.file)
    )
    cache = load(path, llama)
    plain = load(recipe_of("klt-k2"), llama, tensors=fits_of(recipe_of("klt-k2"), llama))
    assert cache.nbytes == plain.nbytes
    other = tmp_path / "other" / "recipe.toml"
    other.parent.mkdir()
    fit.copy(path, other)
    assert recipes.load(other).artifact == written.artifact.model_copy(
        update={"file": fit.TENSORS_FILE}
    )
    assert load(other.parent, llama).get_seq_length() == 0


def test_a_recipe_without_its_fit_is_refused_with_the_cure(llama: Any, recipe_of: Any) -> None:
    with pytest.raises(IntegrityError, match="kvtune fit") as refused:
        load(recipe_of("klt-k2"), llama)
    assert "lacks its fitted tensors" in str(refused.value)


def corrupted(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    name = next(iter(tensors))
    changed = {
        "more": {"layer.0.keys.klt.other": torch.zeros(2)},
        "wider": {name: tensors[name][:, :-1]},
        "other dtype": {name: tensors[name].float()},
    }
    return {**tensors, **changed[how]}


@pytest.mark.parametrize("how", ["more", "wider", "other dtype"])
def test_tensors_that_do_not_fit_are_refused(how: str, llama: Any, recipe_of: Any) -> None:
    recipe = recipe_of("klt-k2")
    with pytest.raises(IntegrityError, match="tensor"):
        load(recipe, llama, tensors=corrupted(fits_of(recipe, llama), how))


@pytest.mark.parametrize("lost", ["cached.moments.keys", "moments.pulls", "samples.values"])
def test_a_profile_that_lacks_what_a_fit_needs_says_so(lost: str, profile: Profile) -> None:
    tensors = {name: x for name, x in profile.tensors.items() if name != lost}
    fitter = Fitter(Profile((), tensors, profile.meta))
    if lost.startswith("cached"):  # taken for a model whose keys cannot be turned back
        assert fitter.seen(0, "keys")
        return
    with pytest.raises(IntegrityError, match="kvtune calibrate"):
        fitter.chain(0, "values", chain({"use": "rotate"}, {"use": "normal"}))


def test_another_models_profile_is_refused(profile: Profile, recipe_of: Any) -> None:
    bound, _ = fit.fit(recipe_of("klt-k2"), profile)
    stranger = Profile((), profile.tensors, {**profile.meta, "fingerprint": "sha256:" + 64 * "0"})
    with pytest.raises(IntegrityError, match="another model"):
        fit.fit(bound, stranger)
