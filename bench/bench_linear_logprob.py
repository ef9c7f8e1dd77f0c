"""Head and group loss, forward + backward: ours by mode, against whole logits, the bare GEMMs, and peers where installed.

    python bench/bench_linear_logprob.py [--shape 2048,576,49152] [--dtype float32] [--device cpu] [--repeats 5]

Variants run in turn in one process; a peer that is not installed is left out and named. Rows go to
bench/results/linear_logprob.csv; the last line of output is one JSON object with the ratios. Hidden states are random with
a third of the rows leaning on their target's weight, so that the softmax is peaked as a trained model's is.

Each variant's answer is compared, for the first group's rows, with the same in float64: the gradient of the hidden states, or
the log-probs where nothing else is asked for. The note has the largest difference, over the largest true value.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import rows
import torch

from ampo_fast import fused_linear_group_loss, linear_logprob, reference
from ampo_fast.losses import AMPO, ResponseStats
from ampo_fast.losses.stats import segment_sum

GROUP, RESPONSE_ROWS = 4, 64


class Case:
    """Tensors of one shape; every variant gets the same ones and leaves gradients in .grad."""

    def __init__(
        self, num_rows: int, num_hidden: int, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.device, self.dtype, self.shape = device, dtype, (num_rows, num_hidden, num_tokens)
        self.weight_VD = randn(num_tokens, num_hidden)
        self.target_R = torch.randint(0, num_tokens, (num_rows,), generator=generator, device=device)
        self.hidden_RD = randn(num_rows, num_hidden) / num_hidden**0.5
        self.hidden_RD[::3] += self.weight_VD[self.target_R[::3]] * (12 / num_hidden)
        self.response_offsets = torch.arange(0, num_rows + 1, RESPONSE_ROWS)
        self.group_offsets = torch.arange(0, self.response_offsets.numel(), GROUP)
        num_responses = self.response_offsets.numel() - 1
        self.reward_M = torch.rand(num_responses, generator=generator, device=device)
        self.hidden_RD.requires_grad_()
        self.weight_VD.requires_grad_()
        self.errors: dict[str, str] = {}
        """By variant: how far its first answer is from float64."""

    def free(self) -> None:
        self.hidden_RD.grad = self.weight_VD.grad = None

    @functools.cached_property
    def truth(self) -> dict[str, torch.Tensor]:
        """The first group's log-probs, and gradients of its hidden states by each objective, all from float64."""
        num_rows = int(self.response_offsets[GROUP])
        hidden_RD = self.hidden_RD[:num_rows].detach().double().requires_grad_()
        logp_R = reference.linear_logprob(hidden_RD, self.weight_VD.detach().double(), self.target_R[:num_rows])
        offsets, num_groups = self.response_offsets[: GROUP + 1], self.group_offsets.numel() - 1
        stats = ResponseStats(
            segment_sum(logp_R, offsets), offsets.diff().to(self.device), self.reward_M[:GROUP], self.group_offsets[:2]
        )
        objectives = {"AMPO": AMPO()(stats).loss / num_groups, "mean NLL": -logp_R.sum() / self.shape[0]}
        found = {"log-probs": logp_R.detach()}
        for name, loss in objectives.items():
            (found[name],) = torch.autograd.grad(loss, hidden_RD, retain_graph=True)
        return found

    def loss_of(self, logp_R: torch.Tensor) -> torch.Tensor:
        """The AMPO loss from row log-probs: what a head that only knows log-probs is followed by."""
        length_M = self.response_offsets.diff().to(self.device)
        logp_M = segment_sum(logp_R.float(), self.response_offsets)
        return AMPO()(ResponseStats(logp_M, length_M, self.reward_M, self.group_offsets)).loss


def ours(case: Case, mode: str, impl: str = "auto", frozen: bool = False) -> Callable[[], object]:
    def call() -> None:
        weight_VD = case.weight_VD.detach() if frozen else case.weight_VD
        loss, _ = fused_linear_group_loss(
            case.hidden_RD, weight_VD, case.target_R, case.response_offsets, case.group_offsets, case.reward_M,
            AMPO(), mode=mode, impl=impl,
        )  # fmt: skip
        loss.backward()

    return call


