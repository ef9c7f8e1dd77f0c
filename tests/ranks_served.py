"""What a test starts under torchrun: `ranks_served.py CONFIG [--resume]` trains with tests/fake_vllm.py as its servers."""

import json
import os
import sys

from test_vllm_server import fake_command

from ampo_fast import vllm_process
from ampo_fast.config import load_config
from ampo_fast.trainer import train

if __name__ == "__main__":
    config = load_config(sys.argv[1])
    vllm_process.serve_command = lambda *a: lambda port: fake_command(config.model.path, port)
    rank = os.environ["RANK"]
    try:
        summary = train(config, resume="--resume" in sys.argv)
    except Exception as error:
        print(f"rank {rank} ended: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    if rank == "0":
        print(json.dumps(summary), flush=True)
    os._exit(0)
