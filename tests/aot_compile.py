"""Compiles every Triton kernel ahead of time, without a GPU, and prints one JSON line per kernel and architecture.

python tests/aot_compile.py 90 -> {"kernel", "sm", "registers", "stack", "local", "tensor_cores"} per line. A script of its
own: the test process runs Triton's interpreter, in which nothing compiles.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ampo_fast.kernels import forward_logprob, group_contrastive, row_pass, segment_sum

ROW = {"logits_RV": "*bf16", "bias_V": "*bf16", "target_R": "*i64", "num_tokens": "i32", "row_stride": "i64"}
ROW |= {"eos_id": "i32", "softcap": "fp32", "inv_temperature": "fp32", "lse_R": "*fp32", "rest_R": "*fp32"}
HAS = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "HAS_EOS": True}
SPLIT = {name: "*fp32" for name in ("top_SR", "sum_SR", "target_SR", "eos_SR")}
HEAD = {
    "target_R": "*i64",
    "num_rows": "i32",
    "num_tokens": "i32",
    "num_splits": "i32",
    "hidden_stride": "i64",
    "weight_stride": "i64",
}
HEAD |= {"tokens_per_split": "i32", "eos_id": "i32", "softcap": "fp32", "inv_temperature": "fp32"} | SPLIT
GROUP = {name: "*fp32" for name in ("logp_M", "ref_logp_M", "length_M", "reward_M", "baseline_B", "loss_B", "grad_M")}
GROUP |= {"positive_M": "*i8", "offsets_B": "*i64", "beta": "fp32", "alpha": "fp32", "log_gamma": "fp32"}
GROUP_OPTIONS = {"HAS_REF": True, "HAS_BASELINE": True, "IS_AVG": True, "WEIGHT": 2, "IS_SQUARED": True}


def head_case(dtype, arch, num_hidden=4096):
    is_aligned = num_hidden % 16 == 0
    tile = forward_logprob.tiles({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], arch // 10, is_aligned)
    launch = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
    signature = HEAD | {"hidden_RD": f"*{dtype}", "weight_VD": f"*{dtype}", "bias_V": f"*{dtype}"}
    constants = {"D": num_hidden, "EXACT": dtype == "fp32", **HAS, **tile}
    name = f"forward_{dtype}" if is_aligned else f"forward_{dtype}_unaligned"
    return name, forward_logprob.split_kernel, signature, constants, launch


def cases(arch):
    return [head_case(dtype, arch, num_hidden) for dtype in ("bf16", "fp32") for num_hidden in (4096, 1000)] + CASES


CASES = [
    ("row_logprob", row_pass.logprob_kernel, ROW | {"logp_R": "*fp32", "eos_logp_R": "*fp32"},
     HAS | {"BLOCK_V": 4096}, {"num_warps": 8}),
    ("row_gradient", row_pass.gradient_kernel, ROW | {"grad_R": "*fp32", "grad_eos_R": "*fp32"},
     HAS | {"BLOCK_V": 4096}, {"num_warps": 8}),
    ("forward_merge", forward_logprob.merge_kernel,
     SPLIT | {"logp_R": "*fp32", "eos_logp_R": "*fp32", "num_rows": "i32", "num_splits": "i32"},
     {"HAS_EOS": True, "BLOCK_R": 128}, {"num_warps": 4}),
    ("group_contrastive", group_contrastive.group_kernel, GROUP,
     GROUP_OPTIONS | {"HAS_POSITIVE": True, "SPLIT_MEAN": False, "BLOCK_G": 64}, {"num_warps": 1}),
    ("group_contrastive_best", group_contrastive.group_kernel, GROUP,
     GROUP_OPTIONS | {"HAS_POSITIVE": False, "SPLIT_MEAN": False, "BLOCK_G": 1024}, {"num_warps": 4}),
    ("group_contrastive_mean", group_contrastive.group_kernel, GROUP,
     GROUP_OPTIONS | {"HAS_POSITIVE": False, "HAS_BASELINE": False, "SPLIT_MEAN": True, "BLOCK_G": 1024}, {"num_warps": 4}),
    ("segment_sum", segment_sum.segment_kernel, {"values_R": "*fp32", "offsets_M": "*i64", "sum_M": "*fp32"},
     {"BLOCK": 256}, {"num_warps": 1}),
]  # fmt: skip


def compile_case(name, kernel, signature, constants, launch, arch):
    names = kernel.arg_names
    ordered = {arg: signature.get(arg, "constexpr") for arg in names}
    missing = [arg for arg in names if ordered[arg] == "constexpr" and arg not in constants]
    assert not missing, f"{name}: no type for {missing}"
    # Pointers that a tensor gives are multiples of 16, as at run time; and so are strides, but for an unaligned head's.
    has_aligned_rows = constants.get("D", 16) % 16 == 0
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(names)
               if ordered[arg].startswith("*") or (arg.endswith("stride") and has_aligned_rows)}  # fmt: skip
    source = ASTSource(fn=kernel, signature=ordered, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    return {
        "kernel": name,
        "sm": arch,
        **resources(binary.asm["cubin"]),
        "tensor_cores": tensor_cores(binary.asm["ptx"]),
    }


def resources(cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", shown.stdout + shown.stderr, re.S)
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def tensor_cores(ptx):
    return next((word for word in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if word in ptx), None)


if __name__ == "__main__":
    for case in cases(int(sys.argv[1])):
        print(json.dumps(compile_case(*case, arch=int(sys.argv[1]))), flush=True)
