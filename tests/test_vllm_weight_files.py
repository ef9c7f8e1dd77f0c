"""Weights as files: in pieces, the newest alone, none left behind by a trainer that is killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ampo_fast.vllm import weight_files
from ampo_fast.vllm.weight_files import WeightFiles, roomy_parent


@pytest.fixture
def files(tmp_path):
    files = WeightFiles(tmp_path, torch.bfloat16)
    yield files
    files.close()


def test_the_weights_are_written_in_pieces_while_they_are_read(files, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "_FILE_BYTES", 100)
    weights = {f"layer.{i}": torch.full((20,), float(i)) for i in range(9)}  # 40 bytes each: two fill a file
    found = []

    def stream():
        for item in weights.items():
            found.append(len(list(tmp_path.rglob("model-*.safetensors"))))
            yield item

    assert files.write(3, stream()) is None
    assert found == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    parts = [load_file(path) for path in sorted(files.newest.iterdir())]
    assert [len(part) for part in parts] == [2, 2, 2, 2, 1]
    read = {name: tensor for part in parts for name, tensor in part.items()}
    assert read.keys() == weights.keys()
    for name, tensor in read.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), weights[name])


def test_tensors_that_share_memory_are_each_written(files):
    shared = torch.ones(3)
    files.write(1, [("embed", shared), ("head", shared)])
    assert load_file(files.newest / "model-00001.safetensors").keys() == {"embed", "head"}


def test_the_weights_of_before_are_the_callers_to_remove(files):
    files.write(1, [("a", torch.ones(3))])
    first = files.newest
    assert files.write(2, [("a", torch.ones(3))]) == first
    assert files.newest != first


def test_closed_it_leaves_nothing(files, tmp_path):
    files.write(1, [("a", torch.ones(3))])
    files.close()
    assert list(tmp_path.iterdir()) == []


def test_the_weights_go_where_two_versions_of_them_have_room(tmp_path, monkeypatch):
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    room = {memory: 64, disk: 200}
    for place in room:
        place.mkdir()
    monkeypatch.setattr(weight_files, "_IN_MEMORY", memory)  # a container's own has 64 MiB
    monkeypatch.setattr(weight_files.tempfile, "gettempdir", lambda: str(disk))
    monkeypatch.setattr(weight_files.shutil, "disk_usage", lambda place: SimpleNamespace(free=room[place]))
    assert roomy_parent(None, 32) == memory
    assert roomy_parent(None, 33) == disk
    with pytest.raises(ValueError, match=r"GiB in .*memory, .*disk; set rollout\.options\.sync_dir to"):
        roomy_parent(None, 101)
    with pytest.raises(ValueError, match=r"free are .* GiB in .*memory; set"):
        roomy_parent(memory, 33)
    with pytest.raises(ValueError, match=r"sync_dir = .*nowhere' is not a directory"):
        roomy_parent(tmp_path / "nowhere", 1)


def test_a_trainer_that_is_killed_leaves_nothing(tmp_path):
    code = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from ampo_fast.vllm.weight_files import WeightFiles\n"
        "files = WeightFiles(Path(sys.argv[1]), torch.float32)\n"
        "files.write(1, [('a', torch.ones(3))])\n"
        "print(files.newest, flush=True)\n"
        "time.sleep(600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    newest = Path(trainer.stdout.readline().strip())
    assert newest.is_dir()
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    deadline = time.monotonic() + 60
    while any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(tmp_path.iterdir())
