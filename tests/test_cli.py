"""Laws of the front door: lean help, exit codes, --json, and the verbs that need no model."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import cli_tiny as TINY
import jsonschema
import pytest
import torch
import typer

import kvtune
from kvtune import parts, shipped
from kvtune.cli import amounts, main
from kvtune.tensors import Artifact

ROOT = Path(__file__).resolve().parents[1]
# not pydantic: typer itself needs it
HEAVY = ("torch", "transformers", "optuna", "datasets", "scipy", "numpy", "kvtune.parts")
VERBS = ("tune", "calibrate", "search", "fit", "apply", "recipe", "methods", "bench", "doctor")


kv = TINY.kv


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe's text; returns its file."""

    def write(body: str) -> Path:
        file = tmp_path / "mine.toml"
        file.write_text(f"kvtune = 1\n{body}")
        return file

    return write


@pytest.mark.parametrize("words", [["--help"], ["tune", "-h"], ["recipe", "--help"], ["--version"]])
def test_help_and_version_import_nothing_heavy(words):
    code = (
        "import sys; from kvtune.cli import main; code = main(sys.argv[1:]);"
        f"print('heavy:', code, sorted(set({HEAVY!r}) & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: 0 []\n"), done.stdout + done.stderr


def test_help_names_every_verb_and_the_exit_codes(kv):
    said = kv("--help")
    assert said.code == 0
    assert all(verb in said.out for verb in VERBS)
    assert "130 interrupted" in " ".join(said.out.split())


def test_the_version_is_that_of_the_project(kv):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert kv("--version").out == f"kvtune {project['version']}\n"
    assert kvtune.__version__ == project["version"]


