"""Laws of kvtune/recipe.py and kvtune/spans.py: a recipe is only data, and says what is wrong."""

from __future__ import annotations

import copy
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kvtune import recipe as recipes
from kvtune.errors import IntegrityError, MissingInputError, UsageError
from kvtune.models import Facts, LayerFacts
from kvtune.recipe import MAX_BYTES, ArtifactRef, LayerPolicy, ModelBinding, Recipe
from kvtune.spans import check, resolve, write

KNOWN = Facts("Tiny", (LayerFacts("full_attention", 2, 4, 64),) * 4, 128, 61)
HASH = "0" * 64
MODEL = f"""[model]
name = "somebody/tiny"
fingerprint = "sha256:{HASH}"
architecture = "LlamaForCausalLM"
layers = 4
kv_heads = 2
head_dim = 64
"""
LAYER = '[[layers]]\nspan = "all"\n'


def text(body: str) -> str:
    return f"kvtune = 1\n{body}"


@cache
def validator() -> Any:
    """Returns what holds recipes against the schema, which is made, and checked, once."""
    return jsonschema.Draft202012Validator(recipes.schema())


def test_a_recipe_is_read_as_it_was_written(recipe_name: str, recipe_of: Any) -> None:
    recipe = recipe_of(recipe_name)
    assert recipes.loads(recipe.dumps()) == recipe
    assert recipes.loads(recipe.dumps()).dumps() == recipe.dumps()


def test_every_field_survives_the_file(tmp_path: Path) -> None:
    recipe = Recipe(
        name='odd "name" \\ with\nlines and ünïcode',
        description="three words here",
        model=ModelBinding(
            name="somebody/tiny",
            fingerprint=f"sha256:{HASH}",
            architecture="LlamaForCausalLM",
            layers=4,
            kv_heads=2,
            head_dim=64,
        ),
        artifact=ArtifactRef(file="kvtune.safetensors", sha256=HASH),
        layers=(
            LayerPolicy(span="first 2", sinks=4, recent=64),
            LayerPolicy.model_validate(
                {"span": "rest", "kept": {"keys": [{"use": "derope"}, {"use": "affine"}]}}
            ),
        ),
        measured={"kl": 1e-9, "bytes": 2**40, "texts": ["a", 1, 2.5, True], "deep": {"x": []}},
    )
    recipe.save(tmp_path / "recipe.toml")
    assert recipes.load(tmp_path / "recipe.toml") == recipe
    assert recipes.load(tmp_path) == recipe


def test_every_shipped_recipe_is_read_as_it_was_written(shipped: dict[str, Path]) -> None:
    assert shipped
    for path in shipped.values():
        recipe = recipes.load(path)
        assert recipes.loads(recipe.dumps()) == recipe
        assert recipe.name and recipe.description.endswith("."), path


def test_the_digest_tells_what_a_recipe_does_and_not_what_it_is_called(recipe_of: Any) -> None:
    recipe = recipe_of("k8v8")
    renamed = recipe.model_copy(update={"name": "x", "description": "y", "measured": {"kl": 1.0}})
    assert recipes.digest(renamed) == recipes.digest(recipe)
    names = ("k8v8", "k2v4-bare", "derope", "v3-only")
    others = {recipes.digest(recipe_of(name)) for name in names}
    assert len(others) == 4


