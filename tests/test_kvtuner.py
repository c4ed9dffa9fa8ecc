"""Laws of the import of KVTuner's presets: the published layer lists, kv heads, modes, the verb."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import torch

from kvtune import kvtuner
from kvtune import recipe as recipes
from kvtune.cache import load, weigh
from kvtune.errors import MissingInputError, UsageError
from kvtune.kvtuner import Preset
from kvtune.models import Facts, LayerFacts
from kvtune.policy import Policy
from kvtune.spans import resolve

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# a preset's model, mode and point, its mean bits as the paper states them, and its layers
TABLE = """
llama kivi 4_1 3.25 K2V2:0,4,25,27 K4V4:1-3,7,29,31 K8V4:13,17 K4V2:rest
llama kivi 4_0 3.0625 K8V8:0 K4V4:1-3,7,29,31 K2V2:4,5,13,17,21,23-25,27 K4V2:rest
llama kivi 6_1 4.906 K2V4:0 K2V2:13,17 K4V2:5,21,23,24 K4V4:1-3,7,29,31 K8V4:rest
llama kivi 6_0 5.0625 K2V2:0,13,17 K4V8:1-3,7,29,31 K8V8:4,5,21,23-25,27 K4V4:rest
llama pertoken 4_0 3.594 K4V8:0 K4V2:1-4,7,13,18,19,22-25,27,29,31 K4V4:rest
llama pertoken 6_1 5.4375 K4V4:0,5,6,12,19,21,22,26,28 K8V4:rest
mistral pertoken 4_1 3.781 K4V8:0 K8V8:5,6 K8V4:3,4,23,31 K4V2:rest
mistral pertoken 6_1 5.375 K4V8:0 K4V2:1,2,5,6 K4V4:3,4,23,31 K8V4:rest
qwen-3b pertoken 4_1 4 K8V2:0 K8V4:17,18,27,29-31,34 K4V2:1-6,8,9,12-15,20,23,35 K4V4:rest
qwen-3b pertoken 4_0 3.639 K8V4:0 K8V8:18,27,29 K4V4:10,19,24,26,33 K4V2:rest
qwen-3b kivi 4_1 3.444 K8V8:0,1 K4V4:3,5-7,11,13,23,25,32,33 K2V2:2,4,12,28 K2V4:34,35 K4V2:rest
qwen-7b pertoken 4_0 4 K8V8:0 K8V2:3,13,27 K4V2:1,2,4,5,8,24,25 K4V4:rest
qwen-7b pertoken 6_1 5 K8V2:0,3,13,27 K8V4:8,9,12,14,16-18,20-22,24,26 K4V4:rest
qwen-7b kivi 4_0 3.929 K8V8:0,2,6,11,15,17 K4V4:4,5,8,12,22-26 K2V2:rest
qwen-7b kivi 6_0 5.964 K8V8:rest K8V4:4,5,12,22-25 K4V2:11,15,17 K2V4:1,3 K2V2:6,8,26
"""
FULL = {
    "llama": ("Meta-Llama-3.1-8B-Instruct", 32),
    "mistral": ("Mistral-7B-Instruct-v0.3", 32),
    "qwen-3b": ("Qwen2.5-3B-Instruct", 36),
    "qwen-7b": ("Qwen2.5-7B-Instruct", 28),
}
SHIPPED = {
    "kvtuner-llama-3.1-8b-kivi-3.25": "llama kivi 4_1",
}


@dataclass(frozen=True)
class Row:
    """What is published of one preset."""

    model: str
    mode: str
    point: str
    mean: float
    bits: list[tuple[int, int]]  # of keys and values in each layer
    groups: int

    @classmethod
    def of(cls, line: str) -> Row:
        """Reads a line of the table."""
        label, mode, point, mean, *groups = line.split()
        model, layers = FULL[label]
        pairs = [(int(group[1]), int(group[3])) for group in groups]
        owner = resolve([group.partition(":")[2] for group in groups], layers)
        return cls(model, mode, point, float(mean), [pairs[i] for i in owner], len(groups))


ROWS = {" ".join(line.split()[:3]): Row.of(line) for line in TABLE.strip().splitlines()}
every_preset = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
Write = Callable[..., Path]


def load_tiny() -> ModuleType:
    file = Path(__file__).with_name("cli_tiny.py")
    spec = importlib.util.spec_from_file_location("cli_tiny", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kv = load_tiny().kv


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a preset's text; returns its file."""

    def made(text: str | bytes, name: str = "m_kivi_KVTuner4_0.yaml") -> Path:
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return made


