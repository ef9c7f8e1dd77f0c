"""The README's examples, run as they are written there."""

import re
from pathlib import Path

import torch
from runs import write_run

from ampo_fast.config import load_config
from ampo_fast.stage_files import read_rows
from ampo_fast.trainer import train

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_of_the_fused_loss_runs_as_written(tiny_model):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    example = next(block for block in blocks if "fused_linear_group_loss" in block)
    names = {
        "path": str(tiny_model),
        "ids_ML": torch.randint(5, 50, (4, 12), generator=torch.Generator().manual_seed(0)),
        "prompt_length": 5,
        "rewards_M": torch.tensor([0.1, 0.9, 0.4, 0.2]),
    }
    exec(example, names)
    model, ids, offsets = names["model"], names["ids_ML"], names["response_offsets"]
    assert offsets.tolist() == [0, 7, 14, 21, 28]
    logp = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(2, ids[:, 1:, None])[:, 4:, 0].sum(1)
    torch.testing.assert_close(names["stats"].logp_M, logp, atol=1e-4, rtol=1e-4)
    assert model.lm_head.weight.grad.abs().max() > 0


def test_the_example_of_own_code_trains_as_written(tiny_model, tmp_path, monkeypatch):
    example = next(
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S) if "mine.py" in block
    )
    (tmp_path / "mine.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    options = re.search(r"# mine.py, for (.*)", example)[1].split()
    train(load_config(str(write_run(tmp_path, tiny_model, run={"steps": 2}, eval={"every": 0})), options))
    rows = read_rows(tmp_path / "runs/r/rollouts/step_000001.jsonl")
    kept = [[r for r in row["responses"] if r["selected"] == "negative"] for row in rows if row["skip_reason"] is None]
    assert kept
    assert all(1 <= len(negatives) <= 3 for negatives in kept)


def test_its_tables_say_what_the_rows_of_the_benches_say(monkeypatch):
    monkeypatch.syspath_prepend(str(README.parent / "bench"))
    import readme_tables

    text = README.read_text()
    assert text.count("<!-- rows: ") == len(readme_tables.TABLES)
    assert readme_tables.with_tables(text) == text, "run python bench/readme_tables.py"
    assert readme_tables.with_tables(text.replace("| random |", "| rnd |")) == text
