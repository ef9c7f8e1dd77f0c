"""What tests/test_vllm_engine.py runs in processes of their own (vLLM binds threads and keeps global state).

python vllm_cases.py sync|kill|running|transfer MODEL DTYPE[:ENGINE_DTYPE] -> a JSON object on the last line.
"""

import json
import os
import re
import signal
import sys
import threading
import time
import urllib.request

import torch

from ampo_fast.config import build_config
from ampo_fast.engine_config import VllmConfig
from ampo_fast.evaluation import response_logp
from ampo_fast.model import Policy
from ampo_fast.named_weights import NamedWeights
from ampo_fast.rollouts.engines import make_engine
from ampo_fast.types import Prompt, Sampling
from ampo_fast.vllm.canary import SyncError
from ampo_fast.vllm.engine import transfer_api
from ampo_fast.vllm.server import VllmServerEngine
from ampo_fast.vllm.transfer import ROUTES, make_source
from ampo_fast.weight_sync import push_weights

PROMPTS = [
    Prompt(id=str(i), messages=({"role": "user", "content": text},))
    for i, text in enumerate(["Why is the sky blue?", "Name three fruits.", "Write a line about rain."])
]


def setup(engine, model, dtype):
    """dtype: the trainer's, or TRAINER:ENGINE."""
    dtype, _, engine_dtype = dtype.partition(":")
    options = {"enforce_eager": True, "max_model_len": 512, "dtype": engine_dtype or None}
    config = build_config(
        {
            "data": {"train": "x"},
            "model": {"path": model, "dtype": dtype},
            "rollout": {"engine": engine, "options": options},
        }
    )
    policy = Policy.load(config.model)
    return policy, make_engine(config, policy)


def nudge(policy, scale):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * parameter.std() * torch.randn_like(parameter))


def gap(policy, groups):
    engine = torch.tensor([value for g in groups for c in g.candidates for value in c.logp])
    return (response_logp(policy, groups, 4096) - engine).abs().mean().item()


def sync(model, dtype):
    """Two syncs, then one without the head: what a tied model's checkpoint looks like."""
    policy, engine = setup("vllm", model, dtype)
    sampling = Sampling(max_new_tokens=24)
    result = {"gaps": [gap(policy, engine.generate(PROMPTS, 4, sampling))], "canary": [], "changes": []}
    for version in (1, 2):
        nudge(policy, 0.02)
        push_weights(policy, engine, version)
        groups = engine.generate(PROMPTS, 4, sampling)
        result["gaps"].append(gap(policy, groups))
        result["canary"].append(engine.sync_metrics["sync/logp_difference"])
        result["changes"].append(engine.sync_metrics["sync/logp_change"])
        result["versions"] = sorted({c.version for g in groups for c in g.candidates})
    result["again"] = engine.generate(PROMPTS, 4, sampling) == groups
    # More prompt tokens than one step takes.
    result["crowd"] = [len(g.candidates) for g in engine.generate(PROMPTS, 100, Sampling(max_new_tokens=2))]
    nudge(policy, 0.1)
    try:
        engine.load_weights(3, [(name, t) for name, t in NamedWeights(policy) if "lm_head" not in name])
        result["without_head"] = "accepted"
    except SyncError as error:
        result["without_head"] = str(error)
    engine.close()
    return result


def is_generating(metrics_url):
    with urllib.request.urlopen(metrics_url) as answer:
        return re.search(rb"^vllm:num_requests_running\S* [1-9]", answer.read(), flags=re.MULTILINE) is not None


def kill(model, dtype):
    """kill -9 of a real server while it generates."""
    policy, engine = setup("vllm-server", model, dtype)
    push_weights(policy, engine, 1)
    replica = engine.replicas[0]
    first, metrics = replica.process.group, f"{replica.client.base_url}/metrics"

    def killer():
        while not is_generating(metrics):
            time.sleep(0.01)
        os.killpg(first, signal.SIGKILL)

    threading.Thread(target=killer, daemon=True).start()
    groups = engine.generate(PROMPTS, 8, Sampling(max_new_tokens=200))
    result = {
        "restarted": replica.process.group != first,
        "sizes": [len(g.candidates) for g in groups],
        "gap": gap(policy, groups),
        "versions": sorted({c.version for g in groups for c in g.candidates}),
    }
    engine.close()
    return result


def running(model, dtype):
    """Servers that run already: described, given our weights, asked, and left."""
    policy, owner = setup("vllm-server", model, dtype)
    process = owner.replicas[0].process
    os.environ["RUNNING_KEY"] = process._key
    options = VllmConfig(base_urls=(process.start().base_url,), key_env="RUNNING_KEY")
    nudge(policy, 0.02)  # the server has other weights than we do
    engine = VllmServerEngine(policy, options, dtype)
    groups = engine.generate(PROMPTS, 4, Sampling(max_new_tokens=24))
    engine.close()
    result = {"gap": gap(policy, groups), "is_alive": process.is_alive()}
    owner.close()
    return result


def transfer(model, dtype):
    """What vllm.transfer builds on vLLM's own classes, as far as it goes without a GPU."""
    from vllm.entrypoints.rl.online.api_router import router

    api = transfer_api()
    source = make_source(api, torch.bfloat16)
    source.weights = [("a.weight", torch.ones(2, 3))]
    info = api.TrainerInfo(rank=0, master_address="127.0.0.1", master_port=1, world_size=3)
    paths = {route.path for route in router.routes}
    return {
        "missing_routes": [route for route in ROUTES.values() if route not in paths],
        "world_size": info.world_size,
        "metadata": [[m.name, str(m.dtype), list(m.shape)] for m in source.metadata()],
    }


if __name__ == "__main__":
    print(
        json.dumps({"sync": sync, "kill": kill, "running": running, "transfer": transfer}[sys.argv[1]](*sys.argv[2:]))
    )