def layered(bits: list[tuple[int, int]], indent: str = "") -> str:
    """The YAML of one pair after another, as KVTuner writes it."""
    return "".join(
        f"{indent}{index}:\n{indent}  nbits_key: {keys}\n{indent}  nbits_value: {values}\n"
        for index, (keys, values) in enumerate(bits)
    )


def headed(layers: list[list[tuple[int, int]]]) -> str:
    """The YAML of a preset for kv heads."""
    return "".join(f"{layer}:\n{layered(heads, '  ')}" for layer, heads in enumerate(layers))


@pytest.fixture
def published(write: Write) -> Callable[[Row], Preset]:
    """Imports a preset that is written as it is published."""
    return lambda row: kvtuner.read(
        write(layered(row.bits), f"{row.model}_{row.mode}_KVTuner{row.point}.yaml")
    )


def known(layers: int, kv_heads: int = 8, head_dim: int = 128) -> Facts:
    layer = LayerFacts("full_attention", kv_heads, 4 * kv_heads, head_dim)
    return Facts("Tiny", (layer,) * layers, 1 << 17, 61)


def pairs(policy: Policy) -> list[tuple[float, float]]:
    return [(keys.payload_bits, values.payload_bits) for keys, values in policy.pairs]


@every_preset
def test_the_mean_code_bits_are_those_that_are_published(row: Row, published: Any) -> None:
    preset = published(row)
    assert preset.payload_bits == pytest.approx(row.mean, abs=5e-4)
    facts = known(len(row.bits))
    assert weigh(preset.recipe().policies(facts), facts, 512).payload_bits == preset.payload_bits


@every_preset
def test_every_layer_gets_its_bits_and_equal_layers_share_an_entry(
    row: Row, published: Any
) -> None:
    recipe = published(row).recipe()
    policies = recipe.policies(known(len(row.bits)))
    assert [pairs(policy) for policy in policies] == [[pair] for pair in row.bits]
    assert len(recipe.layers) == row.groups
    assert recipes.loads(recipe.dumps()) == recipe
    jsonschema.validate(tomllib.loads(recipe.dumps()), recipes.schema())


@every_preset
def test_a_recipe_says_where_it_comes_from_and_claims_nothing(row: Row, published: Any) -> None:
    recipe = published(row).recipe()
    assert recipe.model is None and not recipe.measured
    bits, layers = f"{sum(map(sum, row.bits)) / 2 / len(row.bits):.2f}", len(row.bits)
    assert recipe.name == f"kvtuner-{row.model.lower()}-{row.mode}-{bits}"
    for word in (row.model, row.mode, row.point, bits, f"{layers} layers", "arXiv:2502.04420"):
        assert word in recipe.description


@pytest.mark.parametrize("layers", [31, 33])
def test_a_recipe_fits_no_model_of_another_depth(layers: int, published: Any) -> None:
    with pytest.raises(UsageError, match="layer"):
        published(ROWS["llama kivi 4_1"]).recipe().policies(known(layers))


