"""Gates in CI: verdicts, JUnit XML, Markdown summaries and baselines, on a tiny model."""

import importlib.util
import json
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from markdown_it import MarkdownIt

from kvtune.baseline import SCHEMA
from kvtune.cli.faults import Fault
from kvtune.cli.junit import junit
from kvtune.cli.markdown import markdown
from kvtune.cli.reports import STEP
from kvtune.cli.verdicts import HEADS, Report, Verdict


def load_tiny() -> ModuleType:
    file = Path(__file__).with_name("cli_tiny.py")
    spec = importlib.util.spec_from_file_location("cli_tiny", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = load_tiny()
kv = TINY.kv
HOSTILE = (
    "a|b",
    "a\\|b\\",
    "<script>alert(1)</script>",
    "&amp; &lt;",
    "*a* _b_ `c` ~~d~~ $e$",
    "[a](https://example.org) ![b](c)",
    "# a\n| - | - |\n\n* b",
    "]]> <!-- --> <?x?>",
    "zero\x00bell\x07\ud800\uffff",
    "quote\" and 'apostrophe'",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models of one shape, a text and a recipe that has no window."""
    folder = tmp_path_factory.mktemp("gates")
    TINY.tiny(folder / "model")
    TINY.tiny(folder / "other", seed=1)
    TINY.text(folder / "text.txt")
    keys = '{ use = "affine", bits = 2, group = "head", axis = "token" }'
    table = f'[[layers]]\nspan = "all"\nkept.keys = [{keys}]\nkept.values = []\n'
    (folder / "two.toml").write_text(f"kvtune = 1\n{table}")
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


def suite_of(data: bytes) -> ET.Element:
    """Holds a file to what CI systems agree on about JUnit XML; returns its one suite."""
    root = ET.fromstring(data)
    assert root.tag == "testsuites" and [child.tag for child in root] == ["testsuite"]
    suite = root[0]
    assert suite.get("name")
    counted = {
        "tests": len(suite),
        "failures": len(suite.findall("testcase/failure")),
        "errors": len(suite.findall("testcase/error")),
        "skipped": 0,
    }
    assert {name: int(suite.attrib[name]) for name in counted} == counted
    assert all(root.get(name) in (None, suite.get(name)) for name in counted)
    total = 0.0
    for case in suite:
        assert case.tag == "testcase" and case.get("name") and case.get("classname")
        total += float(case.attrib["time"])
        tags = [child.tag for child in case]
        assert tags in (["system-out"], ["failure", "system-out"], ["error"])
        for child in case:
            assert child.text and child.text.strip()
            if child.tag != "system-out":
                assert child.get("message") and child.get("type")
    assert total == pytest.approx(float(suite.attrib["time"]), abs=0.01)
    assert len({(case.get("classname"), case.get("name")) for case in suite}) == len(suite)
    return suite


class Cells(HTMLParser):
    """Collects the rows of all tables, and every tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.text = ""
        self._open = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if self._open_on(tag):
            self.rows[-1].append("")

    def _open_on(self, tag: str) -> bool:
        self._open = tag in ("td", "th")
        return self._open

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open:
            self.rows[-1][-1] += data


def rendered(text: str) -> Cells:
    """Renders Markdown as GitHub does as far as tables and inline marks go."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return Cells(parser.render(text))


def words(cells: Cells) -> str:
    return " ".join(cells.text.split())


def example(name: str = "k8v4") -> Report:
    """A report of a gate that holds and one that does not, with a name of its own."""
    verdicts = [
        Verdict.of("max-kl", 0.01, 0.02, (0.005, 0.015)),
        Verdict.of("min-ratio", 1.5, 3.0, least=True),
    ]
    return Report(name, name, verdicts, [f"A line about {name}."], seconds=1.5)


def test_gates_that_hold_are_passing_cases_with_all_numbers(kv, proof, tmp_path):
    xml, summary = tmp_path / "new" / "junit.xml", tmp_path / "summary.md"
    limits = ("--max-kl", 9, "--max-flips", "100%", "--min-ratio", 1)
    files = ("--junit", xml, "--summary", summary)
    data = kv.json("apply", "k8v4", *proof, *limits, *files)["data"]
    suite = suite_of(xml.read_bytes())
    assert [case.get("name") for case in suite] == [gate["gate"] for gate in data["gates"]]
    assert suite.get("failures") == "0"
    verdicts = [Verdict(**gate) for gate in data["gates"]]
    for case, verdict in zip(suite, verdicts, strict=True):
        assert all(cell in case.findtext("system-out", "") for cell in verdict.cells() if cell)
    rows = rendered(summary.read_text()).rows
    assert rows == [list(HEADS), *(verdict.cells() for verdict in verdicts)]


def test_two_bit_keys_without_a_window_miss_a_gate_and_both_files_say_so(
    kv, place, proof, tmp_path
):
    xml, summary = tmp_path / "junit.xml", tmp_path / "summary.md"
    files = ("--junit", xml, "--summary", summary)
    said = kv("apply", place / "two.toml", *proof, "--max-kl", 0.05, "--min-ratio", 1.1, *files)
    assert said.code == 3 and "misses max-kl" in said.told
    suite = suite_of(xml.read_bytes())
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == ["max-kl"]
    assert "margin -" in suite[0].find("failure").get("message")
    shown = rendered(summary.read_text())
    assert [row[-1] for row in shown.rows[1:]] == ["FAILED", "ok"]
    assert "kvtune gates failed" in words(shown)


def test_a_proof_without_gates_is_one_passing_case(kv, proof, tmp_path):
    assert kv("apply", "k8v4", *proof, "--junit", tmp_path / "a", "--summary", tmp_path / "b") == (
        0,
        *kv("apply", "k8v4", *proof)[1:],
    )
    assert [case.get("name") for case in suite_of((tmp_path / "a").read_bytes())] == ["proof"]
    assert "true bits per value" in words(rendered((tmp_path / "b").read_text()))


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (("no-such-recipe",), 2),
        (("k8v4", "--context", "64k"), 2),
        (("k8v4", "--device", "cdua"), 2),
        (("k8v4", "--data", "no-such-text.txt"), 7),
        (("k8v4", "--baseline", "no-such-baseline.json"), 7),
        (("k8v4", "--prompt", "Why?"), 2),
    ],
)
def test_a_call_that_fails_before_measuring_is_an_error_in_both_files(
    kv, proof, tmp_path, given, code
):
    xml, summary = tmp_path / "junit.xml", tmp_path / "summary.md"
    recipe, *options = given
    said = kv("apply", recipe, *proof, *options, "--junit", xml, "--summary", summary)
    assert said.code == code
    (case,) = suite_of(xml.read_bytes())
    message = case.find("error").get("message")
    assert message and message in said.told
    assert words(rendered(f"{message}\n")) in words(rendered(summary.read_text()))


def test_an_interruption_and_a_crash_are_errors_in_both_files(kv, proof, monkeypatch, tmp_path):
    xml = tmp_path / "junit.xml"
    for error, code, kind in (
        (KeyboardInterrupt(), 130, "Interrupted"),
        (MemoryError(), 6, "ResourceError"),
        (ZeroDivisionError("oh"), 1, "ZeroDivisionError"),
    ):

        def broken(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("kvtune.prove.prove", broken)
        assert kv("apply", "k8v4", *proof, "--junit", xml).code == code
        assert suite_of(xml.read_bytes()).find("testcase/error").get("type") == kind


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(
    kv, monkeypatch, tmp_path
):
    monkeypatch.delenv(STEP, raising=False)
    asked = ("apply", "k8v4", "--model", "no-such-model")
    for given, hint in (
        (("--junit", tmp_path), "--junit"),
        (("--summary", tmp_path), "--summary"),
        (("--summary", "-"), "GitHub Actions"),
    ):
        said = kv(*asked, *given)
        assert said.code == 2 and hint in said.told


def test_the_first_error_is_told_when_the_files_cannot_be_written_either(kv, tmp_path):
    (tmp_path / "file").write_text("")
    xml = tmp_path / "file" / "junit.xml"
    found = kv.json("apply", "no-such-recipe", "--model", "demo", "--junit", xml)
    assert found["error"]["exit_code"] == 2
    assert "could not be written" in found["warnings"][0]


def test_a_dash_adds_to_the_summary_of_a_step_of_github_actions(kv, proof, monkeypatch, tmp_path):
    step = tmp_path / "step.md"
    step.write_text("# Before\n")
    monkeypatch.setenv(STEP, str(step))
    for count in (1, 2):
        assert kv("apply", "k8v4", *proof, "--max-kl", 9, "--summary", "-").code == 0
        shown = rendered(step.read_text())
        assert shown.tags.count("table") == count and shown.tags.count("h1") == 1
        assert len(shown.rows) == 2 * count


@pytest.mark.parametrize("text", HOSTILE)
def test_any_name_goes_through_xml_unchanged_but_for_what_xml_cannot_hold(text):
    report = example(text)
    report.lines = [text]
    for fault in (None, Fault("KeyError", text, text, 1)):
        report.fault = fault
        suite = suite_of(junit(report))
        allowed = text.replace("\x00", "\ufffd").replace("\x07", "\ufffd")
        allowed = allowed.replace("\ud800", "\ufffd").replace("\uffff", "\ufffd")
        assert suite.get("name") == f"{allowed} on {allowed}"
        told = "".join(suite.itertext())
        assert allowed in told


@pytest.mark.parametrize("text", [text for text in HOSTILE if "\x00" not in text])
def test_any_name_is_shown_as_it_is_by_markdown(text):
    report = example(text)
    report.verdicts.append(Verdict.of(text, 1.0, 2.0))
    for fault in (None, Fault("KeyError", text, "", 1)):
        report.fault = fault
        shown = rendered(markdown(report))
        plain = " ".join(text.split())
        assert words(shown).count(plain) >= 2
        allowed = {"h3", "p", "table", "thead", "tbody", "tr", "th", "td"}
        assert set(shown.tags) <= allowed
        assert all(len(row) == len(HEADS) for row in shown.rows)


def test_every_unit_is_that_of_its_gate():
    shown = {
        "max-kl": "0.01000",
        "max-flips": "1.00%",
        "min-ratio": "0.01x",
        "baseline-kl": "0.01000",
        "baseline-flips": "1.00%",
        "baseline-bytes": "0 bytes",
    }
    for gate, wanted in shown.items():
        assert Verdict.of(gate, 0.01, 1.0).shown(0.01) == wanted


def test_a_value_that_is_no_number_never_passes():
    for least in (False, True):
        assert not Verdict.of("max-kl", float("nan"), 1.0, least=least).passed


def test_the_same_recipe_is_never_worse_than_itself(kv, proof, kept):
    data = kv.json("apply", "k8v4", *proof, "--baseline", kept)["data"]
    assert data["baseline"]["how"] == "paired"
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
    xml = tmp_path / "junit.xml"
    found = kv.json("apply", "kivi-2", *proof, "--baseline", kept, "--junit", xml)
    assert found["error"]["exit_code"] == 3
    passed = {gate["gate"]: gate["passed"] for gate in found["data"]["gates"]}
    assert passed["baseline-bytes"] and not passed["baseline-kl"]
    assert suite_of(xml.read_bytes()).get("failures") == str(list(passed.values()).count(False))
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
