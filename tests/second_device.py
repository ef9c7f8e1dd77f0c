"""python tests/second_device.py LIBRARY COMMAND...: `ampo-fast COMMAND...` on the device of csrc/second_device.cpp.

Its tensors do not mix with the CPU's: what a GPU would refuse is refused here, with no GPU at hand.
"""

import subprocess
import sys
import types
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "csrc" / "second_device.cpp"


def build(folder: Path) -> Path:
    from torch.utils import cpp_extension

    library = folder / "second_device.so"
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    link = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", abi, *include, str(SOURCE), *link, "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def register(library: str) -> torch.device:
    module = types.ModuleType("torch.second")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.synchronize = lambda device=None: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.utils.rename_privateuse1_backend("second")
    torch._register_device_module("second", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.ops.load_library(library)
    # Else Module.to() makes new parameters here and unties tied ones, as it does on no real device.
    torch.__future__.set_swap_module_params_on_conversion(True)
    return torch.device("second", 0)


if __name__ == "__main__":
    device = register(sys.argv[1])
    from ampo_fast import cli, distributed

    distributed.device = lambda: device
    sys.exit(cli.main(sys.argv[2:]))
