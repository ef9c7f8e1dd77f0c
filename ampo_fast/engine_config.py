"""What only some engines and scorers ask for: the fields of rollout.options and reward.options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from ampo_fast.config import Count, Positive, Section, Share, problem_lines
from ampo_fast.urls import checked_url, is_loopback

Seconds = Annotated[float, Field(gt=0.0)]
AnySection = TypeVar("AnySection", bound=Section)


class VllmConfig(Section):
    """rollout.engine = "vllm" (in this process) and "vllm-server" (vllm serve, started here or running already)."""

    base_urls: tuple[str, ...] = Field((), description="Servers that run already; empty: start `replicas` of them.")
    replicas: Positive = Field(1, description="Servers to start; each has the whole model.")
    devices: tuple[str, ...] = Field(
        (),
        description='CUDA_VISIBLE_DEVICES of each started server: ("1", "2,3"); several split its model (tensor parallel).',
    )
    host: str = Field("127.0.0.1", description="Where started servers listen; anything else needs behind_proxy.")
    behind_proxy: bool = Field(
        False, description="A tunnel or authenticating proxy guards the sync endpoints, which no API key covers."
    )
    key_env: str = Field("VLLM_API_KEY", description="Environment variable with the key of base_urls.")
    sync_dir: Path | None = Field(
        None,
        description="Where weights are handed over, two versions at a time; servers elsewhere must see it too. Default: "
        "/dev/shm, or the directory of temporary files where that has no room.",
    )
    transfer: Literal["file", "nccl"] = Field(
        "file",
        description="How servers get the weights: safetensors in sync_dir, or GPU to GPU by vLLM's weight-transfer API "
        "(not yet run on a GPU; a server that dies is then not started again).",
    )
    transfer_host: str = Field("127.0.0.1", description='Our address as the servers of transfer = "nccl" reach it.')
    memory_share: Share = Field(0.4, description="Of the GPU, for weights and keys and values (unused on a CPU).")
    max_model_len: Count = Field(0, description="Prompt + response tokens; 0: the model's own limit.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="vLLM's weights and activations; default: model.dtype. float16 is nearer to the trainer's bfloat16 than "
        "vLLM's own bfloat16, for a model whose activations stay below 65504.",
    )
    sleep_level: Literal[0, 1, 2] | None = Field(
        None,
        description="Of the engine in this process while it is not asked: 0 keeps its memory, 1 moves the weights to host "
        "memory, 2 drops them and has them handed over again; keys and values go at 1 and 2. Default 2 on CUDA, else 0.",
    )
    enforce_eager: bool = Field(False, description="No CUDA graphs or compilation: starts faster, samples slower.")
    start_timeout_s: Seconds = Field(600.0, description="Until a started server answers.")
    request_timeout_s: Seconds = Field(
        600.0,
        description="One prompt's candidates; a prompt is asked again at least for so long while servers are away.",
    )
    sync_timeout_s: Seconds = Field(300.0, description="One transfer of the weights, with its repetitions.")
    attempts: Positive = Field(5, description="Least tries per prompt, over all servers, before the run stops.")
    restarts: Count = Field(1, description="Times that each started server may be started again in a run.")
    canary_tol: Annotated[float, Field(gt=0.0)] | None = Field(
        None,
        description="Mean |engine - trainer| log-prob allowed after a sync, in nats; default 0.001 where both compute in "
        "float32 (on CUDA 0.01), else 0.15.",
    )

    @model_validator(mode="after")
    def _check(self) -> VllmConfig:
        if self.devices and len(self.devices) != self.replicas:
            raise ValueError(
                f"rollout.options.devices names {len(self.devices)} servers, rollout.options.replicas = {self.replicas}; one each"
            )
        for url in map(checked_url, self.base_urls):
            if url.endswith("/v1"):
                raise ValueError(
                    f"rollout.options.base_urls: {url!r} is one of the server's interfaces; name it without /v1"
                )
        urls = [url for url in self.base_urls if not is_loopback(url)]
        exposed = urls or ([self.host] if not self.base_urls and not is_loopback(f"http://{self.host}") else [])
        if exposed and not self.behind_proxy:
            raise ValueError(
                f"{exposed[0]} is not this machine alone: anybody who reaches it could replace the weights, since vLLM's "
                "sync endpoints ask for no key. Tunnel it to 127.0.0.1, or put an authenticating proxy before it and set "
                "rollout.options.behind_proxy = true"
            )
        return self


class HttpConfig(Section):
    """reward.kind = "http://...": batches, waits and the key."""

    batch: Positive = Field(32, description="Responses per call.")
    concurrency: Positive = Field(4, description="Calls at a time.")
    timeout_s: Seconds = Field(60.0, description="Longest wait for one answer.")
    attempts: Positive = Field(8, description="Calls per batch before the run stops.")
    key_env: str = Field("AMPO_FAST_REWARD_KEY", description="Environment variable with the bearer key.")


def read_options(schema: type[AnySection], values: Mapping[str, Any], field: str) -> AnySection:
    """The options as `schema`. Raises ValueError naming each wrong one as field.name, and the names there are."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError("\n".join(problem_lines(error, schema, f"{field}."))) from None
