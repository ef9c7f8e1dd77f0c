"""A reward that is a user's own function, MODULE:FUNCTION(prompts, responses): found, called, and its mistakes named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ampo_fast.types import Prompt
from ampo_fast.user_code import named_object, own_grad_mode, told

_PROMPTS = ("prompt", "prompts", "messages", "question", "questions")
_RESPONSES = ("completion", "completions", "response", "responses", "answer", "answers")


class Turns(list[dict[str, str]]):
    """A prompt as the function gets it: chat turns like TRL's, p[-1]["content"] the question; p.id is the row's id."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__(map(dict, prompt.messages))
        self.id = prompt.id

    @property
    def messages(self) -> list[dict[str, str]]:
        return self


class PythonScorer:
    """Raises ValueError naming field and kind where the function cannot be had, fails, or does not give one number or None
    for each response."""

    def __init__(self, kind: str, field: str) -> None:
        self.named = f"{field} = {kind!r}"
        self.function = self._load(kind, field)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        try:
            with own_grad_mode():
                returned = self.function([Turns(prompt) for prompt in prompts], list(responses))
                rewards = None if returned is None else list(returned)  # which runs a generator
        except Exception as error:
            raise ValueError(f"{self.named} failed: {told(error, self.function)}") from error
        if rewards is None or len(rewards) != len(responses):
            count = "None" if rewards is None else f"{len(rewards)} rewards"
            raise ValueError(
                f"{self.named} returned {count} for {len(responses)} responses; it must return one number, or None, for each"
            )
        return [self._number(reward) for reward in rewards]

    def _number(self, reward: Any) -> float | None:
        try:
            return None if reward is None else float(reward)
        except (TypeError, ValueError):
            raise ValueError(f"{self.named} returned {reward!r} for a response; it must be a number, or None") from None

    def _load(self, kind: str, field: str) -> Callable[..., Any]:
        function = named_object(kind, field)
        if not callable(function):
            raise ValueError(f"{self.named} is no function: it is {type(function).__name__}")
        self._check_order(function)
        return function

    def _check_order(self, function: Callable[..., Any]) -> None:
        """Refuses what names its arguments in another order, as functions for other trainers do: it would judge the prompts."""
        try:
            names = [p.name for p in inspect.signature(function).parameters.values() if p.kind in _BY_PLACE]
        except (TypeError, ValueError):  # a built-in function that does not say
            return
        if (names[:1] and names[0] in _RESPONSES) or (names[1:2] and names[1] in _PROMPTS):
            raise ValueError(
                f"{self.named} takes ({', '.join(names)}), and is called with (prompts, responses), by place: chat turns and "
                "texts, one of each for each response; wrap it in a function of these two"
            )


_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
