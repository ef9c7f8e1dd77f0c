"""What a bench's row says of the machine and the code that it was measured on."""

from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "bench"


def test_a_machine_without_git_keeps_its_rows(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    import rows

    monkeypatch.setenv("PATH", str(tmp_path))
    assert rows.context("torch")["commit"] == "unknown"
