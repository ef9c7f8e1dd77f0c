"""What is said of a config before a model is loaded."""

import pytest
from builders import config

from ampo_fast.start_checks import _check_options


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"rollout": {"options": {"enforce_eager": True}}}, "nothing reads rollout.options: enforce_eager = True"),
        ({"reward": {"options": {"timeout_s": 9.0}}}, "nothing reads reward.options: timeout_s = 9.0"),
        ({"rollout": {"options": {"enforce_eager": True}, "engine": "vllm"}}, ""),
        ({"reward": {"options": {"timeout_s": 9.0}, "kind": ["relevance", "http://127.0.0.1:1"]}}, ""),
        ({"reward": {"options": {"timeout_s": 9.0}}, "eval": {"reward": "http://127.0.0.1:1"}}, ""),
        ({}, ""),
    ],
)
def test_options_that_nothing_reads_are_said(sections, said, caplog):
    _check_options(config(**sections))
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


@pytest.mark.parametrize("section", ["rollout", "reward"])
def test_a_misspelt_option_is_refused_also_where_nothing_reads_it(section):
    with pytest.raises(ValueError, match=rf"{section}\.options\.enforce_eger"):
        _check_options(config(**{section: {"options": {"enforce_eger": True}}}))
