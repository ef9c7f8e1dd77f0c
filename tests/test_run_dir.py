"""A run directory goes on with the data that it began with."""

from dataclasses import replace

import pytest
from builders import prompt

from ampo_fast.run_dir import keep_data
from ampo_fast.types import GivenResponse

GIVEN = (GivenResponse(content="yes", reward=1.0, scores={"help": 4.0}), GivenResponse(content="no", reward=0.0))


def begun(tmp_path):
    prompts = [replace(prompt(i), responses=GIVEN) for i in range(3)]
    keep_data(tmp_path, {"data.train": prompts, "data.eval": prompts[:1]})
    return prompts


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: [rows[1], rows[0], rows[2]],
        lambda rows: [*rows, prompt(3)],
        lambda rows: [rows[0], prompt(1, "goodbye?"), rows[2]],
        lambda rows: [replace(rows[0], id="other"), *rows[1:]],
        lambda rows: [replace(rows[0], responses=(replace(GIVEN[0], reward=0.0), GIVEN[1])), *rows[1:]],
        lambda rows: [replace(rows[0], responses=(replace(GIVEN[0], content="yes!"), GIVEN[1])), *rows[1:]],
        lambda rows: [replace(rows[0], responses=(replace(GIVEN[0], scores={"help": 1.0}), GIVEN[1])), *rows[1:]],
    ],
    ids=["order", "more", "text", "id", "reward", "response", "score"],
)
def test_other_data_is_refused_on_resume_by_its_field(tmp_path, change):
    prompts = begun(tmp_path)
    with pytest.raises(ValueError, match=r"data\.train gives other .*--run\.name"):
        keep_data(tmp_path, {"data.train": change(prompts), "data.eval": prompts[:1]})
    with pytest.raises(ValueError, match=r"data\.eval gives other"):
        keep_data(tmp_path, {"data.train": prompts, "data.eval": change(prompts)})
    begun(tmp_path)


def test_how_many_prompts_there_were_is_said(tmp_path):
    prompts = begun(tmp_path)
    with pytest.raises(ValueError, match=r"\(3 prompts then, 2 now\)"):
        keep_data(tmp_path, {"data.train": prompts[:2], "data.eval": prompts[:1]})