def test_public_names_come_lazily_and_are_what_they_say():
    code = (
        "import sys, kvtune; assert 'torch' not in sys.modules; kvtune.Recipe; import kvtune.tune;"
        "kvtune.load; print(*(type(getattr(kvtune, n)).__name__ for n in kvtune.__all__))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kinds = dict(zip(kvtune.__all__, done.stdout.split(), strict=True))
    assert {kinds[name] for name in ("calibrate", "load", "tune")} == {"function"}
    assert kinds["Recipe"] == "ModelMetaclass"
    with pytest.raises(AttributeError, match="no attribute 'recipes'"):
        _ = kvtune.recipes


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["tun"], "Did you mean 'tune'"),
        (["tune"], "Missing argument 'MODEL'"),
        (["tune", "demo", "--trails", "3"], "--trials"),
        (["tune", "demo", "--context", "many"], "write 512 or 32k"),
        (["tune", "demo", "--time", "soon"], "write 90s, 10m or 1h"),
        (["tune", "demo", "--trials", "0"], "--trials"),
        (["apply", "kivi-4"], "--model"),
        (["apply", "kivi-4", "--model", "demo", "--max-flips", "200%"], "write 2% or 0.02"),
        (["apply", "kivi-5", "--model", "demo"], "Did you mean 'kivi-"),
        (["apply", "kivi-4", "--model", "demo", "--prompt", "a", "--max-kl", "1"], "gates"),
        (["tune", "demo", "--template", "search-afine"], "Did you mean 'search-affine'"),
        (["tune", "demo", "--template", "kivi-4", "--dry-run"], "opens nothing to search"),
        (["methods", "afine"], "Did you mean 'affine'"),
        (["search", "x", "--resume", "--fresh"], "exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_2_and_says_what_is_right(kv, words, hint):
    said = kv(*words)
    assert said.code == 2
    assert hint in said.told
    assert not said.out
    assert kv.json(*words)["error"]["exit_code"] == 2


def test_no_verb_at_all_shows_the_help(kv):
    said = kv()
    assert said.code == 2
    assert "Usage" in said.out + said.err


def test_an_unexpected_error_is_one_line_and_debug_shows_its_traceback(kv, monkeypatch):
    def broken() -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(parts, "names", broken)
    said = kv("methods")
    assert said.code == 1
    assert said.told.startswith("Error: ZeroDivisionError: by nothing For the traceback")
    assert "--debug" in said.err
    assert "Traceback" in kv("methods", "--debug").err
    assert kv.json("methods")["error"]["type"] == "ZeroDivisionError"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA"), OSError(28, "No space left on device")],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_or_disk_exits_with_6(kv, monkeypatch, error):
    def greedy() -> None:
        raise error

    monkeypatch.setattr(parts, "names", greedy)
    assert kv("methods").code == 6
    assert kv.json("methods")["error"]["type"] == "ResourceError"


@pytest.mark.parametrize("words", [["recipe", "list"], ["recipe", "list", "--json"]])
def test_a_closed_pipe_ends_quietly(words):
    command = [sys.executable, "-m", "kvtune", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("text", "count"), [("512", 512), ("32k", 32768), ("0.5K", 512), ("1m", 1 << 20)]
)
def test_tokens_are_read_as_people_write_them(text, count):
    assert amounts.tokens(text) == count


def test_times_and_shares_are_read_as_people_write_them():
    assert [amounts.duration(x) for x in ("90s", "10m", "1h", "5")] == [90, 600, 3600, 5]
    assert [amounts.share(x) for x in ("2%", "0.02", "100%")] == [0.02, 0.02, 1]
    for wrong in ("-1", "k", "", "1.5", "nan"):
        with pytest.raises(typer.BadParameter):
            amounts.tokens(wrong)
    with pytest.raises(typer.BadParameter):
        amounts.share("nan")


def test_methods_lists_every_method_found(kv):
    found = kv.json("methods")["data"]["methods"]
    assert [row["name"] for row in found] == list(parts.names())
    said = kv("methods")
    for name in parts.names():
        part = parts.find(name)
        assert name in said.out and part.kind in said.out


@pytest.mark.parametrize("name", parts.names())
def test_a_method_is_shown_with_its_settings_and_their_legal_values(kv, name):
    part, data = parts.find(name), kv.json("methods", name)["data"]
    assert [row["name"] for row in data["settings"]] == list(part.model_fields)
    assert data["about"].split() == (part.__doc__ or "").split()
    for row in data["settings"]:
        for value in row["legal"]:
            assert str(value) in kv("methods", name).out


def test_recipe_list_names_all_that_is_shipped(kv):
    rows = kv.json("recipe", "list")["data"]["recipes"]
    single = {path.stem for path in (ROOT / "recipes").glob("*.toml")}
    folders = {path.parent.name for path in (ROOT / "recipes").glob("*/recipe.toml")}
    assert {row["name"] for row in rows} == single | folders
    assert {row["kind"] for row in rows} == {"recipe", "template"}
    said = kv("recipe", "list")
    assert all(row["name"] in said.out for row in rows)


@pytest.mark.parametrize("name", shipped.names())
def test_every_shipped_recipe_is_sound_and_can_be_shown(kv, name):
    assert kv("recipe", "check", name).code == 0
    shown = kv.json("recipe", "show", name)["data"]
    assert shown["spans"]
    assert kv("recipe", "show", name).out


def test_the_schema_accepts_every_shipped_recipe_and_refuses_a_wrong_one(kv):
    schema = json.loads(kv("recipe", "schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in (ROOT / "recipes").glob("*.toml"):
        validator.validate(tomllib.loads(path.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"kvtune": 1, "layer": []})
    assert kv.json("recipe", "schema")["data"]["schema"] == schema


def test_diff_shows_the_layers_that_differ(kv):
    found = kv.json("recipe", "diff", "k4v2", "protected-ends", "--layers", "8")["data"]["layers"]
    assert [row["layers"] for row in found] == ["0-1, 6-7"]
    assert found[0]["left"]["keys"] == "affine bits=4 group=32 axis=channel"
    assert "0-1, 6-7" in kv("recipe", "diff", "k4v2", "protected-ends", "--layers", "8").out
    assert "alike" in kv("recipe", "diff", "k4v2", "k4v2").out


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("layer = 3", "unknown key layer. Did you mean 'layers'?"),
        ('[[layers]]\nspan = "all"\nkept.keys = [{ use = "afine" }]', "Did you mean 'affine'?"),
        ('[[layers]]\nspan = "all"\nkept.keys = [{ use = "affine", bit = 4 }]', "'bits'"),
        ('[[layers]]\nspan = "all"\nkept.keys = [{ use = "affine", bits = 5 }]', "5 is not one of"),
        ("[measured]\nkl = nan", "not finite"),
        ("[[[", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_exits_with_4_and_says_where(kv, recipe, body, words):
    said = kv("recipe", "check", recipe(body))
    assert said.code == 4
    assert words in said.told
    assert "mine.toml" in said.told


def test_check_needs_the_tensors_beside_a_recipe_to_the_last_byte(kv, recipe, tmp_path):
    sum_ = Artifact({"layer.0.keys.basis": torch.ones(2, 2)}).save(tmp_path / "mine.safetensors")
    file = recipe(f'artifact = {{ file = "mine.safetensors", sha256 = "{sum_}" }}')
    assert kv.json("recipe", "check", file)["data"]["tensors"] == 1
    tensors = tmp_path / "mine.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + b"\x01")
    assert (said := kv("recipe", "check", file)).code == 4 and "has changed" in said.told
    tensors.unlink()
    assert (said := kv("recipe", "check", file)).code == 4 and "mine.safetensors" in said.told


def test_a_recipe_that_is_not_there_exits_with_7(kv, tmp_path):
    assert kv("recipe", "show", tmp_path / "none.toml").code == 7
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "recipe.toml").write_text("kvtune = 1")
    said = kv("recipe", "show", tmp_path)
    assert said.code == 7
    assert f"Did you mean {tmp_path / 'chosen'}?" in said.err.replace("\n", "")


def test_doctor_finds_this_machine_sound(kv):
    found = kv.json("doctor")
    assert found["ok"]
    names = [check["name"] for check in found["data"]["checks"]]
    assert {"python", "torch", "transformers", "gpu", "kernels", "cache folder"} <= set(names)


def test_doctor_names_the_cure_of_a_folder_that_shadows_kernels(kv, monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    found = kv.json("doctor")
    assert found["error"]["exit_code"] == 5
    failing = [check for check in found["data"]["checks"] if check["state"] == "FAILS"]
    assert [check["name"] for check in failing] == ["kernels"]
    assert "shadows" in failing[0]["found"] and failing[0]["cure"]


def test_doctor_names_the_cure_of_a_cache_folder_that_cannot_be_written(kv, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVTUNE_HOME", str(tmp_path / "file"))
    said = kv("doctor")
    assert said.code == 5
    assert "cache folder" in said.told and "KVTUNE_HOME" in said.out


def test_the_smoke_kernel_doubles_under_the_interpreter():
    pytest.importorskip("triton")
    code = "from kvtune.cli.smoke import doubles; print(doubles('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "True\n", done.stderr


def test_json_speaks_of_errors_before_a_verb_began(capsys):
    assert main(["--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "kvtune.kvtune/1" and not found["ok"]
