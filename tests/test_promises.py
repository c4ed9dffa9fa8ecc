"""Promises, each with its tests: this table says where, by words of their names.

| promise | file of tests | tests |
|---|---|---|
| killed at any moment, a run ends with the same files | test_promises | killed_and_run_again |
| and with the same table of trials | test_study_faults | killed_at_twenty, killed_between_any_two |
| no trial is lost, none counted twice | test_study_faults | killed_at_twenty, left_running |
| a path holds the old or the new file, never a part | test_files | killed_at_any_moment |
| on a full disk too | test_files | full_disk, real_limit |
| a study on a full disk too | test_study_faults | full_disk |
| for every file that is written | test_promises | only_files_py_writes |
| temporaries of killed writers are cleaned up | test_files | sweep |
| and by every run | test_promises | killed_and_run_again |
| any changed byte of a recipe's tensors is found | test_promises | every_byte |
| any changed byte of a profile is found | test_promises | every_bit_of_a_profile |
| of tensors, before anything is parsed | test_tensors | every_changed_byte |
| another model is refused, though its shapes are the same | test_promises | other_weights |
| any changed weight of keys and values makes another model | test_models | every_weight |
| a hostile recipe is only data | test_recipe | wrong_recipe, cannot_be_a_recipe, hundred_thousand |
| 10,000 of them run and open nothing | test_recipe_hostile | refused_in_words, nothing_else |
| and take little time and memory | test_recipe_hostile | much_time_or_memory |
| hostile tensors are only data | test_tensors | every_mutation, malformed |
| never remote code, never a pickle | test_promises | no_foreign_code, only_a_pickle |
| no network with --offline | test_promises | no_network |
| texts come from the local cache with --offline | test_texts | never_the_network |
| out of memory halves the batch, then is an answer | test_bank | halves_the_batch |
| and the search goes on, and the front is proved | test_promises | search_goes_on |
| the same inputs and seed give the same files | test_promises | the_same_run |
| a resumed search equals a straight one | test_study | stopped_and_resumed |
| a killed worker's trials go to the others | test_postgres | loses_no_trial, random_moments |
| a second writer is refused | test_study_faults | second_writer |
"""

import ast
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest
import torch

from kvtune import recipe as recipes
from kvtune.errors import IntegrityError
from kvtune.files import _HOST, SUFFIX
from kvtune.measure import Bench
from kvtune.models import facts, fingerprint, load_model
from kvtune.profile import Cell, Profile
from kvtune.recipe import RECIPE_FILE
from kvtune.search import STUDY
from kvtune.study import rows
from kvtune.tensors import Artifact

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("promises_worker.py")
SPAWNED = {"/sbin/ldconfig"}  # what torch and Triton ask the system's libraries by
EVIL = """
from pathlib import Path
Path(__file__).with_name("was-run").touch()
class Config: pass
class Model: pass
"""


kv = TINY.kv


class Bomb:
    """A pickle of it leaves a trace where it is read."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self._trace,)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and a tiny model whose folder also holds code and pickles that nobody may run."""
    folder = tmp_path_factory.mktemp("promises")
    TINY.text(folder / "text.txt")
    model = TINY.tiny(folder / "model")
    (model / "evil.py").write_text(EVIL)
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"):
        (model / name).write_bytes(pickle.dumps(Bomb(model / "was-read")))
    return folder


def traces(folder: Path) -> list[str]:
    """What code or pickles left behind that were run."""
    return [path.name for path in folder.rglob("was-*")]


def worker(mode: str, place: Path, folder: Path) -> dict[str, Any]:
    """Runs the worker in a process of its own; returns what it printed last."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    env.pop("HF_HUB_OFFLINE", None)  # --offline alone has to do
    command = [sys.executable, str(WORKER), mode, str(place), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def audited(place: Path) -> dict[str, Any]:
    """A whole run that an audit hook watched; its folder is `audited`."""
    return worker("audit", place, place / "audited")


def timeless(folder: Path) -> dict[str, bytes]:
    """The recipes of a run, dates and the run's own name aside."""
    files = TINY.snapshot(folder)
    return {
        name: re.sub(rb'date = "[0-9-]+"|Made by .*', b"", data)
        for name, data in files.items()
        if name.startswith(("front/", "chosen/"))
    }


