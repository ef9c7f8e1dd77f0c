"""What was interrupted leaves the old file, and nobody is locked out of the new one."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from builders import scored
from runs import of_other_modes
from safetensors.torch import load_file

from ampo_fast.files import save_tensors, write_atomic, write_json
from ampo_fast.stage_files import write_rows_atomic

WRITERS = {
    "a.json": lambda path, i: write_json(path, {"i": i}),
    "a.safetensors": lambda path, i: save_tensors(path, {"i": torch.tensor([i])}),
    "a.jsonl": lambda path, i: write_rows_atomic(path, [scored([0.0, 1.0], i)]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_files_whole(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path / name, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](tmp_path / name, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_kill_in_the_middle_leaves_the_old_file_and_the_next_write_mends_the_rest(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"i": 1})
    code = f"""
        import os, signal
        from pathlib import Path
        from ampo_fast.files import write_atomic
        def write(aside):
            aside.write_text('{{"i": ')
            os.kill(os.getpid(), signal.SIGKILL)
        write_atomic(Path({str(path)!r}), write)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert json.loads(path.read_text()) == {"i": 1}
    write_atomic(path, lambda aside: aside.write_text('{"i": 2}'))
    assert json.loads(path.read_text()) == {"i": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_tensors_that_lie_scattered_are_written_with_their_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    tensor = torch.arange(6).reshape(2, 3).T
    save_tensors(path, {"x": tensor}, metadata={"format": "pt"})
    assert torch.equal(load_file(path)["x"], tensor)
    assert b'"format":"pt"' in path.read_bytes()


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
@pytest.mark.parametrize("name", WRITERS)
def test_the_umask_says_who_may_read(tmp_path, name, umask):
    before = os.umask(umask)
    try:
        WRITERS[name](tmp_path / name, 1)
        assert not of_other_modes(tmp_path)
    finally:
        os.umask(before)


def test_what_the_file_system_refuses_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match=r"none/a\.safetensors"):
        save_tensors(tmp_path / "none/a.safetensors", {"x": torch.zeros(1)})
