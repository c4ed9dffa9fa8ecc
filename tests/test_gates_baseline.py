"""A baseline on the command line: what is worse than an earlier proof fails, on a tiny model."""

import json
from typing import Any

import cli_tiny as TINY
import pytest

from kvtune.baseline import SCHEMA

kv = TINY.kv


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models of one shape, and a text."""
    folder = tmp_path_factory.mktemp("baseline")
    TINY.tiny(folder / "model")
    TINY.tiny(folder / "other", seed=1)
    TINY.text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def proof(place):
    """Options of a proof."""
    data = ("--data", place / "text.txt", "--bytes-at", "1k")
    return (*TINY.SMALL, *data, "--model", place / "model", "-q")


@pytest.fixture(scope="module")
def kept(place, proof):
    """A baseline of k8v4."""
    file = place / "base.json"
    said = TINY.called("apply", "k8v4", *proof, "--save-baseline", file)
    assert said.code == 0, said.err
    return file


def test_the_same_recipe_is_never_worse_than_itself(kv, proof, kept):
    again = ("apply", "k8v4", *proof, "--baseline", kept)
    data = kv.json(*again)["data"]
    assert data["baseline"]["how"] == "paired"
    assert any("2 sequences say little" in text for text in kv.json(*again)["warnings"])
    gates = {gate["gate"]: gate for gate in data["gates"]}
    assert set(gates) == {"baseline-kl", "baseline-flips", "baseline-bytes"}
    assert all(gate["passed"] for gate in gates.values())
    assert gates["baseline-kl"]["value"] == gates["baseline-flips"]["value"] == 0
    assert gates["baseline-bytes"]["margin"] == 0


def test_what_json_printed_is_a_baseline_too(kv, proof, tmp_path):
    file = tmp_path / "printed.json"
    file.write_text(kv("apply", "k8v4", *proof, "--json", "--max-kl", "0").out)
    assert json.loads(file.read_text())["error"]["type"] == "GateError"
    assert kv("apply", "k8v4", *proof, "--baseline", file).code == 0


def test_a_worse_recipe_fails_and_the_other_way_round_only_its_bytes_do(
    kv, place, proof, kept, tmp_path
):
    found = kv.json("apply", "kivi-2", *proof, "--baseline", kept)
    assert found["error"]["exit_code"] == 3
    passed = {gate["gate"]: gate["passed"] for gate in found["data"]["gates"]}
    assert passed["baseline-bytes"] and not passed["baseline-kl"]
    small = tmp_path / "small.json"
    assert kv("apply", "kivi-2", *proof, "--save-baseline", small).code == 0
    found = kv.json("apply", "k8v4", *proof, "--baseline", small)
    missed = [gate["gate"] for gate in found["data"]["gates"] if not gate["passed"]]
    assert missed == ["baseline-bytes"]
    grown = found["data"]["proof"]["bytes"] / found["data"]["baseline"]["proof"]["bytes"] - 1
    for slack, code in ((grown * 1.01, 0), (grown * 0.99, 3)):
        given = ("--baseline", small, "--baseline-slack", f"{100 * slack}%")
        assert kv("apply", "k8v4", *proof, *given).code == (code if slack <= 1 else 2)


def test_other_positions_are_compared_by_intervals_and_that_is_said(kv, proof, kept):
    found = kv.json("apply", "k8v4", *proof, "--sequences", 3, "--baseline", kept)
    assert found["ok"] and found["data"]["baseline"]["how"] == "intervals"
    assert "other positions" in found["warnings"][0]
    assert all(gate["interval"] is None for gate in found["data"]["gates"])
    found = kv.json("apply", "kivi-2", *proof, "--sequences", 3, "--baseline", kept)
    assert found["error"]["exit_code"] == 3


@pytest.mark.parametrize(
    "given",
    [("--context", "128"), ("--continuation", "8"), ("--bytes-at", "512"), ("--batch", "2")],
)
def test_a_baseline_of_other_sizes_is_refused_by_the_option_that_differs(kv, proof, kept, given):
    said = kv("apply", "k8v4", *proof, *given, "--baseline", kept)
    assert said.code == 2
    assert f"measured with {given[0]} " in said.told and f"this would be {given[1]}" in said.told


def test_a_baseline_of_another_model_is_refused(kv, place, proof, kept):
    said = kv("apply", "k8v4", *proof, "--model", place / "other", "--baseline", kept)
    assert said.code == 4
    assert "baseline is of model" in said.told and "--save-baseline" in said.told


def broken(whole: dict[str, Any]) -> list[str]:
    """A baseline without each of its parts in turn, and with values of the wrong kind."""
    found = ["", "[]", "null", "{", '"text"', "[" * 100_000, json.dumps(whole)[:-40]]
    for part in ("", "proof", "evidence"):
        for name in whole[part] if part else whole:
            copy = json.loads(json.dumps(whole))
            del (copy[part] if part else copy)[name]
            if name != "rows" or part != "proof":
                found.append(json.dumps(copy))
    for part, name, value in (
        ("proof", "kl", "NaN"),
        ("proof", "bytes", None),
        ("proof", "positions", 7),
        ("evidence", "rows", [[0.1, "x"]]),
        ("evidence", "rows", [[0.1, 0.2, 0.3]]),
        ("evidence", "rows", []),
    ):
        copy = json.loads(json.dumps(whole))
        copy[part][name] = value
        found.append(json.dumps(copy).replace('"NaN"', "NaN"))
    return [*found, json.dumps(whole | {"schema": "kvtune.tune/1"})]


def test_a_damaged_baseline_is_refused_and_named(kv, proof, kept, tmp_path):
    file = tmp_path / "broken.json"
    texts = broken(json.loads(kept.read_text()))
    assert len(texts) > 30
    for text in texts:
        file.write_text(text)
        said = kv("apply", "k8v4", *proof, "--baseline", file)
        assert said.code == 4, text[:200]
        assert "broken.json is no baseline, or damaged" in said.told
        assert "Traceback" not in said.err
    file.write_bytes(b"\xff\xfe\x00")
    assert kv("apply", "k8v4", *proof, "--baseline", file).code == 4


def test_a_baseline_is_kept_only_when_its_gates_hold(kv, proof, tmp_path):
    file = tmp_path / "base.json"
    given = ("--save-baseline", file, "--max-kl")
    assert kv("apply", "kivi-2", *proof, *given, 0).code == 3
    assert not file.exists()
    assert kv("apply", "kivi-2", *proof, *given, 9).code == 0
    assert json.loads(file.read_text())["schema"] == SCHEMA
