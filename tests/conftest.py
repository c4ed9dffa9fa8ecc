"""Tiny random models and recipes by name, and the pairs of both that laws are tried on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

# Without a GPU kernels run in Triton's interpreter, which their decorators ask for when imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import pytest
from recipes_made import MADE, entry
from tiny_fits import cloned, fits_of
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kvtune import parts
from kvtune import recipe as recipes
from kvtune.cache import load
from kvtune.errors import UsageError
from kvtune.models import facts, load_model
from kvtune.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
SLIDING, FULL = "sliding_attention", "full_attention"

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.25,  # large enough that attention is far from uniform
}
# model type, and what it has that the others have not
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 4, "head_dim": 64}),
    "yi": (
        "llama",
        {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "rope_theta": 5e6},
    ),
    "mistral": ("mistral", {"sliding_window": None, "num_attention_heads": 6}),
    "mistral-sliding": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {"head_dim": 32}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "phi3": ("phi3", {}),
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, SLIDING],
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, SLIDING],
            "num_key_value_heads": 1,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
        },
    ),
    "glm4": ("glm4", {"partial_rotary_factor": 0.5}),
}
HANDING: dict[str, Any] = {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": [FULL, SLIDING, FULL, SLIDING, FULL],
    "sliding_window": 24,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": BASE["vocab_size"],
}
# models whose last layers are handed the keys and values of others
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n": ("gemma3n_text", {**HANDING, "laurel_rank": 4, "altup_num_inputs": 2}),
    "gemma4": ("gemma4_text", {**HANDING, "global_head_dim": 32}),
}
COMPRESSIBLE = tuple(name for name in MODELS if name != "mistral-sliding")


def _shipped() -> dict[str, Path]:
    folder = ROOT / "recipes"
    found = [*folder.glob("*.toml"), *folder.glob("*/recipe.toml")]
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


SHIPPED = _shipped()
# presets and tuned recipes are for models of many layers, and what a fit shares out has budgets by
# then only: they have laws of their own; twins of other recipes differ from these in a rank, or in
# how a selector scores, which selectors have laws for
TWINS = (
    "cskv-50.toml",
    "shadowkv-keys.toml",
    *("critical-kv.toml", "defensive-kv.toml", "expected-attention.toml", "h2o.toml"),
    *("keydiff.toml", "lagkv.toml", "pyramidkv.toml", "tova.toml"),
)


def _runs(recipe: Recipe) -> bool:
    """Whether a recipe needs no search and no profile before it is applied, and no more than a
    prompt's own forward."""
    if recipe.is_open() or recipe.prefill:
        return False
    allots = [parts.parse(entry.allot) for entry in recipe.layers if entry.allot]
    selects = [parts.parse(entry.select) for entry in recipe.layers if entry.select]
    fed = any(part.needs & {"replay", "ahead"} for part in selects)
    return not fed and not any(getattr(part, "reads", None) for part in allots)


RUNNABLE = {
    name: path
    for name, path in SHIPPED.items()
    if _runs(recipes.load(path)) and not name.startswith(("kvtuner-", "smollm2-", *TWINS))
}


def made(name: str) -> Recipe:
    """Returns the recipe of a name in MADE."""
    return recipes.loads(f"kvtune = 1\n{MADE[name]}", name)


def config_of(name: str, **changes: Any) -> Any:
    """Returns the config of a tiny model."""
    kind, own = (MODELS | SHARING)[name]
    return CONFIG_MAPPING[kind](**{**BASE, **own, **changes})


@cache
def tiny(name: str) -> Any:
    """Returns the tiny model of a name, float64, random but always the same."""
    return build(config_of(name))


