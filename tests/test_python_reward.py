"""A user's own reward function: where it is found, what it gets, and how its mistakes are told."""

import subprocess
import sys

import pytest
import torch
from builders import prompt

from ampo_fast.python_reward import PythonScorer

SCORERS = """
def reads_trl(prompts, responses):
    return [float(len(p[-1]["content"])) for p in prompts]

def reads_attributes(prompts, responses):
    return [len(p.messages[0]["content"]) + int(p.id[1:]) for p in prompts]

def tensor(prompts, responses):
    import torch
    return torch.arange(len(responses))

def generator(prompts, responses):
    yield from (None, True)

def fails(prompts, responses):
    return [len(r) / 0 for r in responses]

def fails_late(prompts, responses):
    yield 1.0
    raise KeyError("gold")

def one_argument(prompts):
    return []

def none(prompts, responses): return None
def short(prompts, responses): return [1.0]
def nested(prompts, responses): return [[1.0], [2.0]]
def word(prompts, responses): return ["good", "bad"]
def as_for_another_trainer(completions, ground_truth, **columns): return [1.0] * len(completions)
def swapped(texts, prompts): return [1.0] * len(texts)
def texts_of_trl(prompts, completions, **columns): return [float(len(c)) for c in completions]

def for_inference(prompts, responses):
    import torch
    torch.set_grad_enabled(False)
    return [1.0 for _ in responses]

constant = 3
"""


@pytest.fixture
def scorers(tmp_path, monkeypatch):
    """A module in the working directory, which is not on the path; -> its name."""
    (tmp_path / "my_scorers.py").write_text(SCORERS)
    (tmp_path / "my_broken.py").write_text("x = 1\nundefined_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "my_scorers"
    sys.modules.pop("my_scorers", None)


def score(kind):
    return PythonScorer(kind, "reward.kind")([prompt(3, "why?"), prompt(4, "how so?")], ["a", "b"])


@pytest.mark.parametrize(
    ("function", "rewards"),
    [
        ("reads_trl", [4.0, 7.0]),
        ("reads_attributes", [7.0, 11.0]),
        ("tensor", [0.0, 1.0]),
        ("generator", [None, 1.0]),
    ],
)
def test_prompts_read_as_messages_and_any_numbers_are_rewards(scorers, function, rewards):
    found = score(f"{scorers}:{function}")
    assert found == rewards
    assert all(type(reward) in (float, type(None)) for reward in found)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        ("fails", r"failed: ZeroDivisionError: .*my_scorers\.py:16\)$"),
        ("fails_late", r"failed: KeyError: 'gold' \(.*my_scorers\.py:20\)$"),
        ("one_argument", r"failed: TypeError: .*1 positional argument.*my_scorers\.py:22\)$"),
        ("none", "returned None for 2 responses"),
        ("short", "returned 1 rewards for 2 responses"),
        ("nested", r"returned \[1\.0\] for a response; it must be a number"),
        ("word", "returned 'good' for a response; it must be a number"),
        ("constant", "is no function: it is int"),
        ("nope", "cannot be imported: AttributeError.*nope"),
    ],
)
def test_its_mistakes_are_sentences_with_the_kind_and_the_line(scorers, function, match):
    with pytest.raises(ValueError, match=f"^reward.kind = 'my_scorers:{function}' .*{match}"):
        score(f"{scorers}:{function}")


def test_a_module_that_cannot_be_imported_is_named_with_its_line(scorers):
    with pytest.raises(ValueError, match=r"cannot be imported: NameError: .*my_broken\.py:2\)"):
        score("my_broken:f")
    with pytest.raises(ValueError, match="cannot be imported: ModuleNotFoundError"):
        score("no_such_module:f")


def test_an_installed_command_finds_a_module_of_the_working_directory(scorers, tmp_path):
    # As the console script is: its own directory stands first on the path, not the one that it is called in.
    script = tmp_path / "bin" / "command.py"
    script.parent.mkdir()
    script.write_text(
        "from ampo_fast.python_reward import PythonScorer\nprint(PythonScorer('my_scorers:none', 'f').function)"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "function none" in done.stdout, done.stderr


def test_what_it_does_to_the_prompts_stays_with_it():
    asked = prompt(0, "why?")
    scorer = PythonScorer("toy_rewards:vowels", "reward.kind")
    scorer.function = lambda prompts, responses: [prompts[0][0].update(content="") or len(prompts[0].append({}) or "")]
    scorer([asked], ["a"])
    assert asked.messages == ({"role": "user", "content": "why?"},)


@pytest.mark.parametrize("name", ["as_for_another_trainer", "swapped"])
def test_a_function_of_other_arguments_is_refused_before_it_judges_the_prompts(scorers, name):
    with pytest.raises(ValueError, match=rf"{name}' takes \(\w+, \w+\), and is called with \(prompts, responses\)"):
        PythonScorer(f"{scorers}:{name}", "reward.kind")


def test_texts_may_be_called_completions(scorers):
    assert score(f"{scorers}:texts_of_trl") == [1.0, 1.0]


def test_what_a_function_does_to_the_grad_mode_ends_with_it(scorers, tmp_path):
    (tmp_path / "my_inference.py").write_text("import torch\ntorch.set_grad_enabled(False)\nfrom my_scorers import *\n")
    for module in (scorers, "my_inference"):
        assert score(f"{module}:for_inference") == [1.0, 1.0]
        assert torch.is_grad_enabled()
