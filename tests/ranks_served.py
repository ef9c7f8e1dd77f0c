"""What a test starts under torchrun: `ranks_served.py CONFIG [--resume]` trains, with tests/fake_vllm.py for its servers.

No rank may hold a whole model: the servers sample.
"""

import os
import sys

from runs import HERE

from ampo_fast.config import load_config
from ampo_fast.model import Policy
from ampo_fast.trainer import train
from ampo_fast.vllm import process

if __name__ == "__main__":
    config = load_config(sys.argv[1])
    fake = [sys.executable, str(HERE / "fake_vllm.py"), "--model", config.model.path, "--port"]
    process.serve_command = lambda *a: lambda port: [*fake, str(port)]
    Policy.load_replica = None
    try:
        train(config, resume="--resume" in sys.argv)
    except Exception as error:
        print(f"rank {os.environ['RANK']} ended: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    os._exit(0)  # as the command does
