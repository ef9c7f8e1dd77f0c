"""Compiles every Triton kernel ahead of time, without a GPU, as it is launched, and prints one JSON line per kernel.

python tests/aot_compile.py 90 -> {"kernel", "sm", "registers", "stack", "local", "load_bits", "store_bits", "tensor_cores"} per
line. The functions that launch kernels are called with tensors that have no data, and their launches compiled instead of run.
A script of its own: the test process runs Triton's interpreter, in which nothing compiles.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ampo_fast import head
from ampo_fast.kernels import forward_logprob, group_contrastive, row_pass, segment_sum

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int8: "*i8"}


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def row_passes(num_tokens, everything=False):
    rows = empty(4096, head._row_stride(num_tokens, torch.device("cuda")), dtype=torch.bfloat16)
    logits, target, grad = rows[:, :num_tokens], empty(4096, dtype=torch.int64), empty(4096)
    options = (empty(num_tokens, dtype=torch.bfloat16), 0.8, 30.0, 3) if everything else (None, 1.0, None, None)
    sums = row_pass.row_logprob(logits, target, *options)[2]
    row_pass.row_gradient_(logits, target, sums, grad, grad if everything else None, *options)


def forward(dtype, num_hidden, num_tokens=50257, everything=True):
    hidden, weight = empty(4096, num_hidden, dtype=dtype), empty(num_tokens, num_hidden, dtype=dtype)
    options = (empty(num_tokens, dtype=dtype), 0.8, 30.0, 3) if everything else (None, 1.0, None, None)
    forward_logprob.forward_logprob(hidden, weight, empty(4096, dtype=torch.int64), *options)


def groups(widest, has_positive, has_baseline, split_mean):
    vectors = [empty(1000) for _ in range(4)]
    group_contrastive.group_contrastive(
        *vectors[:3], empty(17, dtype=torch.int64), widest, vectors[3],
        empty(1000, dtype=torch.int8) if has_positive else None, empty(16) if has_baseline else None,
        beta=10.0, alpha=0.3, log_gamma=1.1, is_avg=True, weight="abs", is_squared=True, split_mean=split_mean,
    )  # fmt: skip


CASES = {
    "rows_128256": partial(row_passes, 128256),
    "rows_49152": partial(row_passes, 49152),
    "rows_50257": partial(row_passes, 50257),
    "rows_everything": partial(row_passes, 128256, everything=True),
    "forward_bf16": partial(forward, torch.bfloat16, 4096),
    "forward_bf16_plain": partial(forward, torch.bfloat16, 4096, 128256, everything=False),
    "forward_bf16_unaligned": partial(forward, torch.bfloat16, 1000),
    "forward_fp32": partial(forward, torch.float32, 4096),
    "forward_fp32_unaligned": partial(forward, torch.float32, 1000),
    "group_given": partial(groups, 64, True, True, False),
    "group_best": partial(groups, 1024, False, True, False),
    "group_mean": partial(groups, 1024, False, False, True),
    "segment_sum": lambda: segment_sum.segment_sum(empty(1000), empty(17, dtype=torch.int64)),
}


def argument_type(value):
    """(type, constant or None, whether Triton knows that 16 divides it) by the rules of its JIT."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], None, True  # the allocator's addresses
    if value is None or (value == 1 and isinstance(value, int)):
        return "constexpr", value, False
    if isinstance(value, float):
        return "fp32", None, False
    return "i32" if value < 2**31 else "i64", None, value % 16 == 0


def compile_launch(name, arch, kernel, _num_programs, *arguments, **options):
    """Stands in for kernels.launch.launch."""
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    constants = {key: options.pop(key) for key in kernel.arg_names if key in options}
    attributes = {}
    for place, (key, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        signature[key], constant, is_divisible = argument_type(value)
        if signature[key] == "constexpr":
            constants[key] = constant
        if is_divisible:
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    found = {"kernel": f"{name}.{kernel.fn.__name__}", "sm": arch, **resources(binary.asm["cubin"])}
    print(json.dumps(found | {"tensor_cores": tensor_cores(binary.asm["ptx"])}), flush=True)


def resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage, re.S)
    widths = {key: widest(code, word) for key, word in (("load_bits", "LDG"), ("store_bits", "STG"))}
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True)) | widths


def cuobjdump(option, path):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    shown = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return shown.stdout + shown.stderr


def widest(code, word):
    """Bits of the widest access to global memory that one thread makes at once."""
    widths = [re.findall(r"\.[US]?(8|16|64|128)\b", access) for access in re.findall(rf"\b{word}\.E[.\w]*", code)]
    return max((int(width[0]) if width else 32 for width in widths), default=0)


def tensor_cores(ptx):
    return next((word for word in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if word in ptx), None)


def main(arch):
    tiles = forward_logprob.tiles
    forward_logprob.tiles = lambda dtype, _, is_aligned: tiles(dtype, arch // 10, is_aligned)
    for name, call in CASES.items():
        for module in (forward_logprob, group_contrastive, row_pass, segment_sum):
            module.launch = partial(compile_launch, name, arch)
        call()


if __name__ == "__main__":
    main(int(sys.argv[1]))
