"""The workflow in README is what GitHub Actions takes, and its kvtune command is one that runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest
import yaml

from kvtune.cli.reports import STEP

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
MODEL, RECIPE, BASELINE = "Qwen/Qwen3-0.6B", "qwen/chosen", "qwen/baseline.json"


kv = TINY.kv


def workflow() -> dict[Any, Any]:
    """The one YAML block of README."""
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    found: dict[Any, Any] = yaml.safe_load(block)
    return found


def steps() -> list[dict[str, Any]]:
    (job,) = workflow()["jobs"].values()
    return list(job["steps"])


def commands() -> list[list[str]]:
    """Every kvtune command line of the section, as words: the workflow's first."""
    said = [step["run"] for step in steps() if "run" in step]
    section = README.split("## In CI")[1].split("\n## ")[0].rpartition("```")[2]
    said += re.findall(r"`(kvtune apply [^`]+)`", section)
    return [shlex.split(line)[1:] for line in said if line.startswith("kvtune ")]


def test_the_workflow_has_all_that_github_actions_asks_for() -> None:
    found = workflow()
    # YAML 1.1 reads a bare `on` as true; GitHub does not
    assert set(found) == {"name", True, "jobs"}
    assert found[True] == ["pull_request"]
    (job,) = found["jobs"].values()
    assert set(job) == {"runs-on", "steps"}
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert set(step) <= {"uses", "run", "with", "if"}
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/checkout@v1"))
        assert step.get("with", {}).keys() <= {"python-version", "name", "path"}
    assert "\n" not in job["steps"][3]["run"].strip()
    assert job["steps"][-1]["if"] == "always()"
    (upload,) = [step["with"] for step in job["steps"] if "upload" in step.get("uses", "")]
    assert upload["path"] in commands()[0]


def test_the_section_is_short() -> None:
    assert README.split("## In CI")[1].split("\n## ")[0].count("\n") < 40


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tiny model, and a text that is long enough for the usual sizes."""
    TINY.tiny(tmp_path / "model")
    TINY.text(tmp_path / "text.txt")
    return tmp_path


def test_its_commands_run_on_a_tiny_model(
    kv: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv(STEP, str(place / "step.md"))
    gate, keep = commands()
    names = {MODEL: "model", RECIPE: "k8v4"}
    for command in (keep, gate):
        words = [names.get(word, word) for word in command]
        if command is gate:
            assert "--min-ratio" in words
            words[words.index("--min-ratio") + 1] = "1"  # a short cache is mostly window
        said = kv(*words, "--data", "text.txt", *TINY.SMALL)
        assert said.code == 0, said.err
        assert (place / BASELINE).is_file()
    assert (place / "junit.xml").is_file()
    assert "baseline-kl" in (place / "step.md").read_text()
