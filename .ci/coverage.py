"""Bounds of line coverage: python .ci/coverage.py coverage.json

Reads the JSON report of coverage.py. Prints nothing and exits with status 0 if every bound is met, so that pytest's own last line
stays the last line of the output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

BOUNDS = {"": 90.0, "adapters/": 100.0, "pruning/": 100.0, "quantization/": 100.0}
"""Folder of the package → the least percentage of its lines that the tests must run."""


def missed(report: Mapping[str, Any]) -> list[str]:
    """A line of text for each bound that is missed, with the lines that no test ran where the bound is 100 %."""
    messages = []
    for folder, least in BOUNDS.items():
        files = {name: file for name, file in report["files"].items() if name.startswith(f"jaxpeft/{folder}")}
        if not files:
            messages.append(f"jaxpeft/{folder}: not in the report")
            continue
        statements = sum(file["summary"]["num_statements"] for file in files.values())
        covered = sum(file["summary"]["covered_lines"] for file in files.values())
        percent = 100 * covered / max(statements, 1)
        if percent < least:
            messages.append(f"jaxpeft/{folder}: {percent:.1f} % of lines are covered, at least {least:g} % is required")
            if least == 100:
                lines = {name: file["missing_lines"] for name, file in files.items() if file["missing_lines"]}
                messages += [f"  {name}: lines {', '.join(map(str, numbers))}" for name, numbers in lines.items()]
    return messages


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        found = missed(json.load(file))
    sys.exit("\n".join(found) if found else 0)