def build(config: Any, seed: int = 0) -> Any:
    """Returns a random float64 model; biases, if there are any, are large."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).double()
    for label, weight in model.named_parameters():
        if label.endswith("proj.bias"):
            torch.nn.init.normal_(weight, std=20.0 if "k_proj" in label else 2.0)
    return model.eval().requires_grad_(False)


@cache
def bearer(recipe_name: str) -> Any:
    """Returns a tiny Llama that a shipped recipe fits: the shape it names, or the smallest."""
    recipe = recipes.load(RUNNABLE[recipe_name])
    bound = recipe.model
    shapes = (
        [(bound.layers, bound.kv_heads, bound.head_dim)]
        if bound
        else [(layers, 2, dim) for dim in (64, 128, 256) for layers in (4, 12, 32, 64)]
    )
    for layers, kv_heads, dim in shapes:
        config = config_of(
            "llama",
            num_hidden_layers=layers,
            num_key_value_heads=kv_heads,
            num_attention_heads=2 * kv_heads,
            head_dim=dim,
        )
        try:
            recipe.policies(facts(config))
        except UsageError:
            continue
        return build(config)
    raise AssertionError(f"{recipe_name} fits no tiny model")


def cases(models: Sequence[str]) -> list[Any]:
    """Returns these models with each recipe made here, and each shipped recipe with its bearer."""
    pairs = [(name, recipe_name) for name in models for recipe_name in MADE]
    pairs += [("", recipe_name) for recipe_name in RUNNABLE]
    return [pytest.param(pair, id="-".join(filter(None, pair))) for pair in pairs]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Spreads `case` over models with recipes, `name` over models, `recipe_name` over recipes."""
    for argument, models in (("case", COMPRESSIBLE), ("llama_case", ("llama",))):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, cases(models), indirect=True)
    given = [str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")]
    for argument, found in (("name", MODELS), ("recipe_name", MADE)):
        if argument in metafunc.fixturenames and argument not in given:
            metafunc.parametrize(argument, list(found))


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny tensors are fastest on one thread; the demo model keeps them all."""
    threads = torch.get_num_threads()
    if "demo" not in request.fixturenames:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """A model, and what makes its empty compressed cache."""
    yield from _case(*request.param)


@pytest.fixture
def llama_case(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """As `case`, for laws that do not ask what kind of model it is."""
    yield from _case(*request.param)


def _case(name: str, recipe_name: str) -> Iterator[tuple[Any, Callable[[], Any]]]:
    if name:
        model, recipe = tiny(name), made(recipe_name)
        tensors = fits_of(recipe, model)
        yield from _guarded(model, lambda: load(recipe, model, tensors=cloned(tensors)))
    else:
        model, recipe = bearer(recipe_name), recipes.load(RUNNABLE[recipe_name])
        tensors = fits_of(recipe, model)
        make = partial(load, recipe, model, force=True)
        yield from _guarded(model, lambda: make(tensors=cloned(tensors)))


def _guarded(model: Any, make: Callable[[], Any]) -> Iterator[tuple[Any, Callable[[], Any]]]:
    own = model.config._attn_implementation
    yield model, make
    model.set_attn_implementation(own)


@pytest.fixture
def model(name: str) -> Iterator[Any]:
    """The tiny model of the test's `name`; its attention is put back afterwards."""
    found = tiny(name)
    own = found.config._attn_implementation
    yield found
    found.set_attn_implementation(own)


@pytest.fixture
def llama() -> Iterator[Any]:
    """A tiny Llama: 4 layers, 4 query heads, 2 kv heads of 64 channels."""
    found = tiny("llama")
    own = found.config._attn_implementation
    yield found
    found.set_attn_implementation(own)


@pytest.fixture(scope="session")
def model_of() -> Callable[..., Any]:
    """Makes a tiny model of a name with changes to its config, and a seed."""
    return lambda name, seed=0, **changes: build(config_of(name, **changes), seed)


@pytest.fixture(scope="session")
def recipe_of() -> Callable[[str], Recipe]:
    """Returns the recipe of a name in the list made here."""
    return made


@pytest.fixture(scope="session")
def written() -> Callable[..., Recipe]:
    """Makes a recipe of one entry: keys, values, sinks, recent, span."""
    return lambda **parts: recipes.loads(f"kvtune = 1\n{entry(**parts)}")


@pytest.fixture(scope="session")
def shipped() -> dict[str, Path]:
    """Every recipe and template in recipes/, by its path there."""
    return SHIPPED


@pytest.fixture(scope="session")
def demo() -> tuple[Any, Any]:
    """The demo model and its tokenizer; the first call of all fetches it."""
    return load_model("demo")


@pytest.fixture(scope="session")
def tiny_case() -> Callable[[Any], Any]:
    """Makes a case of the bench one of a few hundred tokens, its formats and evenness kept."""

    def small(case: Any) -> Any:
        shape, share = case.shape, case.shape.heads // case.shape.kv_heads
        context, batch = 420 + shape.context % 2, min(shape.batch, 2)
        return replace(
            case, shape=replace(shape, batch=batch, context=context, heads=share, kv_heads=1)
        )

    return small


@pytest.fixture(scope="session")
def tiny_row(tiny_case: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes a row of the bench one of tiny cases."""
    return lambda row: replace(
        row, cases=tuple(map(tiny_case, row.cases)), rival=row.rival and tiny_case(row.rival)
    )


@pytest.fixture(scope="session")
def draw() -> Callable[..., Tensor]:
    """Draws random tokens [batch, count] that hold no padding."""

    def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, BASE["vocab_size"], (batch, count), generator=generator)

    return tokens


@pytest.fixture(scope="session")
def play() -> Callable[..., Tensor]:
    """Runs tokens through a model and a cache in chunks of the given sizes; returns all logits."""

    @torch.no_grad()
    def run(
        model: Any, cache: Any, tokens: Tensor, sizes: Sequence[int], mask: Tensor | None = None
    ) -> Tensor:
        logits, end, first = [], 0, cache.get_seq_length()
        for size in sizes:
            start, end = end, min(end + size, tokens.shape[1])
            given: dict[str, Tensor] = {}
            if mask is not None:
                whole = mask[:, : first + end]
                places = (whole.cumsum(-1) - 1).clamp_min(0)[:, first + start :]
                given = {"attention_mask": whole, "position_ids": places}
            logits.append(model(tokens[:, start:end], past_key_values=cache, **given).logits)
        assert end == tokens.shape[1]
        return torch.cat(logits, 1)

    return run
