"""docs/faults.md names tests that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_fault_has_a_test():
    rows = [line for line in (ROOT / "docs/faults.md").read_text().splitlines() if line.startswith("|")]
    faults = rows[next(i for i, row in enumerate(rows) if row.startswith("| fault")) + 2 :]
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(faults) >= 25
    for row in faults:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and set(named) <= defined, row
