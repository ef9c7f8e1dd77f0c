import json
import resource
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from builders import config

from ampo_fast import checkpoint
from ampo_fast.checkpoint import checkpoint_dirs, load_checkpoint, prune_checkpoints, require_disk, save_checkpoint
from ampo_fast.config import CheckpointConfig, ModelConfig, OptimConfig
from ampo_fast.model import Policy
from ampo_fast.optimizer import make_optimizer


def trained(tiny_model, seed):
    policy = Policy.load(ModelConfig(path=str(tiny_model)))
    optimizer = make_optimizer(policy.parameters(), OptimConfig(lr=1e-2))
    torch.manual_seed(seed)
    for _ in range(2):
        for parameter in policy.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return policy, optimizer


def test_parameters_moments_and_state_come_back_bit_for_bit(tiny_model, tmp_path):
    policy, optimizer = trained(tiny_model, 0)
    path = save_checkpoint(tmp_path, 7, policy, optimizer, {"spreads": [0.1 + 0.2]})
    other, other_optimizer = trained(tiny_model, 1)
    assert load_checkpoint(path, other, other_optimizer) == {"spreads": [0.1 + 0.2]}
    for a, b in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for p, q in zip(policy.parameters(), other.parameters(), strict=True):
        a, b = optimizer.state[p], other_optimizer.state[q]
        assert all(torch.equal(a[key], b[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_partial_checkpoints_are_not_seen_and_old_ones_pruned(tiny_model, tmp_path):
    policy, optimizer = trained(tiny_model, 0)
    for step in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, step, policy, optimizer, {})
    (tmp_path / "step_000006.partial").mkdir()
    assert [step for step, _ in checkpoint_dirs(tmp_path)] == [1, 2, 3, 4, 5]
    prune_checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_every=2))
    assert [step for step, _ in checkpoint_dirs(tmp_path)] == [2, 4, 5]
    assert not list(tmp_path.glob("*.partial"))


def test_a_truncated_file_is_named_with_the_way_out(tiny_model, tmp_path):
    policy, optimizer = trained(tiny_model, 0)
    path = save_checkpoint(tmp_path, 1, policy, optimizer, {})
    shard = min(path.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=rf"{shard.name} has {len(content) - 100} bytes.*truncated.*fall back"):
        load_checkpoint(path, policy, optimizer)
    shard.write_bytes(content[:8] + b"x" * 100 + content[108:])
    with pytest.raises(ValueError, match=r"step_000001.*fall back"):
        load_checkpoint(path, policy, optimizer)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is missing"):
        load_checkpoint(path, policy, optimizer)


def test_a_flipped_bit_is_named_with_its_file_and_the_way_out(tiny_model, tmp_path):
    policy, optimizer = trained(tiny_model, 0)
    path = save_checkpoint(tmp_path, 1, policy, optimizer, {})
    assert len(list(path.glob("*.safetensors"))) == 4
    for shard in path.glob("*.safetensors"):
        content = bytearray(shard.read_bytes())
        content[-3] ^= 0x40
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{shard.name} is not what was written.*fall back"):
            load_checkpoint(path, policy, optimizer)
        content[-3] ^= 0x40
        shard.write_bytes(content)
    load_checkpoint(path, policy, optimizer)


def test_a_checkpoint_from_before_there_were_crcs_loads(tiny_model, tmp_path):
    policy, optimizer = trained(tiny_model, 0)
    path = save_checkpoint(tmp_path, 1, policy, optimizer, {"of": 1})
    header = json.loads((path / "state.json").read_text())
    assert header.pop("crc32").keys() == header["files"].keys()
    (path / "state.json").write_text(json.dumps(header))
    assert load_checkpoint(path, policy, optimizer) == {"of": 1}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda header: [header], "holds a list"),
        (lambda header: header | {"files": None}, "lacks 'files'"),
        (lambda header: {k: v for k, v in header.items() if k != "state"}, "lacks 'state'"),
        (lambda header: header | {"world_size": "2"}, "lacks 'world_size'"),
    ],
)
def test_a_state_file_that_is_no_state_is_named(tiny_model, tmp_path, damage, said):
    policy, optimizer = trained(tiny_model, 0)
    path = save_checkpoint(tmp_path, 1, policy, optimizer, {})
    file = path / "state.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=rf"step_000001/state\.json {said}.*fall back"):
        load_checkpoint(path, policy, optimizer)


