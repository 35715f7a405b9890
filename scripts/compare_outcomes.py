"""Compares two runs of the same tests, test by test: exit code 1 if one passes in the first and not in the second.

python scripts/compare_outcomes.py WITHOUT.xml WITH.xml
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter

PASSED = "passed"


def outcomes(path: str) -> dict[str, tuple[str, str]]:
    """Reads pytest's JUnit file: of each test its outcome and the first line of what was wrong."""
    found = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcome, message = PASSED, ""
        for part in case:
            if part.tag in ("failure", "error", "skipped"):
                outcome, message = part.tag, part.get("message", "").partition("\n")[0]
        found[f"{case.get('classname')}.{case.get('name')}"] = outcome, message
    return found


def main() -> None:
    """Prints the counts and every test whose outcome differs."""
    without, with_it = (outcomes(path) for path in sys.argv[1:3])
    for name, found in (("without", without), ("with", with_it)):
        counts = Counter(outcome for outcome, _ in found.values())
        print(f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}")
    broken = 0
    for test in sorted(without.keys() | with_it.keys()):
        before, after = (found.get(test, ("not run", "")) for found in (without, with_it))
        if before[0] != after[0]:
            print(f"{test}: {before[0]} without, {after[0]} with: {after[1] or before[1]}")
            broken += before[0] == PASSED
    print(f"{broken} tests pass without the plugin and not with it")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
