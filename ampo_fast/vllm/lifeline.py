"""python -m ampo_fast.vllm.lifeline COMMAND...: runs COMMAND in a process group that dies with whoever started it.

A trainer that is killed cannot stop its servers, and they would hold their GPUs for ever. The kernel closes the pipe to
our stdin at its death, whatever its cause: then the whole group is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress


def main(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_kill_at_end_of_stdin, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    code = child.wait()
    return code if code >= 0 else 128 - code


def _kill_at_end_of_stdin() -> None:
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
