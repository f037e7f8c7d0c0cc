"""FindingCounts: one finding per code, with the count and the first places."""

from lorafit.data.checks.findings import EXAMPLES, FindingCounts
from lorafit.findings import Severity


def test_a_finding_speaks_for_all_its_rows() -> None:
    finding_counts = FindingCounts()
    for line in range(1, 9):
        finding_counts.add("D001", f"a.jsonl:{line}", f"fault {line}")
    (finding,) = finding_counts.findings({"D001"})
    assert finding.message == "broken JSON in 8 rows; the first: fault 1"
    assert (finding.severity, finding.count, finding.where) == (Severity.ERROR, 8, "a.jsonl:1")
    assert finding.examples == tuple(f"a.jsonl:{line}" for line in range(1, EXAMPLES + 1))


def test_one_sighting_is_told_in_full() -> None:
    finding_counts = FindingCounts()
    finding_counts.add("D041", "a.jsonl:3", "U+0007")
    (finding,) = finding_counts.findings(set())
    assert finding.message == "control characters in 1 row: U+0007"
    assert finding.severity is Severity.WARNING


def test_a_tally_survives_its_json() -> None:
    finding_counts = FindingCounts()
    finding_counts.add_all("D030", 1200, [("a:2", "of a:1"), ("a:3", "of a:1")])
    again = FindingCounts.from_dict(finding_counts.to_dict())
    assert again.findings(set()) == finding_counts.findings(set())
    assert again.findings(set())[0].message == "exact copies in 1,200 rows; the first: of a:1"
