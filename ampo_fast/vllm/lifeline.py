"""python -m ampo_fast.vllm.lifeline COMMAND...: runs COMMAND in a process group that ends with whoever started it.

A trainer that is killed cannot stop its servers, and they would hold their GPUs for ever. The kernel closes the pipe to
our stdin at its death, whatever its cause; a trainer that lives closes it when it needs the server no longer. The command
is then asked to end, so that it takes its shared memory and sockets with it, and what is left of the group is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

GRACE_S = 10.0
"""From the end of stdin until all are killed, at most."""


def main(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    is_over = threading.Event()
    ender = threading.Thread(target=_end_with_stdin, args=(child, is_over), daemon=True)
    ender.start()
    signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    code = child.wait()
    if is_over.is_set():
        ender.join()  # until we are killed
    return code if code >= 0 else 128 - code


def _end_with_stdin(child: subprocess.Popen, is_over: threading.Event) -> None:
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    is_over.set()
    deadline = time.monotonic() + GRACE_S
    child.terminate()
    while time.monotonic() < deadline and _others_live():  # Python's resource tracker is the last, and clears up
        time.sleep(0.05)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _others_live() -> bool:
    """Whether the group has other processes; False where there is no /proc to tell."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == os.getpgid(0) and int(stat.parent.name) != os.getpid() and state != "Z":
                return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
