"""A comparison as JUnit XML: a test per cell and metric, and one per verdict on parity."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from reports.verdict.comparison import Comparison, Judged, Line
from reports.verdict.decision import SLOWER, UNDECIDED
from reports.verdict.render import ratio_text

#: Characters that XML 1.0 cannot hold.
_FORBIDDEN = dict.fromkeys((*range(9), 11, 12, *range(14, 32)), " ")


def as_junit(found: Comparison, strict: bool = False) -> str:
    """SLOWER and what fails parity are failures; UNDECIDED and missing cells are skipped, or failures if ``strict``."""
    suite = ET.Element("testsuite", name="rwkv-bench compare")
    properties = ET.SubElement(suite, "properties")
    for name, value in (("base", found.names[0]), ("head", found.names[1]), ("conclusion", found.conclusion)):
        ET.SubElement(properties, "property", name=name, value=_clean(value))
    for cell in found.parity:
        _verdict(suite, cell)
    for line in found.lines:
        _speed(suite, line, strict)
    for name in found.missing:
        case = _case(suite, "missing", name)
        ET.SubElement(case, "failure" if strict else "skipped", message="in base, not in head")
    counts = {kind: len(suite.findall(f"testcase/{kind}")) for kind in ("failure", "skipped")}
    suite.attrib.update(
        tests=str(len(suite.findall("testcase"))),
        failures=str(counts["failure"]),
        errors="0",
        skipped=str(counts["skipped"]),
        time="0",
    )
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _verdict(suite: ET.Element, cell: Judged) -> None:
    case = _case(suite, _class(cell.names), "parity")
    if cell.regression:
        failure = ET.SubElement(case, "failure", message=_clean(f"{cell.base} in base, {cell.head} in head"))
        failure.text = _clean(cell.why)
    elif cell.head != "PASS":
        ET.SubElement(case, "skipped", message=_clean(f"{cell.base} in base, {cell.head} in head: {cell.why}"))


def _speed(suite: ET.Element, line: Line, strict: bool) -> None:
    case = _case(suite, _class(line.names), line.metric)
    answer = line.answer
    text = _clean(f"{answer.decision}: {ratio_text(answer)}{'; ' * bool(answer.why)}{answer.why}")
    if answer.decision == SLOWER or (strict and answer.decision == UNDECIDED):
        ET.SubElement(case, "failure", message=text)
    elif answer.decision == UNDECIDED:
        ET.SubElement(case, "skipped", message=text)
    else:
        ET.SubElement(case, "system-out").text = text


def _case(suite: ET.Element, of: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=_clean(of), name=_clean(name), time="0")


def _class(names: object) -> str:
    found = dict(names)  # type: ignore[call-overload]
    return ".".join(str(value).replace(".", "_") for value in found.values() if value)


def _clean(text: str) -> str:
    return text.translate(_FORBIDDEN)
