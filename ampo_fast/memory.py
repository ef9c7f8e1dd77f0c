"""What memory a process has held."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_rss_mib() -> float:
    """This process's highest resident memory so far, in MiB.

    On Linux not getrusage's, which starts at that of the process that forked it.
    """
    try:
        return status_kib("VmHWM") / 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes


def status_kib(field: str) -> int:
    """A field of /proc/self/status. Raises OSError where the kernel does not tell it (not Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
