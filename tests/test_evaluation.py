"""What an evaluation leaves behind."""

import json

from runs import two_ranks, write_run

TRAIN = """
import gc, json, os, sys
from ampo_fast import distributed, trainer
from ampo_fast.config import load_config
from ampo_fast.model import Policy

evaluate, alive = trainer.evaluate, []

def counted(*args):
    result = evaluate(*args)
    alive.append(sum(isinstance(held, Policy) for held in gc.get_objects()))
    return result

trainer.evaluate = counted
gc.disable()
trainer.train(load_config(sys.argv[1]))
with open(f"{sys.argv[2]}/rank{os.environ['RANK']}.json", "w") as file:
    json.dump(alive, file)
os._exit(0)  # as the command does
"""


def test_the_sharded_policy_of_the_start_is_gone_after_each_comparison(tiny_model, tmp_path):
    path = write_run(tmp_path, tiny_model, run={"steps": 2}, eval={"every": 1, "prompts": 2})
    for status, err in two_ranks(TRAIN, path, tmp_path):
        assert status == 0, err[-3000:]
    for rank in range(2):
        alive = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(alive) == 3
        assert len(set(alive)) == 1
