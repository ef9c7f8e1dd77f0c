"""The CUDA path: its sources compile for each architecture; on a GPU it answers as the CPU; elsewhere it says why it cannot.

The kernels' logic is also tested without a GPU, by tests/csrc/test_kernels.cpp.
"""

import logging
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ampo_fast import _C, compiled, k_center, k_medoids, pairwise_distances, select_responses, selection

CSRC = Path(__file__).resolve().parent.parent / "csrc"
NVCC = shutil.which("nvcc")
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.has_cuda), reason="needs a GPU and an extension built with AMPO_CUDA"
)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", ["pairwise_cuda.cu", "kcenter_cuda.cu", "select_cuda.cu"])
def test_sources_compile_without_spills(source, arch, tmp_path):
    command = [NVCC, "-std=c++17", "-fmad=false", "-cubin", f"-arch={arch}", "-Xptxas", "-v", str(CSRC / source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    if "not defined for option" in done.stderr:
        pytest.skip(f"this nvcc does not know {arch}")
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill stores" in line]
    assert spills
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


def test_cuda_by_name_on_a_cpu_says_what_would_make_it_run():
    points, rewards = torch.eye(4), torch.tensor([0.1, 0.2, 0.3, 0.4])
    match = "CPU" if _C.has_cuda else "AMPO_CUDA=ON"
    for call in (
        lambda: select_responses(points, rewards, 1, strategy="opt_select", impl="cuda"),
        lambda: pairwise_distances(points, impl="cuda"),
        lambda: k_center(points, 2, impl="cuda"),
        lambda: k_medoids(torch.cdist(points, points), 2, impl="cuda"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_nan_on_a_gpu_is_named_once_the_values_are_on_the_host(monkeypatch):
    is_on_host, to = [], selection._Problem.to

    def move(problem, device):
        is_on_host.append(device)
        return to(problem, device)

    monkeypatch.setattr(selection._Problem, "to", move)
    monkeypatch.setattr(selection, "checks_values", lambda rows: bool(is_on_host))
    points, rewards = torch.eye(4), torch.tensor([0.1, 0.2, 0.3, 0.4])
    for change in ("rewards", "embeddings"):
        arguments = {"embeddings": points, "rewards": rewards}
        is_on_host.clear()
        with pytest.raises(ValueError, match=f"{change} holds NaN"):
            select_responses(**arguments | {change: arguments[change] * math.nan}, k=1, strategy="opt_select_exact")


def test_what_the_caller_left_out_is_made_on_the_device_of_the_rewards(monkeypatch):
    monkeypatch.setattr(selection, "resolve_impl", lambda *arguments: "cuda")
    monkeypatch.setattr(selection, "_select_cuda", lambda problem: problem)
    points, rewards = torch.empty(4, 3, device="meta"), torch.empty(4, device="meta")
    problem = select_responses(points, rewards, 1, strategy="random")
    for made in (problem.valid, problem.positive_ok, problem.keys):
        assert made.device.type == "meta"


class OnCuda:
    """What resolve_impl looks at in a CUDA tensor."""

    is_cuda = True


def test_auto_takes_cuda_where_it_can_and_says_once_where_it_cannot(monkeypatch, caplog):
    class Built:
        has_cuda = True
        vector_path = staticmethod(lambda: "plain")

    monkeypatch.setattr(compiled, "_C", Built)
    compiled._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert compiled.resolve_impl("auto", OnCuda()) == "cuda"
        assert compiled.resolve_impl("auto", OnCuda(), "too large") == "cpp"
        assert compiled.resolve_impl("auto", OnCuda(), "too large") == "cpp"
    assert [record.getMessage() for record in caplog.records].count(
        "CUDA points are copied to the host for selection: too large"
    ) == 1
    with pytest.raises(ValueError, match="too large"):
        compiled.resolve_impl("cuda", OnCuda(), "too large")
    Built.has_cuda = False
    assert compiled.resolve_impl("auto", OnCuda()) == "cpp"
    compiled._log_once.cache_clear()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["bottom_k", "k_center", "opt_select", "random"])
def test_cuda_chooses_as_the_cpu_from_exact_distances(strategy, dtype):
    g = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 0, 1, 3, 35, 67, 84])
    points = torch.randint(-2, 3, (84, 40), generator=g).to(dtype)
    rewards = torch.randint(0, 5, (84,), generator=g) / 4
    arguments = {"k": 5, "strategy": strategy, "group_offsets": offsets, "positives": 2, "tie_tol": 0.1}
    arguments |= {name: torch.rand(84, generator=g) < 0.9 for name in ("valid", "positive_ok")}
    cpu = select_responses(points, rewards, **arguments)
    cuda = select_responses(points.cuda(), rewards.cuda(), **arguments, impl="cuda")
    for ours, theirs in zip(cuda, cpu, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_distances_and_pools_are_those_of_the_cpu(dtype):
    g = torch.Generator().manual_seed(0)
    points = torch.randint(-3, 4, (700, 33), generator=g).to(dtype)
    for metric in ("euclidean", "sqeuclidean", "cosine"):
        cuda = pairwise_distances(points.cuda(), metric=metric, impl="cuda")
        torch.testing.assert_close(cuda.cpu(), pairwise_distances(points, metric=metric), rtol=0, atol=1e-6)
    for seeds in (None, [699, 5]):
        cuda = k_center(points.cuda(), 60, seeds=seeds, impl="cuda")
        assert torch.equal(cuda.cpu(), k_center(points, 60, seeds=seeds))
