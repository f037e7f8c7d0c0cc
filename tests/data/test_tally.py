"""Tally: one finding per code, with the count and the first places."""

from lorafit.data.tally import EXAMPLES, Tally
from lorafit.findings import Severity


def test_a_finding_speaks_for_all_its_rows() -> None:
    tally = Tally()
    for line in range(1, 9):
        tally.add("D001", f"a.jsonl:{line}", f"fault {line}")
    (finding,) = tally.findings({"D001"})
    assert finding.message == "broken JSON in 8 rows; the first: fault 1"
    assert (finding.severity, finding.count, finding.where) == (Severity.ERROR, 8, "a.jsonl:1")
    assert finding.examples == tuple(f"a.jsonl:{line}" for line in range(1, EXAMPLES + 1))


def test_one_sighting_is_told_in_full() -> None:
    tally = Tally()
    tally.add("D041", "a.jsonl:3", "U+0007")
    (finding,) = tally.findings(set())
    assert finding.message == "control characters in 1 row: U+0007"
    assert finding.severity is Severity.WARNING


def test_a_tally_survives_its_json() -> None:
    tally = Tally()
    tally.add_all("D030", 1200, [("a:2", "of a:1"), ("a:3", "of a:1")])
    again = Tally.from_dict(tally.to_dict())
    assert again.findings(set()) == tally.findings(set())
    assert again.findings(set())[0].message == "exact copies in 1,200 rows; the first: of a:1"
