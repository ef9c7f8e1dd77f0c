"""The exported model's README.md, and the versions that made it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from ampo_fast.config import Config

_PACKAGES = ("ampo-fast", "torch", "transformers", "safetensors", "numpy", "pydantic")


def versions() -> dict[str, str | int | None]:
    """Python, packages, platform, and the git commit where the package runs from a checkout."""
    found: dict[str, str | int | None] = {name: _package_version(name) for name in _PACKAGES}
    return found | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "commit": _commit(),
    }


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_model_card(model_dir: Path, config: Config, summary: dict[str, Any]) -> Path:
    """Writes model_dir/README.md: what it was trained from, how, with which result, and what that does not say."""
    path = model_dir / "README.md"
    path.write_text(_card(config, summary), encoding="utf-8")
    return path


def _card(config: Config, summary: dict[str, Any]) -> str:
    n, k, steps = config.rollout.n, config.select.k, summary["steps"]
    origin = "given responses" if config.rollout.engine == "data" else f"{n} samples of its own per prompt"
    installed = ", ".join(f"{name} {version}" for name, version in versions().items() if version and name in _PACKAGES)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [ampo, preference-optimization, ampo_fast]
---

# {config.run.name}

`{config.model.path}`, trained by Active Multi-Preference Optimization: {origin}, scored by `{config.reward.kind}`, the best
and {k} of the rest kept by `{config.select.strategy}`, loss `{config.loss.name}` {config.loss.params or ""}, {steps} steps of
{config.optim.prompts_per_step} prompts, learning rate {config.optim.lr:g}.

## Result on held-out prompts

{_result(summary)}

The reward is a rule or a model, not people: a higher number says that the training did what it was told to, no more.
Nothing was measured about truthfulness or safety.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{config.run.name}/final")
model = AutoModelForCausalLM.from_pretrained("{config.run.name}/final")
```

## Made with

{installed}. The full configuration is `config.json` of the run directory.

```bibtex
@inproceedings{{gupta2025ampo,
  title  = {{AMPO: Active Multi-Preference Optimization for Self-play Preference Selection}},
  author = {{Gupta, Taneesh and others}},
  booktitle = {{ICML}}, year = {{2025}}, note = {{arXiv:2502.18293}}
}}
```
"""


def _result(summary: dict[str, Any]) -> str:
    if "reward_before" not in summary:
        return "No held-out prompts were given."
    return (
        f"Mean reward {summary['reward_before']:.4f} before, {summary['reward_after']:.4f} after "
        f"(standard error of the paired difference {summary['reward_se']:.4f}, {summary['num_prompts']} prompts); "
        f"win rate {summary['win_rate']:.3f}, ties half."
    )
