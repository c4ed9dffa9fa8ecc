"""A report as JUnit XML: one test case for each gate, as CI systems read it."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from kvtune.cli.verdicts import Report, Verdict

# what XML 1.0 cannot hold, not even escaped
_UNFIT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
SUITE = "kvtune apply"


def junit(report: Report) -> bytes:
    """The whole file. A call that measured nothing is one case, with an error."""
    root = ET.Element("testsuites", name=SUITE)
    suite = ET.SubElement(root, "testsuite")
    # a dot would be taken for a package
    owner = f"kvtune.apply.{_fit(report.recipe).replace('.', '_')}"
    if report.fault is None:
        share = report.seconds / max(1, len(report.verdicts))  # one proof serves all gates
        for verdict in report.verdicts:
            _gate(_case(suite, owner, verdict.gate, share), verdict, report.lines)
        if not report.verdicts:
            _child(_case(suite, owner, "proof", share), "system-out", "\n".join(report.lines))
    else:
        fault = report.fault
        case = _case(suite, owner, "proof", report.seconds)
        told = f"{fault.what}\n{fault.hint}".strip()
        _child(case, "error", told, message=_fit(fault.what), type=fault.type)
    _count(root, suite, report)
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _count(root: ET.Element, suite: ET.Element, report: Report) -> None:
    numbers = {
        "tests": str(len(suite)),
        "failures": str(len(report.failed) if report.fault is None else 0),
        "errors": str(int(report.fault is not None)),
        "time": f"{report.seconds:.3f}",
    }
    root.attrib.update(numbers)
    named = f"{report.recipe} on {report.model}"
    suite.attrib.update({"name": _fit(named), **numbers, "skipped": "0"})


def _case(suite: ET.Element, owner: str, name: str, seconds: float) -> ET.Element:
    named = {"classname": owner, "name": _fit(name), "time": f"{seconds:.3f}"}
    return ET.SubElement(suite, "testcase", named)


def _gate(case: ET.Element, verdict: Verdict, lines: list[str]) -> None:
    told = verdict.sentence()
    if not verdict.passed:
        _child(case, "failure", told, message=_fit(told), type="GateError")
    _child(case, "system-out", "\n".join([told, *lines]))


def _child(case: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(case, tag, attributes).text = _fit(text)


def _fit(text: str) -> str:
    return _UNFIT.sub("\ufffd", text)
