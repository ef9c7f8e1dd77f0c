"""What a test starts under torchrun: `ranks.py CONFIG ...` trains each config in turn, all in one group of processes."""

import json
import os
import sys

from ampo_fast.config import load_config
from ampo_fast.trainer import train

if __name__ == "__main__":
    for path in sys.argv[1:]:
        summary = train(load_config(path))
        if os.environ["RANK"] == "0":
            print(json.dumps(summary), flush=True)
    os._exit(0)  # as the command does: Python's shutdown and gloo's threads do not always agree