def test_every_promise_in_the_table_has_its_tests() -> None:
    assert __doc__
    promised = [line.strip("| ").split(" | ") for line in __doc__.splitlines() if "| test_" in line]
    assert len(promised) > 20
    for promise, file, wanted in promised:
        tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / f"{file}.py").read_text(), re.M)
        for name in wanted.split(", "):
            assert [test for test in tests if name in test], f"{promise}: no {name} in {file}"


def test_no_foreign_code_no_pickle_and_no_network(audited: dict[str, Any], place: Path) -> None:
    assert audited["code"] == 0
    assert audited["told"] == [] and audited["foreign"] == []
    assert {re.findall(r"'([^']+)'", line)[0] for line in audited["spawned"]} <= SPAWNED
    assert audited["exec"] > 1000 and audited["open"] > 1000, "the hook saw nothing"
    assert traces(place) == []
    assert (place / "audited" / "chosen" / RECIPE_FILE).is_file()


def test_the_bombs_would_go_off(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "was-read"))
    assert traces(tmp_path) == []
    pickle.loads(bomb)
    assert traces(tmp_path) == ["was-read"]


def test_a_model_that_is_only_a_pickle_or_only_foreign_code_is_refused(
    kv: Any, place: Path, tmp_path: Path
) -> None:
    for folder, gone in (("pickle", "model.safetensors"), ("code", "")):
        copy = tmp_path / folder
        copy.mkdir()
        for name, data in TINY.snapshot(place / "model").items():
            if name != gone:
                (copy / name).write_bytes(data)
        if folder == "code":
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
        said = kv("apply", "k8v4", "--model", copy, "--prompt", "Why?")
        assert said.code == 7 and "cannot be loaded" in said.told
        assert traces(tmp_path) == [] and "Traceback" not in said.err


def test_the_same_run_in_another_process_writes_the_same_recipes(
    audited: dict[str, Any], place: Path
) -> None:
    module = importlib.util.spec_from_file_location("promises_worker", WORKER)
    assert module and module.loader
    held = importlib.util.module_from_spec(module)
    module.loader.exec_module(held)
    said = TINY.called(*held.words(place, place / "again"), "--trials", "4")
    assert said.code == 0, said.err
    assert timeless(place / "again") == timeless(place / "audited")
    assert len(timeless(place / "again")) > 4
    other = TINY.called(*held.words(place, place / "other"), "--trials", "4", "--seed", "1")
    assert other.code == 0
    assert timeless(place / "other") != timeless(place / "again")


def test_killed_and_run_again_the_files_are_those_of_a_run_that_nobody_disturbed(
    place: Path,
) -> None:
    folder = place / "killed"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    (folder / f"{_HOST}-{dead.pid}-0a{SUFFIX}").write_text("half a fi")
    assert worker("kill", place, folder)["deaths"] >= 4
    straight = place / "straight"
    assert timeless(folder) == timeless(straight) and len(timeless(folder)) > 4
    assert {name for name in TINY.snapshot(folder) if name.endswith(SUFFIX)} == set()
    tables = [rows(str(base / "study.db"), STUDY) for base in (folder, straight)]
    assert [row.choice for row in tables[0]] == [row.choice for row in tables[1]]
    assert [row.values for row in tables[0]] == [row.values for row in tables[1]]


def writes(path: Path) -> Iterator[str]:
    """Every place of a source that writes a file by itself."""
    told = {"write_text", "write_bytes", "save_file", "savez", "dump", "rename", "replace_file"}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        modes = [argument.value for argument in node.args[1:] if isinstance(argument, ast.Constant)]
        modes += [word.value.value for word in node.keywords
                  if word.arg == "mode" and isinstance(word.value, ast.Constant)]  # fmt: skip
        opens = name == "open" and any(set(str(mode)) & set("wax+") for mode in modes)
        if name in told or opens:
            yield f"{path.relative_to(ROOT)}:{node.lineno} {name}"


def test_only_files_py_writes_files() -> None:
    """Whatever goes through `write_atomic` is whole; nothing else may write.

    The demo model is converted in a folder of its own, which is then renamed; locks hold no data.
    """
    excepted = {"kvtune/files.py", "kvtune/demo.py"}
    found = [line for path in (ROOT / "kvtune").rglob("*.py") for line in writes(path)]
    assert {line.partition(":")[0] for line in found} >= {"kvtune/files.py"}
    assert [line for line in found if line.partition(":")[0] not in excepted] == []


