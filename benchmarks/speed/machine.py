"""The machine in words, and the moment: what a figure means nothing without."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Processor, cores, memory in GiB, system and Python."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def measured_now() -> dict[str, Any]:
    """When, and on which commit: what may differ between two figures of one record."""
    changed = _git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        "jaxpeft",
        "benchmarks",
        ":(exclude)*.json",
        ":(exclude)*.md",
    )
    commit = (_git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+changes" if changed else "")
    return {"at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "commit": commit}


def _git(*args: str) -> str:
    root = str(Path(__file__).parents[2])
    try:
        return subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a bare machine has no git
        return ""


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
