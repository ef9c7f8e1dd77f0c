"""Weights from GPU to GPU through vLLM's own weight-transfer API: init once, then start, update and finish for each version.

vLLM's trainer side opens an NCCL group with the workers of one server and broadcasts into it, while the server is told over
HTTP what to expect. This has been run against stand-ins of both sides only, never on a GPU: rollout.options.transfer =
"nccl" asks for it, "file" (the default) needs nothing of the kind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ampo_fast.engine_config import VllmConfig
from ampo_fast.http_client import HttpError, JsonClient
from ampo_fast.vllm.process import free_port

ROUTES = {
    "init": "/init_weight_transfer_engine",
    "start": "/start_weight_update",
    "update": "/update_weights",
    "finish": "/finish_weight_update",
}
Weights = Iterable[tuple[str, torch.Tensor]]
"""Can be iterated more than once."""


class WeightTransfer:
    """One server's NCCL group with this process; `api` is engine.transfer_api()."""

    def __init__(self, api: Any, name: str, client: JsonClient, options: VllmConfig, dtype: torch.dtype) -> None:
        self._api, self._name, self._options = api, name, options
        self._world_size = 1 + _num_workers(name, client)
        self._calls = _ServerCalls(client, options.sync_timeout_s)
        self._source = make_source(api, dtype)
        self._sender: Any = None

    def send(self, version: int, weights: Weights) -> None:
        """Hands all weights to the server as `version`. Raises HttpError, not to be repeated, on failure or sync_timeout_s.

        A broadcast that broke off leaves both sides inside NCCL: the group cannot be used again.
        """
        self._calls.version, self._source.weights = str(version), weights
        error = _run_bounded(self._send, self._options.sync_timeout_s)
        self._source.weights = ()
        if error is not None:
            raise HttpError(f"{self._name} did not take version {version} over NCCL: {error}", False)

    def _send(self) -> None:
        if self._sender is None:
            host = self._options.transfer_host
            info = self._api.TrainerInfo(
                rank=0, master_address=host, master_port=free_port(host), world_size=self._world_size
            )
            self._sender = self._api.Factory.trainer_init(info, client=self._calls, source=self._source)
        self._sender.send_weights()


class _ServerCalls:
    """The four calls that vLLM's trainer side makes of its client; the version goes along with the last."""

    def __init__(self, client: JsonClient, timeout_s: float) -> None:
        self._client, self._timeout_s = client, timeout_s
        self.version = ""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("init", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("start", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._post("update", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish", {"weight_version": weight_version or self.version})

    def _post(self, call: str, body: dict[str, Any]) -> None:
        self._client.post(ROUTES[call], body, timeout_s=self._timeout_s)


def _num_workers(name: str, client: JsonClient) -> int:
    """Workers of a server that takes weights over NCCL. Raises ValueError where it does not."""
    paths = (client.get("/openapi.json") or {}).get("paths", {})
    missing = [route for route in ROUTES.values() if route not in paths]
    config = (client.get("/server_info?config_format=json") or {}).get("vllm_config", {})
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    if missing or backend != "nccl":
        what = f"has no {', '.join(missing)}" if missing else f"has weight_transfer_config.backend = {backend!r}"
        raise ValueError(
            f'rollout.options.transfer = "nccl", but {name} {what}; start it with --weight-transfer-config '
            '\'{"backend": "nccl"}\' and VLLM_SERVER_DEV_MODE=1, or set rollout.options.transfer = "file"'
        )
    parallel = config.get("parallel_config") or {}
    return int(parallel.get("world_size", 1)) * int(parallel.get("data_parallel_size", 1))


def make_source(api: Any, dtype: torch.dtype) -> Any:
    """vLLM's WeightSource over `weights`, which the caller sets for each version."""

    class Source(api.WeightSource):
        """The newest weights, in vLLM's two channels: what will come, and the tensors, cast one at a time."""

        weights: Weights = ()
        _metadata: list[Any] | None = None

        def metadata(self) -> list[Any]:
            if self._metadata is None:  # the same for every version: a sharded policy is gathered once for it
                self._metadata = [api.ParamMeta(name, dtype, tuple(tensor.shape)) for name, tensor in self.weights]
            return self._metadata

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return ((name, tensor.detach().to(dtype)) for name, tensor in self.weights)

    return Source()


def _run_bounded(call: Callable[[], None], timeout_s: float) -> Exception | str | None:
    """What call() raised, or that it took too long; a thread in NCCL cannot be ended, so it is left behind."""
    failure: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # whatever NCCL, the server or vLLM raise ends the transfer
            failure.append(error)

    thread = threading.Thread(target=run, name="weight-transfer", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        return f"no end within rollout.options.sync_timeout_s = {timeout_s:g}"
    return failure[0] if failure else None
