"""The costly verbs on a tiny random model: tune, calibrate, search and apply, from end to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cli_tiny as TINY
import pytest

from kvtune.cli.options import Aim, Text
from kvtune.search import Limits
from kvtune.tune import Settings

ROOT = Path(__file__).resolve().parents[1]


kv = TINY.kv


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models of one shape and a text."""
    folder = tmp_path_factory.mktemp("cli")
    TINY.tiny(folder / "model")
    TINY.tiny(folder / "other", seed=1)
    TINY.text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def sizes(place):
    """Options of the costly verbs."""
    return (*TINY.QUICK, "--data", str(place / "text.txt"))


@pytest.fixture
def proof(place):
    """Options of a proof."""
    data = ("--data", place / "text.txt", "--bytes-at", "1k")
    return (*TINY.SMALL, *data, "--model", place / "model")


@pytest.fixture(scope="module")
def tuned(place, sizes):
    """A finished run folder, and what its run said."""
    words = ["tune", place / "model", "-o", place / "run", *sizes, "--trials", "4"]
    return place / "run", TINY.called(*words)


@pytest.fixture(scope="module")
def calibrated(place, sizes, tmp_path_factory):
    """A run folder with a profile and nothing else."""
    folder = tmp_path_factory.mktemp("calibrated")
    said = TINY.called(
        "calibrate", place / "model", "-o", folder, *sizes[:-4], *sizes[-2:], "--exact"
    )
    assert said.code == 0, said.err
    return folder


def test_tune_prints_a_table_and_speaks_of_progress_on_stderr(tuned):
    folder, done = tuned
    assert done.code == 0, done.err
    assert "best uniform" in done.out and "  * " in done.out
    assert f"kvtune apply {folder / 'chosen'} --model " in done.out
    stages = [line.split(" 1/")[0] for line in done.err.splitlines()]
    assert {"dense pass", "trials", "held-out text", "proof by generation"} <= set(stages)
    assert "\x1b" not in done.out + done.err


def test_tune_leaves_a_whole_run_folder(tuned):
    folder, _ = tuned
    files = TINY.snapshot(folder)
    wanted = {"profile.safetensors", "study.db", "run.json", "chosen/recipe.toml", "front/00.toml"}
    assert wanted <= set(files)
    assert not [name for name in files if name.endswith("kvtune-tmp")]


def test_tune_again_reads_back_what_is_there(kv, tuned, place, sizes):
    folder, _ = tuned
    before = TINY.snapshot(folder)
    found = kv.json("tune", place / "model", "-o", folder, *sizes, "--trials", 4)
    assert found["ok"]
    assert "finished run reused" in found["data"]["seconds"]
    after = TINY.snapshot(folder)
    assert {name for name in before if before[name] != after[name]} == set()
    assert found["data"]["next"] in tuned[1].out


def test_the_table_and_json_hold_the_same_points(kv, tuned, place, sizes):
    folder, done = tuned
    data = kv.json("tune", place / "model", "-o", folder, *sizes, "--trials", 4, "-q")["data"]
    for point in data["points"]:
        assert f"{point['bits']:.2f}" in done.out
        assert f"{point['kl_low']:.5f} to {point['kl_high']:.5f}" in done.out
    assert (folder / data["points"][data["chosen"]]["file"]).read_bytes() == (
        folder / "chosen" / "recipe.toml"
    ).read_bytes()


def test_a_recipe_that_names_a_model_is_weighed_without_it(kv, tuned, place, sizes):
    folder, _ = tuned
    shown = kv.json("recipe", "show", folder / "chosen")["data"]
    for name in ("bytes", "ratio", "bits"):
        assert shown["stored"][name] == pytest.approx(shown["measured"][name], rel=1e-5)
    assert "Tuned for model." in kv("recipe", "show", folder / "chosen").out
    assert kv("recipe", "check", folder / "chosen").code == 0
    compared = kv.json("recipe", "diff", folder / "front" / "00.toml", folder / "chosen")["data"]
    assert compared["measured"]["left"].keys() == compared["measured"]["right"].keys()


