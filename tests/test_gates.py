"""Gates in CI: verdicts, JUnit XML and Markdown summaries, on a tiny model."""

from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import cli_tiny as TINY
import pytest
from markdown_it import MarkdownIt

from kvtune.cli.faults import Fault
from kvtune.cli.junit import junit
from kvtune.cli.markdown import markdown
from kvtune.cli.reports import STEP
from kvtune.cli.verdicts import HEADS, Report, Verdict

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
    """A folder with a model, a text and a recipe that has no window."""
    folder = tmp_path_factory.mktemp("gates")
    TINY.tiny(folder / "model")
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
