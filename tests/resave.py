"""What a test starts under torchrun: `resave.py MODEL CHECKPOINT ROOT` loads, says what it computes, saves again."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from ampo_fast import distributed
from ampo_fast.checkpoint import load_checkpoint, save_checkpoint
from ampo_fast.config import ModelConfig, OptimConfig
from ampo_fast.losses import SWEPO
from ampo_fast.model import Policy
from ampo_fast.optimizer import make_optimizer
from ampo_fast.packing import idle_batch


def who_waits_for_weights(model):
    """For each rank whether its parameters are still on the meta device once rank 0 has read the files."""
    policy = Policy.load(ModelConfig(path=model))
    return distributed.all_gather(all(parameter.is_meta for parameter in policy.parameters()))


def log_probs_after_loading(model, source, target):
    policy = Policy.load(ModelConfig(path=model)).shard()
    optimizer = make_optimizer(policy.parameters(), OptimConfig())
    policy.token_logp(idle_batch())
    state = load_checkpoint(Path(source), policy, optimizer)
    logp_R = policy.token_logp(idle_batch())
    save_checkpoint(Path(target), 10, policy, optimizer, state)
    return logp_R.tolist()


def what_a_bfloat16_forward_sees(model):
    """The reference log-probs and types that the loss meets inside the root's forward, and the gradients' types."""
    policy = Policy.load(ModelConfig(path=model, dtype="bfloat16")).shard()
    batch = dataclasses.replace(idle_batch(), ref_logp_M=torch.tensor([-1234.56, -3.25]))
    seen = {}

    def spy(stats):
        seen["ref"] = stats.ref_logp_M.tolist()
        seen["types"] = sorted({str(t.dtype) for t in (stats.ref_logp_M, stats.reward_M, stats.logp_M)})
        return SWEPO()(stats)

    loss, _ = policy(batch, spy, 1)
    loss.backward()
    seen["types"] += sorted({str(x.dtype) for p in policy.parameters() for x in (p, p.grad)} | {str(loss.dtype)})
    return seen


if __name__ == "__main__":
    model, source, target = sys.argv[1:]
    with distributed.process_group(300):
        said = {
            "meta": who_waits_for_weights(model),
            "logp": log_probs_after_loading(model, source, target),
            "bfloat16": what_a_bfloat16_forward_sees(model),
        }
        if distributed.is_main():
            print(json.dumps(said), flush=True)
    os._exit(0)  # as the command does: Python's shutdown and gloo's threads do not always agree