def test_gates_that_hold_exit_with_0_and_say_by_how_much(kv, proof):
    found = kv.json("apply", "k8v4", *proof, "--max-kl", 9, "--max-flips", "100%", "--min-ratio", 1)
    gates = found["data"]["gates"]
    assert [gate["gate"] for gate in gates] == ["max-kl", "max-flips", "min-ratio"]
    assert all(gate["passed"] and gate["margin"] >= 0 for gate in gates)
    assert gates[0]["interval"][0] <= gates[0]["value"] <= gates[0]["interval"][1]
    assert gates[2]["interval"] is None


def test_a_gate_that_fails_exits_with_3_and_still_shows_all_numbers(kv, proof):
    words = ("apply", "kivi-2", *proof, "--max-kl", "0.0001", "--min-ratio", "1.5")
    said = kv(*words)
    assert said.code == 3
    assert "misses max-kl" in said.told
    assert "FAILED" in said.out and "min-ratio" in said.out
    found = kv.json(*words)
    assert found["error"]["exit_code"] == 3
    assert [gate["passed"] for gate in found["data"]["gates"]] == [False, True]


def test_apply_generates_text_and_says_what_the_cache_took(kv, tuned, place):
    words = ("apply", tuned[0] / "chosen", "--model", place / "model", "--prompt", "The assert")
    said = kv(*words, "--max-new-tokens", "400")
    assert said.code == 0
    assert said.out.strip()
    assert "smaller" in said.told and "in 16 bit" in said.told
    data = kv.json(*words, "--max-new-tokens", "400", "--chat")["data"]
    assert data["new_tokens"] == 400
    assert 0 < data["bytes"] < data["dense_bytes"]
    assert data["held_bytes"] > 0
    assert kv.json(*words, "--max-new-tokens", "2k")["error"]["exit_code"] == 2


def test_an_empty_recipe_says_what_the_model_says(kv, place):
    words = ("--model", place / "model", "--prompt", "The assert", "--max-new-tokens", "40")
    assert kv.json("apply", "empty", *words)["data"]["ratio"] == 1
    assert kv("apply", "empty", *words).out == kv("apply", "empty", *words).out


def test_a_recipe_for_another_model_exits_with_4_and_force_says_so(kv, tuned, place):
    words = ("apply", tuned[0] / "chosen", "--model", place / "other", "--prompt", "The")
    said = kv(*words)
    assert said.code == 4
    assert "tuned for model" in said.told and "--force" in said.told
    forced = kv.json(*words, "--force", "--max-new-tokens", "5")
    assert forced["ok"]
    assert "another model" in forced["warnings"][0]
    assert "Warning: --force" in kv(*words, "--force", "--max-new-tokens", "5").told


def test_calibrate_compares_prices_with_exact_forwards(kv, calibrated, place, sizes):
    said = kv("calibrate", place / "model", "-o", calibrated, *sizes, "--exact")
    assert said.code == 0
    assert "profile reused" in said.err
    assert "Spearman" in said.out and "layer" in said.out
    data = kv.json("calibrate", place / "model", "-o", calibrated, *sizes, "--exact")["data"]
    assert data["cells"] == 16
    assert {"price", "exact"} <= data["seconds"].keys()
    assert data["spearman"]["all"] > 0.5
    assert [row["layer"] for row in data["layers"]] == [0, 1]
    assert data["layers"][0]["keys_setting"].startswith("affine(bits=2")


@pytest.mark.parametrize("verb", ["tune", "calibrate"])
def test_a_dry_run_says_what_would_run_and_writes_nothing(kv, place, sizes, tmp_path, verb):
    words = (verb, place / "model", "-o", tmp_path / "run", *sizes, "--dry-run")
    data = kv.json(*words)["data"]
    assert data["layers"] == 2 and data["cells"] == 16
    assert data["dense_bytes"] == 2 * 2 * 2 * 64 * 1024
    assert data["downloads"] == []
    said = kv(*words)
    assert "Would run: 16 priced cells" in said.out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_the_demo_needs_no_weights(kv, monkeypatch, tmp_path):
    monkeypatch.setenv("KVTUNE_HOME", str(tmp_path))
    data = kv.json("tune", "demo", "--dry-run")["data"]
    assert data["layers"] == 30
    assert data["dense_bytes"] == 2 * 2 * 30 * 3 * 64 * 8192
    assert "demo model" in data["downloads"][0]
    assert not list(tmp_path.iterdir())