def test_a_checkpoint_of_another_format_is_refused(tiny_model, tmp_path):
    policy, optimizer = trained(tiny_model, 0)
    path = save_checkpoint(tmp_path, 1, policy, optimizer, {})
    state = path / "state.json"
    state.write_text(state.read_text().replace('"format": 2', '"format": 9'))
    with pytest.raises(ValueError, match="format 9, this version reads 2"):
        load_checkpoint(path, policy, optimizer)


def test_a_checkpoint_of_another_model_is_refused(tiny_model, tmp_path):
    from conftest import make_tiny_model

    policy, optimizer = trained(tiny_model, 0)
    path = save_checkpoint(tmp_path / "c", 1, policy, optimizer, {})
    other, other_optimizer = trained(make_tiny_model(tmp_path / "m", num_hidden_layers=3), 0)
    with pytest.raises(ValueError, match="another model"):
        load_checkpoint(path, other, other_optimizer)


def test_a_full_disk_leaves_the_last_good_checkpoint(tiny_model, tmp_path):
    # A file-size limit makes write() fail as a full disk does, with a real OSError from the kernel.
    code = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parent)!r})
        from pathlib import Path
        from test_checkpoint import trained
        from ampo_fast.checkpoint import save_checkpoint
        policy, optimizer = trained({str(tiny_model)!r}, 0)
        root = Path({str(tmp_path)!r})
        save_checkpoint(root, 1, policy, optimizer, {{"of": 1}})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            save_checkpoint(root, 2, policy, optimizer, {{}})
        except Exception as error:
            print(type(error).__name__, error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "Error" in done.stdout, done.stderr
    assert [step for step, _ in checkpoint_dirs(tmp_path)] == [1]
    assert not list(tmp_path.glob("*.partial"))
    policy, optimizer = trained(tiny_model, 1)
    assert load_checkpoint(tmp_path / "step_000001", policy, optimizer) == {"of": 1}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_too_little_room_is_named_before_anything_is_written(tiny_model, tmp_path, monkeypatch):
    policy, optimizer = trained(tiny_model, 0)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.setattr(checkpoint, "write_shards", lambda *_: pytest.fail("was written"))
    with pytest.raises(OSError, match=r"needs \d+ MiB.*0 MiB free.*checkpoint\.keep_last"):
        save_checkpoint(tmp_path / "checkpoints", 1, policy, optimizer, {})
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_run_that_cannot_fit_is_refused_at_the_start(tiny_policy, tmp_path):
    require_disk(tmp_path, tiny_policy, config())
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last"):
        require_disk(tmp_path, tiny_policy, config(checkpoint={"keep_last": 10**9}))


def test_room_is_found_in_what_will_be_replaced_and_nowhere_else(tiny_model, tmp_path, monkeypatch):
    policy, optimizer = trained(tiny_model, 0)
    size = 4 * sum(parameter.numel() for parameter in policy.parameters())
    kept = config(checkpoint={"keep_last": 2})
    needed = 3 * 3 * size + 2 * size
    usage = shutil.disk_usage(tmp_path)

    def room(num_bytes):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=num_bytes))

    room(needed)
    require_disk(tmp_path, policy, kept)
    with pytest.raises(ValueError, match=r"needs up to"):
        require_disk(tmp_path, policy, config(checkpoint={"keep_last": 2}, reference={"every": 1}))
    room(needed - 1)
    for name in ("rollouts/step_000001", "checkpoints/step_000001/model"):  # the second is older than the newest two
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(10 * size))
    for step in (2, 3):
        save_checkpoint(tmp_path / "checkpoints", step, policy, optimizer, {})
    prune = sum(file.stat().st_size for file in (tmp_path / "checkpoints").glob("step_00000[23]/*.safetensors"))
    assert 6 * size < prune < 7 * size
    require_disk(tmp_path, policy, kept)
    room(needed - prune - 1)
    with pytest.raises(ValueError, match=r"needs up to"):
        require_disk(tmp_path, policy, kept)