def forward_only(case: Case) -> Callable[[], object]:
    def call() -> torch.Tensor:
        with torch.no_grad():
            return linear_logprob(case.hidden_RD, case.weight_VD, case.target_R)

    return call


def forward_no_logits(case: Case) -> Callable[[], object]:
    def call() -> torch.Tensor:
        with torch.no_grad():
            return linear_logprob(case.hidden_RD, case.weight_VD, case.target_R, impl="triton")

    if case.device.type != "cuda":
        raise ImportError("Triton's kernels need a GPU")
    return call


def naive(case: Case) -> Callable[[], object]:
    return lambda: case.loss_of(reference.linear_logprob(case.hidden_RD, case.weight_VD, case.target_R)).backward()


def bare_gemms(case: Case) -> Callable[[], object]:
    """The three products of the same shapes and nothing else, in our chunks: the bound of any exact dense head."""
    from ampo_fast.head import default_chunk_rows

    size = default_chunk_rows(case.shape[2], case.device)

    @torch.no_grad()
    def call() -> None:
        hidden_RD, weight_VD = case.hidden_RD.detach(), case.weight_VD.detach()
        hidden_grad = torch.empty_like(hidden_RD)
        weight_grad = torch.zeros_like(weight_VD)
        for start in range(0, case.shape[0], size):
            part = slice(start, start + size)
            logits = hidden_RD[part] @ weight_VD.t()
            torch.mm(logits, weight_VD, out=hidden_grad[part])
            weight_grad.addmm_(logits.t(), hidden_RD[part])

    return call


def torch_chunked(case: Case) -> Callable[[], object]:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions()
    return lambda: linear_cross_entropy(case.hidden_RD, case.weight_VD, case.target_R, options=options).backward()


def trl_head(case: Case) -> Callable[[], object]:
    """With TRL's own tile width, and none of its optional outputs (entropy, ...)."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

    def call() -> None:
        out = ChunkedLogProbFunction.apply(
            case.hidden_RD, case.weight_VD, None, case.target_R, 1.0, width, None, 1.0, ()
        )  # fmt: skip
        logp_R = out[0]
        case.loss_of(logp_R).backward()

    return call


def liger_flce(case: Case) -> Callable[[], object]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if case.device.type != "cuda":
        raise ImportError("Liger's kernels need a GPU")
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(case.weight_VD, case.hidden_RD, case.target_R).backward()


def cut_cross_entropy(case: Case) -> Callable[[], object]:
    from cut_cross_entropy import linear_cross_entropy

    if case.device.type != "cuda":
        raise ImportError("cut-cross-entropy's kernels need a GPU")

    def call() -> None:
        nll_R = linear_cross_entropy(case.hidden_RD, case.weight_VD, case.target_R, reduction="none")
        case.loss_of(-nll_R).backward()

    return call


def quack_head(case: Case) -> Callable[[], object]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: chunked_linear_cross_entropy(case.hidden_RD, case.weight_VD, case.target_R).backward()


VARIANTS: dict[str, Callable[[Case], Callable[[], object]]] = {
    "ours_grouped": lambda case: ours(case, "grouped"),
    "ours_recompute": lambda case: ours(case, "recompute"),
    "ours_frozen": lambda case: ours(case, "auto", frozen=True),
    "ours_forward_only": forward_only,
    "ours_forward_no_logits": forward_no_logits,
    "naive": naive,
    "bare_gemms": bare_gemms,
    "torch_linear_cross_entropy": torch_chunked,
    "trl": trl_head,
    "liger": liger_flce,
    "cut_cross_entropy": cut_cross_entropy,
    "quack": quack_head,
}
FORWARD_ONLY = ("ours_forward_only", "ours_forward_no_logits")
MEAN_NLL = ("torch_linear_cross_entropy", "liger", "quack")
"""What has no log-probs to give to a group's loss."""
FLOPS = {"ours_frozen": 4, "ours_forward_only": 2, "ours_forward_no_logits": 2, "ours_recompute": 8}
"""Useful RDV multiples; 6 for all that train the head."""


