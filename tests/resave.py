"""What a test starts under torchrun: `resave.py MODEL CHECKPOINT ROOT` loads, says what it computes, saves again."""

import sys
from pathlib import Path

from ampo_fast import distributed
from ampo_fast.checkpoint import load_checkpoint, save_checkpoint
from ampo_fast.config import ModelConfig, OptimConfig
from ampo_fast.model import Policy
from ampo_fast.optimizer import make_optimizer
from ampo_fast.packing import idle_batch

if __name__ == "__main__":
    model, source, target = sys.argv[1:]
    with distributed.process_group(300):
        policy = Policy.load(ModelConfig(path=model)).shard()
        optimizer = make_optimizer(policy.parameters(), OptimConfig())
        policy.token_logp(idle_batch())
        state = load_checkpoint(Path(source), policy, optimizer)
        logp_R = policy.token_logp(idle_batch())
        if distributed.is_main():
            print(logp_R.tolist(), flush=True)
        save_checkpoint(Path(target), 10, policy, optimizer, state)