def test_a_template_is_taken_by_its_path_and_more_cells_are_priced(kv, place, sizes, tmp_path):
    template = tmp_path / "mine.toml"
    table = '{ use = "affine", bits = "search", axis = "token" }'
    body = f'[[layers]]\nspan = "all"\nrecent = 32\nkept.keys = [{table}]\nkept.values = [{table}]'
    template.write_text(f"kvtune = 1\n{body}\n")
    words = ("calibrate", place / "model", "-o", tmp_path / "run")
    options = [*sizes[: sizes.index("--template")], "--data", place / "text.txt"]
    assert kv.json(*words, *options, "--template", "search-kivi")["data"]["cells"] == 16
    data = kv.json(*words, *options, "--template", template)["data"]
    assert data["cells"] == 16
    assert "axis=token" in data["layers"][0]["keys_setting"]


def search(folder: Path, *words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "kvtune", "search", str(folder), *words]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def stopped(process: subprocess.Popen[str], number: signal.Signals, at: str) -> tuple[int, str]:
    """Sends a signal once a line about `at` is out; returns the exit code and all of stderr."""
    heard = ""
    with process:
        assert process.stderr
        for line in process.stderr:
            heard += line
            if line.startswith(at):
                process.send_signal(number)
                break
        heard += process.stderr.read()
    return process.returncode, heard


def test_ctrl_c_saves_and_says_how_to_go_on_and_resume_finishes(kv, calibrated):
    folder = calibrated
    first = search(folder, "--trials", "30")
    code, heard = stopped(first, signal.SIGINT, "trials")
    assert code == 130, heard
    assert f"kvtune search {folder} --trials 30 --resume" in heard
    refused = kv("search", folder, "--trials", 30)
    assert refused.code == 2 and "--resume" in refused.told
    second = search(folder, "--trials", "30", "--resume")
    code, heard = stopped(second, signal.SIGTERM, "dense pass")
    assert code == 130, heard
    found = kv.json("search", folder, "--trials", 30, "--resume", "-q")
    assert found["ok"], found["error"]
    assert (folder / found["data"]["points"][0]["file"]).is_file()
    assert (
        kv.json("search", folder, "--trials", 30, "--resume")["data"]["points"]
        == (found["data"]["points"])
    )


def test_search_stops_when_its_time_is_over_and_fresh_starts_anew(kv, calibrated):
    words = ("search", calibrated, "--trials", 500, "--fresh", "-q")
    began = time.monotonic()
    found = kv.json(*words, "--time", "0.1s")
    assert found["ok"]
    assert time.monotonic() - began < 60


def test_the_options_start_from_the_defaults_of_the_library():
    assert Aim().trials == Limits("").trials
    assert Aim().choose_within == Settings().max_kl
    assert Aim().objective == ",".join(Settings().goal.objectives)
    assert Text().context == Settings().sizes.context
    assert Text().sequences == Settings().sizes.sequences


def test_search_needs_a_calibrated_folder(kv, tmp_path):
    said = kv("search", tmp_path)
    assert said.code == 7
    assert f"kvtune calibrate MODEL -o {tmp_path}" in said.err.replace("\n", "")


def test_bench_times_trials_behind_each_context(kv, place):
    said = kv.json(
        *("bench", "trials"),
        place / "model",
        *("--data", place / "text.txt", "--sequences", "2", "--continuation", "16"),
        *("--contexts", "128,256"),
    )
    assert [row["context"] for row in said["data"]["trials"]] == [128, 256]