@pytest.mark.parametrize(
    ("mode", "kept", "recent", "metadata"),
    [
        ("kivi", ("axis=channel group=32", "axis=token group=32"), 32, 32 / 32),
        ("pertoken", ("axis=token group=head", "axis=token group=head"), 0, 32 / 128),
    ],
)
def test_a_mode_tells_axes_groups_window_and_so_the_true_bits(
    write: Write, mode: str, kept: tuple[str, str], recent: int, metadata: float
) -> None:
    preset = kvtuner.read(write(layered([(8, 4), (2, 3)]), f"m_{mode}_KVTuner6_0.yaml"))
    for entry in preset.recipe().layers:
        assert (entry.sinks, entry.recent) == (0, recent)
        for (table,), words in zip((entry.kept.keys, entry.kept.values), kept, strict=True):
            assert f"axis={table['axis']} group={table['group']}" == words
    # scale and zero of 16 bits for each group; the window is nearly nothing at this length
    assert weigh(preset.layers, known(2), 1 << 16).bits == pytest.approx(4.25 + metadata, abs=0.02)


def test_the_order_of_layers_and_the_spelling_of_their_numbers_do_not_matter(write: Write) -> None:
    plain = kvtuner.read(write(layered([(8, 8), (4, 2), (2, 2)])))
    text = (
        '"2": {nbits_value: 2, nbits_key: 2}\n1: {nbits_key: 4, nbits_value: 2}\n'
        "'0': {nbits_key: 8, nbits_value: 8}\n"
    )
    assert kvtuner.read(write(text)) == plain


def test_sixteen_bits_leave_a_side_as_it_is(write: Write) -> None:
    preset = kvtuner.read(write(layered([(16, 16), (16, 2), (4, 16)])))
    dense, keys, values = preset.layers
    assert dense == Policy()
    assert not keys.keys.codecs and keys.values.codecs and keys.recent == 32
    assert values.keys.codecs and not values.values.codecs
    assert preset.payload_bits == (16 + 9 + 10) / 3
    assert [entry.kept.is_open() for entry in preset.recipe().layers] == [False] * 3


HEADS = [[(8, 4), (2, 2), (8, 4)], [(4, 4), (4, 4), (4, 4)], [(8, 8), (4, 2), (16, 2)]]


@pytest.mark.parametrize("mode", kvtuner.MODES)
def test_heads_that_differ_become_heads_of_the_recipe(write: Write, mode: str) -> None:
    preset = kvtuner.read(write(headed(HEADS), f"m_{mode}_KVTuner4_0.yaml"))
    recipe = recipes.loads(preset.recipe().dumps())
    policies = recipe.policies(known(3, kv_heads=3))
    assert policies == preset.layers
    assert pairs(policies[0]) == HEADS[0] and pairs(policies[2]) == HEADS[2]
    assert preset.per_head and recipe.layers[0].heads and not recipe.layers[1].heads
    flat = [bits for layer in HEADS for pair in layer for bits in pair]
    assert preset.payload_bits == pytest.approx(sum(flat) / len(flat))


def test_heads_that_are_alike_are_one_layer(write: Write) -> None:
    bits = [(8, 4), (4, 2)]
    alike = kvtuner.read(write(headed([[pair] * 4 for pair in bits])))
    assert alike == kvtuner.read(write(layered(bits)))
    assert not alike.per_head


def test_an_imported_preset_runs(write: Write, llama: Any, draw: Any) -> None:
    heads = [[(8, 4), (2, 2)], [(4, 4), (4, 4)], [(16, 16), (16, 16)], [(8, 8), (4, 2)]]
    recipe = kvtuner.read(write(headed(heads))).recipe()
    cache = load(recipe, llama)
    dense = load(recipes.loads("kvtune = 1"), llama)
    sizes = []
    for one in (cache, dense):
        with torch.no_grad():
            llama(draw(1, 200), past_key_values=one)
        sizes.append(one.nbytes)
    assert cache.get_seq_length() == 200
    assert sizes[0] < 0.8 * sizes[1]