def ready_calls(case: Case, wanted: list[str]) -> dict[str, Callable[[], object]]:
    """The variants that can run here, each followed by a wait for the device; on a GPU they return their peak in MiB."""
    calls = {}
    for name in wanted:
        try:
            call = VARIANTS[name](case)
        except (ImportError, AttributeError, RuntimeError) as error:
            print(f"left out: {name}: {error}")
            continue

        calls[name] = functools.partial(waited_for, case, name, call)
    return calls


def waited_for(case: Case, name: str, call: Callable[[], object]) -> str | None:
    case.free()
    is_cuda, before = case.device.type == "cuda", 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    answer = call()
    peak = None
    if is_cuda:
        torch.cuda.synchronize()
        peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"
    if name not in case.errors:  # in the warm-up, which is not timed
        case.errors[name] = error_of(case, name, answer)
    return peak


def error_of(case: Case, name: str, answer: object) -> str:
    """What the variant gets wrong, over the largest true value; "" where it has no answer."""
    objective = "mean NLL" if name in MEAN_NLL else "AMPO"
    found, truth = (
        (answer, case.truth["log-probs"]) if name in FORWARD_ONLY else (case.hidden_RD.grad, case.truth[objective])
    )
    if found is None:
        return ""
    return f"{((found[: len(truth)].double() - truth).abs().max() / truth.abs().max()).item():.2g}"


def host_peak_mib(case: Case, call: Callable[[], object]) -> str:
    case.free()
    return rows.peak_mib(call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2048,576,49152", help="rows,hidden,vocabulary")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "linear_logprob.csv")
    options = parser.parse_args()
    shape = tuple(int(part) for part in options.shape.split(","))
    case = Case(*shape, getattr(torch, options.dtype), torch.device(options.device))
    calls = ready_calls(case, options.variants.split(","))
    context = rows.context("torch") | ({"device": torch.cuda.get_device_name()} if options.device == "cuda" else {})
    base = {"op": "linear_group_loss", "shape": "x".join(map(str, shape)), "dtype": options.dtype, **context}
    peaks = {}

    def keep(seconds: dict[str, list[float]], results: dict[str, object]) -> None:
        for name, samples in seconds.items():
            peaks[name] = results[name] or host_peak_mib(case, calls[name])
            row = base | measured(name, samples, shape, seconds.get("bare_gemms")) | {"peak_mib": peaks[name]}
            if case.errors[name]:
                row["note"] += f"; off by {case.errors[name]}"
            rows.append(options.csv, [row])
            print(f"{name:28} {row['median_ms']:>9} ms  {peaks[name]:>8} MiB  {row['note']}")

    seconds, _ = rows.alternate(calls, options.repeats, keep)
    print(json.dumps(ratios(seconds, peaks)))


def measured(name: str, samples: list[float], shape: tuple[int, ...], bare_gemms: list[float] | None) -> dict:
    """What the samples say of a variant, in a row's fields."""
    multiple = FLOPS.get(name, 6)
    tflops = multiple * shape[0] * shape[1] * shape[2] / min(samples) / 1e12
    row = {
        "variant": name,
        "mode": "forward" if name in FORWARD_ONLY else "forward+backward",
        "note": f"{tflops:.3f} useful TFLOP/s at best",
    }
    if bare_gemms:
        row["roofline_pct"] = f"{100 * multiple / 6 * min(bare_gemms) / min(samples):.1f}"
    return row | rows.timings(samples)


def ratios(seconds: dict[str, list[float]], peaks: dict[str, str]) -> dict[str, float]:
    """Ours (grouped) against each other variant, by medians: speed-up, and our share of its extra peak memory."""
    medians = {name: float(rows.timings(samples)["median_ms"]) for name, samples in seconds.items()}
    found = {f"time_{name}_ms": value for name, value in medians.items()}
    for name, value in medians.items():
        if name != "ours_grouped" and "ours_grouped" in medians:
            found[f"speedup_vs_{name}"] = round(value / medians["ours_grouped"], 3)
            if peaks.get(name) and peaks.get("ours_grouped") and float(peaks[name]) > 0:
                found[f"memory_vs_{name}"] = round(float(peaks["ours_grouped"]) / float(peaks[name]), 3)
    return found


if __name__ == "__main__":
    main()