REFUSED = {
    "not TOML": ("kvtune = ", "not valid TOML"),
    "empty": ("", "does not start with"),
    "newer": ("kvtune = 2", "has format 2; this kvtune reads 1. Upgrade"),
    "older": ("kvtune = 0", "does not start with"),
    "format as a text": ('kvtune = "1"', "does not start with"),
    "format as a truth": ("kvtune = true", "does not start with"),
    "format as a fraction": ("kvtune = 1.0", "does not start with"),
    "unknown key": (text('nme = "x"'), "unknown key nme. Did you mean 'name'"),
    "unknown key of a layer": (text(f"{LAYER}sink = 4"), r"layers.0.sink. Did you mean 'sinks'"),
    "unknown key of kept": (text(f"{LAYER}kept.key = []"), r"kept.key. Did you mean 'keys'"),
    "unknown key of the model": (text(f"{MODEL}kv_head = 2"), r"kv_head. Did you mean 'kv_heads'"),
    "unknown key of the artifact": (
        text(f'[artifact]\nfile = "a"\nsha256 = "{HASH}"\nsize = 3'),
        r"unknown key artifact.size",
    ),
    "unknown setting": (
        text(f'{LAYER}kept.keys = [{{ use = "affine", bit = 4 }}]'),
        r"layers.0.kept.keys: affine has no 'bit'. Did you mean 'bits'",
    ),
    "unknown method": (
        text(f'{LAYER}kept.keys = [{{ use = "afine" }}]'),
        "no method 'afine'. Did you mean 'affine'",
    ),
    "dotted method": (text(f'{LAYER}kept.keys = [{{ use = "os.system" }}]'), "'os.system'"),
    "hidden method": (text(f'{LAYER}kept.keys = [{{ use = "__init__" }}]'), "'__init__'"),
    "path as a method": (text(f'{LAYER}kept.keys = [{{ use = "../parts" }}]'), "no method"),
    "number as a method": (text(f"{LAYER}kept.keys = [{{ use = 3 }}]"), 'use = "METHOD"'),
    "part without a method": (text(f"{LAYER}kept.keys = [{{ bits = 4 }}]"), 'use = "METHOD"'),
    "part as a text": (text(f'{LAYER}kept.keys = ["affine"]'), "list of parts"),
    "parts as a table": (text(f'{LAYER}kept.keys = {{ use = "affine" }}'), "list of parts"),
    "value outside its mark": (
        text(f'{LAYER}kept.keys = [{{ use = "affine", bits = 5 }}]'),
        "affine.bits: 5 is not one of 2, 3, 4, 8",
    ),
    "number as a text": (text(f'{LAYER}sinks = "4"'), "sinks: .* valid integer, got '4'"),
    "number as a truth": (text(f"{LAYER}recent = true"), "recent: .* valid integer, got True"),
    "number as a fraction": (text(f"{LAYER}recent = 4.0"), "recent: .* valid integer, got 4.0"),
    "setting as a fraction": (
        text(f'{LAYER}kept.keys = [{{ use = "affine", bits = 4.0 }}]'),
        "valid integer",
    ),
    "negative window": (text(f"{LAYER}recent = -1"), "greater than or equal to 0"),
    "too many sinks": (text(f"{LAYER}sinks = 100000"), "less than or equal to 1024"),
    "layers as a text": (text('layers = "all"'), "layers: .*tuple"),
    "no span": (text("[[layers]]\nsinks = 4"), "span: Field required"),
    "odd span": (text('[[layers]]\nspan = "some"'), "layers.0.span: span 'some' is none of"),
    "covered twice": (text(f"{MODEL}{LAYER}{LAYER}"), "layer 0 is covered twice"),
    "not covered": (text(f'{MODEL}[[layers]]\nspan = "1-2"'), "layers 0, 3 of 4 are not covered"),
    "beyond the model": (text(f'{MODEL}[[layers]]\nspan = "0-4"'), "4 layers"),
    "no layers at all": (text(MODEL.replace("layers = 4", "layers = 0") + LAYER), "model.layers"),
    "endless layers": (
        text(MODEL.replace("layers = 4", "layers = 1000000000000") + LAYER),
        "model.layers",
    ),
    "short fingerprint": (text(MODEL.replace(HASH, "0")), "fingerprint"),
    "hash in capitals": (text(f'[artifact]\nfile = "a"\nsha256 = "{"A" * 64}"'), "sha256"),
    "not a number": (text("[measured]\nkl = nan"), "[measured] holds a number that is not finite"),
    "overflow": (text("[measured.kl]\nlist = [1.0, [1e999]]"), "not finite"),
    "a date": (text("[measured]\nwhen = 2026-01-01"), "no number, text, list or table"),
    "very deep": (text("[measured]\nx = " + "[" * 90 + "]" * 90), "deep"),
    "deeper than Python goes": (text("x = " + "[" * 5000 + "]" * 5000), "not valid TOML"),
    "a number without end": (text(f"[measured]\nx = {'9' * 5000}"), "not valid TOML"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_recipe_is_refused_with_the_place_and_the_value(name: str) -> None:
    wrong, words = REFUSED[name]
    words = words.replace("[measured]", r"\[measured\]")
    with pytest.raises(IntegrityError, match=words) as caught:
        recipes.loads(wrong, "my-recipe")
    assert str(caught.value).startswith("my-recipe")
    assert caught.value.exit_code == 4
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "file",
    ["../a", "/etc/passwd", "a/b", "a\\\\b", "", ".hidden", "..", "a b", "a\\u0000", "x" * 101],
)
def test_the_name_of_an_artifact_is_a_plain_file_name(file: str) -> None:
    with pytest.raises(IntegrityError, match=r"artifact\.file .* is not a plain file name"):
        recipes.loads(text(f'[artifact]\nfile = "{file}"\nsha256 = "{HASH}"'))


def test_a_file_that_cannot_be_a_recipe_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for missing in (path, tmp_path):
        with pytest.raises(MissingInputError, match="no recipe at"):
            recipes.load(missing)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(IntegrityError, match=f"larger than {MAX_BYTES} bytes"):
        recipes.load(path)
    path.write_bytes(b"kvtune = 1\nname = '\xff'")
    with pytest.raises(IntegrityError, match="not UTF-8"):
        recipes.load(path)
    path.write_bytes(b"kvtune = 1\n")
    assert recipes.load(path) == recipes.load(tmp_path) == Recipe()


def test_one_layer_named_a_hundred_thousand_times_is_refused_at_once() -> None:
    span = ", ".join(["0-3"] * 100_000)
    with pytest.raises(UsageError, match="layer 0 is covered twice"):
        resolve([span], 4)
    with pytest.raises(IntegrityError, match="at most 2000 characters") as caught:
        recipes.loads(text(f'{MODEL}[[layers]]\nspan = "{span}"'))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "body", ["{long} = 1", LAYER + "{long} = 1", LAYER + 'kept.keys = [{{ use = "{long}" }}]']
)
def test_an_error_stays_short_however_long_a_name_is(body: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        recipes.loads(text(body.format(long="x" * 100_000)))
    assert len(str(caught.value)) < 1000


def test_a_template_is_no_recipe(shipped: dict[str, Path]) -> None:
    templates = [path for path in shipped.values() if recipes.load(path).is_open()]
    assert templates
    for path in templates:
        with pytest.raises(UsageError, match=r"is a template.*kvtune search"):
            recipes.load(path).policies(KNOWN)


def test_policies_follow_the_spans_and_leave_other_kinds_of_layers_alone() -> None:
    recipe = recipes.loads(
        text(
            '[[layers]]\nspan = "last 2"\nsinks = 2\nkept.values = [{ use = "affine", bits = 2 }]\n'
            '[[layers]]\nspan = "0"\nrecent = 5\n[[layers]]\nspan = "rest"\nsinks = 9\n'
        )
    )
    sliding = LayerFacts("sliding_attention", 2, 4, 64, 16)
    policies = recipe.policies(Facts("Tiny", (*KNOWN.layers[:3], sliding), 128, 61))
    assert [policy.sinks for policy in policies] == [0, 9, 2, 0]
    assert [policy.recent for policy in policies] == [5, 0, 0, 0]
    assert [policy.is_dense for policy in policies] == [True, True, False, True]
    assert all(policy.is_dense for policy in Recipe().policies(KNOWN))


@pytest.mark.parametrize("seen", range(0, 300, 7))
def test_what_is_due_is_whole_blocks_behind_sinks_and_window(seen: int, recipe_of: Any) -> None:
    policy = recipe_of("k4v2-windowed").policies(KNOWN)[0]
    due = policy.due(seen)
    assert due % policy.block == 0
    left = seen - policy.sinks - due
    assert left < policy.recent + policy.block
    assert due == 0 or left >= policy.recent
    assert due <= policy.due(seen + 1)


def test_the_schema_knows_every_shipped_recipe_and_template(shipped: dict[str, Path]) -> None:
    jsonschema.Draft202012Validator.check_schema(recipes.schema())
    for path in shipped.values():
        validator().validate(tomllib.loads(path.read_text(encoding="utf-8")))


def test_the_schema_knows_every_recipe_made_here(recipe_name: str, recipe_of: Any) -> None:
    validator().validate(tomllib.loads(recipe_of(recipe_name).dumps()))


@pytest.mark.parametrize(
    "name",
    [
        "newer",
        "format as a text",
        "unknown key",
        "unknown key of a layer",
        "unknown key of kept",
        "unknown setting",
        "unknown method",
        "value outside its mark",
        "number as a text",
        "negative window",
        "parts as a table",
        "no span",
        "short fingerprint",
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator().validate(tomllib.loads(REFUSED[name][0]))


def test_the_schema_is_made_anew_for_each_caller() -> None:
    schema = recipes.schema()
    before = copy.deepcopy(schema)
    schema["$defs"].clear()
    assert recipes.schema() == before


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        (["all"], [0, 0, 0, 0]),
        (["rest"], [0, 0, 0, 0]),
        (["first 1", "rest"], [0, 1, 1, 1]),
        (["rest", "last 2"], [0, 0, 1, 1]),
        (["first 2", "last 2"], [0, 0, 1, 1]),
        (["first 0", "all"], [1, 1, 1, 1]),
        (["1-2", "0, 3"], [1, 0, 0, 1]),
        (["3,0", "1 , 2"], [0, 1, 1, 0]),
        (["2-2", "0-1,3-3"], [1, 1, 0, 1]),
        (["last 4"], [0, 0, 0, 0]),
        (["all", "rest"], [0, 0, 0, 0]),
    ],
)
def test_spans_cover_layers(spans: list[str], expected: list[int]) -> None:
    assert resolve(spans, 4) == expected
    for span in spans:
        check(span)


@pytest.mark.parametrize(
    "span",
    [
        *("", " ", "ALL", "first", "first -1", "first 1.5", "last", "last two", "-1", "1-", "-"),
        *("0-1-2", "1..2", "0:2", "0,,1", "2-1", "0;1", "some", "0x1", "1e1", "٣", "100000"),
    ],
)
def test_what_is_no_span_is_refused(span: str) -> None:
    with pytest.raises(UsageError, match="span"):
        check(span)
    with pytest.raises(UsageError):
        resolve([span], 4)


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        (["0-1"], "layers 2-3 of 4 are not covered"),
        ([], "layers 0-3 of 4 are not covered"),
        (["all", "0"], "layer 0 is covered twice, by 'all' and '0'"),
        (["0-2", "2-3"], "layer 2 is covered twice"),
        (["0, 0", "rest"], "layer 0 is covered twice"),
        (["rest", "rest"], '"rest" stands twice'),
        (["0-4"], "does not fit a model with 4 layers"),
        (["last 5"], "longer than the model's 4 layers"),
    ],
)
def test_layers_are_covered_exactly_once(spans: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve(spans, 4)


@pytest.mark.parametrize("layers", [[], [0], [0, 1], [3, 5, 7], [0, 1, 2, 7], list(range(30))])
def test_a_written_span_is_read_back(layers: list[int]) -> None:
    rest = [] if len(layers) == 30 else ["rest"]
    owner = resolve([write(layers), *rest] if layers else rest, 30)
    assert [layer for layer, index in enumerate(owner) if index == 0 and layers] == layers