@pytest.fixture
def bundle(place: Path, tmp_path: Path) -> Path:
    """A recipe bound to the tiny model, with a small artifact beside it."""
    model, _ = load_model(str(place / "model"), offline=True)
    known = facts(model.config)
    shape = known.layers[0].kv_heads, known.layers[0].head_dim
    means = {f"layer.{i}.keys.centre.mean": torch.ones(shape).half() for i in known.compressible()}
    digest = Artifact(means).save(tmp_path / "t.safetensors")
    (tmp_path / RECIPE_FILE).write_text(
        f"""kvtune = 1
[model]
name = "tiny"
fingerprint = "{fingerprint(model)}"
architecture = "{known.architecture}"
layers = {len(known.layers)}
kv_heads = {known.layers[0].kv_heads}
head_dim = {known.layers[0].head_dim}
[artifact]
file = "t.safetensors"
sha256 = "{digest}"
[[layers]]
span = "all"
kept.keys = [{{ use = "centre" }}, {{ use = "affine", bits = 4, group = "head", axis = "token" }}]
kept.values = []
"""
    )
    recipes.load(tmp_path)
    return tmp_path


def test_every_byte_of_a_recipes_tensors_is_watched(kv: Any, bundle: Path) -> None:
    file = bundle / "t.safetensors"
    sound = file.read_bytes()
    assert kv("recipe", "check", bundle).code == 0
    for place in range(len(sound)):
        broken = bytearray(sound)
        broken[place] ^= 1 << place % 8
        file.write_bytes(broken)
        said = kv("recipe", "check", bundle)
        assert said.code == 4 and "has changed" in said.told, place
    file.write_bytes(sound)
    assert kv("recipe", "check", bundle).code == 0


def test_every_bit_of_a_profile_is_watched(tmp_path: Path) -> None:
    file = tmp_path / "profile.safetensors"
    cells = (Cell(0, "keys", "[]", 4, 64),)
    made = Profile(cells, {"prices": torch.ones(1)}, {"model": "tiny", "sizes": [1, 2, 3]})
    made.save(file)
    sound = file.read_bytes()
    held = Profile.load(file)
    assert (held.cells, held.meta) == (cells, made.meta)
    for bit in range(8 * len(sound)):
        broken = bytearray(sound)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        with pytest.raises(IntegrityError):
            Profile.load(file)


def test_other_weights_of_the_same_shape_are_another_model(
    kv: Any, bundle: Path, place: Path, tmp_path: Path
) -> None:
    prompt = ("--prompt", "The assert", "--max-new-tokens", "3")
    assert kv("apply", bundle, "--model", place / "model", *prompt).code == 0
    other = TINY.tiny(tmp_path / "other", seed=1)
    said = kv("apply", bundle, "--model", other, *prompt)
    assert said.code == 4 and "tuned for tiny" in said.told


def test_out_of_memory_halves_the_batch_then_is_an_answer_and_the_search_goes_on(
    kv: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, halved = Bench._forward, list[int]()

    def scarce(self: Bench, policies: Any, chosen: list[int], memo: bool) -> Any:
        if len(chosen) > 1 or zlib.crc32(repr(policies).encode()) % 3 == 0:
            halved.append(len(chosen))
            raise torch.OutOfMemoryError("injected")
        return forward(self, policies, chosen, memo)

    monkeypatch.setattr(Bench, "_forward", scarce)
    folder, data = place / "scarce", ("--data", place / "text.txt")
    found = kv.json("tune", place / "model", "-o", folder, *TINY.QUICK, *data, "--trials", "8")
    assert found["ok"], found["error"]
    assert {1, 2} <= set(halved)
    told = rows(str(folder / "study.db"), STUDY)
    states = [row.state for row in told]
    assert len(told) >= 8 and {"complete", "infeasible"} == set(states)
    assert all("memory" in str(row.attrs) for row in told if row.state == "infeasible")
    assert (folder / "chosen" / RECIPE_FILE).is_file()
    assert found["data"]["points"]
    again = kv.json("tune", place / "model", "-o", folder, *TINY.QUICK, *data, "--trials", "8")
    assert again["data"]["points"] == found["data"]["points"]
