"""What an installed ampo_fast is, seen from another directory, and a wheel built from this checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_elsewhere(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_not_ours_from_anywhere(tmp_path):
    code = "import importlib.util as u; print(u.find_spec('kernels'))"
    assert run_elsewhere(code, tmp_path) == "None"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_vllm_is_not_ours_from_anywhere(tmp_path):
    code = (
        "import importlib.util as u, ampo_fast.vllm as ours;"
        "print(getattr(u.find_spec('vllm'), 'origin', None) == ours.__file__)"
    )
    assert run_elsewhere(code, tmp_path) == "False"


def test_the_extension_and_the_package_files_are_installed(tmp_path):
    code = (
        "from ampo_fast import _C; from ampo_fast.config import load_config; from ampo_fast.data import load_prompts;"
        "c = load_config('quickstart'); print(len(load_prompts(c.data.train)), len(load_prompts(c.data.eval)))"
    )
    assert run_elsewhere(code, tmp_path) == "96 32"


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("ampo_fast", ("transformers", "triton", "vllm", "pydantic", "wandb")),
        ("ampo_fast.cli", ("torch", "transformers", "numpy", "rich")),
        ("ampo_fast.config", ("torch", "transformers", "numpy")),
        ("ampo_fast.reward_model.config", ("torch", "transformers", "numpy")),
        ("ampo_fast.losses", ("transformers", "vllm")),
        ("ampo_fast.fused", ("transformers", "vllm")),
        ("ampo_fast.vllm.lifeline", ("torch", "vllm", "pydantic")),
    ],
)
def test_imports_stay_light(module, banned, tmp_path):
    code = f"import sys, {module}; print([m for m in {banned!r} if m in sys.modules])"
    assert run_elsewhere(code, tmp_path) == "[]"


def test_public_names_resolve(tmp_path):
    code = (
        "import ampo_fast; print(all(callable(getattr(ampo_fast, n)) for n in ampo_fast.__all__ if n != '__version__'))"
    )
    assert run_elsewhere(code, tmp_path) == "True"


def test_a_wheel_holds_everything_and_works_without_the_checkout(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("ampo_fast-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in ("ampo_fast/recipes/quickstart.toml", "ampo_fast/prompts/quickstart_train.jsonl",
                   "ampo_fast/templates/report.html.j2", "ampo_fast/losses/stats.py", "ampo_fast/vllm/lifeline.py",
                   "ampo_fast/reward_model/config.py", "ampo_fast/kernels/row_pass.py"):  # fmt: skip
        assert wanted in names
    assert any(name.startswith("ampo_fast/_C.") for name in names)
    assert not any(name.startswith("kernels/") for name in names)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.meta_path = [f for f in sys.meta_path if 'Skbuild' not in "
        "type(f).__name__ and 'ScikitBuild' not in type(f).__name__]; import ampo_fast, torch; from ampo_fast import k_center;"
        "from ampo_fast.compiled import resolve_impl; print(ampo_fast.__file__, resolve_impl('cpp'))"
    )
    where, impl = run_elsewhere(code, tmp_path).split()
    assert Path(where).is_relative_to(site)
    assert impl == "cpp"