NAMES = {
    "a_b-7B_kivi_KVTuner4_0.yaml": ("a_b-7B", "kivi", "4_0"),
    "a_pertoken_KVTuner6_1.yml": ("a", "pertoken", "6_1"),
    "a_KVTuner6_1.yaml": ("a", "", "6_1"),
    "mine.yaml": ("mine", "", ""),
    "a kivi\x1b[1m:bug: preset.yaml": ("a-kivi-1m-bug-preset", "", ""),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_file_tells_model_mode_and_point(write: Write, name: str) -> None:
    model, mode, point = NAMES[name]
    file = write(layered([(4, 2)]), name)
    preset = kvtuner.read(file, None if mode else "pertoken")
    assert (preset.model, preset.mode, preset.point) == (model, mode or "pertoken", point)
    assert kvtuner.read(file, preset.mode) == preset
    assert preset.recipe().name.isprintable() and model in preset.recipe().description


@pytest.mark.parametrize(
    ("file_name", "mode", "words"),
    [
        ("a_KVTuner4_0.yaml", None, r"nor --mode says.*Run: kvtune .*a_KVTuner4_0\.yaml --mode"),
        ("a b.yaml", None, r"Run: kvtune recipe import kvtuner-yaml '.*a b\.yaml' --mode kivi"),
        ("a.yaml", "kivy", "no mode 'kivy'. Did you mean 'kivi'"),
        ("a.yaml", "", "no mode ''"),
        ("a_kivi_KVTuner4_0.yaml", "pertoken", "named for mode kivi, and --mode says pertoken"),
    ],
)
def test_a_mode_is_told_once_and_is_known(
    write: Write, file_name: str, mode: str | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        kvtuner.read(write(layered([(4, 2)]), file_name), mode)


def test_a_preset_that_is_not_there_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "none_kivi_KVTuner4_0.yaml", tmp_path):
        with pytest.raises(MissingInputError, match="no preset at"):
            kvtuner.read(path)


def test_a_recipe_is_printed_or_written_and_json_holds_it(
    kv: Any, write: Write, tmp_path: Path
) -> None:
    file, made = write(layered([(8, 4), (4, 2)])), tmp_path / "new" / "recipe.toml"
    words = ("recipe", "import", "kvtuner-yaml", file)
    printed = kv(*words)
    assert printed.code == 0 and "4.50 mean code bits" in printed.err
    assert printed.out == kvtuner.read(file).recipe().dumps()
    assert not kv(*words, "-q").err
    written = kv(*words, "-o", made)
    assert written.code == 0 and made.read_text() == printed.out
    assert "bits=8" in written.out and f"kvtune apply {made} --model MODEL" in written.out
    assert kv("recipe", "check", made).code == 0
    data = kv.json(*words)["data"]
    assert data["toml"] == printed.out and data["recipe"] is None
    assert (data["layers"], data["payload_bits"], data["mode"]) == (2, 4.5, "kivi")
    assert kv.json(*words, "-o", made)["data"]["recipe"] == str(made)


@pytest.mark.parametrize(
    ("file_name", "text", "code"),
    [
        ("a.yaml", layered([(4, 2)]), 2),
        ("a_kivi_KVTuner4_0.yaml", layered([(4, 5)]), 4),
        ("", "", 7),
    ],
)
def test_a_refusal_has_its_exit_code_and_writes_nothing(
    kv: Any, write: Write, tmp_path: Path, file_name: str, text: str, code: int
) -> None:
    file = write(text, file_name) if file_name else tmp_path / "none.yaml"
    words = ("recipe", "import", "kvtuner-yaml", file, "-o", tmp_path / "recipe.toml")
    said = kv(*words)
    assert said.code == code and said.err.startswith("Error: ")
    assert kv.json(*words)["error"]["exit_code"] == code
    assert not (tmp_path / "recipe.toml").exists()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_preset_is_what_the_import_makes(name: str, published: Any) -> None:
    assert (RECIPES / f"{name}.toml").read_text() == published(ROWS[SHIPPED[name]]).recipe().dumps()


def test_every_shipped_preset_is_one_of_these() -> None:
    assert {path.stem for path in RECIPES.glob("kvtuner-*.toml")} == set(SHIPPED)
