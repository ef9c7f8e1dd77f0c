"""What a reward model reads: prompt and response through the chat template, as any HuggingFace user of it would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# An encoder's tokenizer has no chat template: turns one after another, each closed by its separator.
_PLAIN_TEMPLATE = "{{ cls_token }}{% for m in messages %}{{ m['content'] }}{{ sep_token }}{% endfor %}"
# Where the tokenizer drops line breaks they are written as this: lists and paragraphs tell much about an answer.
_LINE_BREAK = "¶"
_MARKER = "ampo"


class RewardText:
    """A tokenizer with a template and a limit, both saved with the model: the same text always has the same ids."""

    max_tokens: int

    def __init__(self, tokenizer: Any) -> None:
        """limit() is to be called before a text is read."""
        if not tokenizer.chat_template:
            if tokenizer.cls_token is None or tokenizer.sep_token is None:
                raise ValueError("the tokenizer has no chat template; put a chat_template.jinja beside it")
            tokenizer.chat_template = _plain_template(tokenizer)
        self.tokenizer = tokenizer
        self.num_truncated = 0
        self._closing = self._closing_ids()
        self.pad_id = self._choose_pad()

    def limit(self, max_tokens: int) -> None:
        self.max_tokens = self.tokenizer.model_max_length = max_tokens

    @property
    def closing_id(self) -> int:
        """The last token of every text: what a decoder's head reads."""
        return self._closing[-1]

    def encode(self, messages: Sequence[dict[str, str]], responses: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of prompt + response, for each response.

        Beyond max_tokens the response's end is cut, counted; of a prompt over half of them its beginning, but for the token
        that opens every text: a BERT's head reads it, and a Llama without its BOS is another model.
        """
        texts = [self._template(messages, response) for response in responses]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [self._fit(tuple(ids), messages) for ids in encoded]

    def is_overlong(self, messages: Sequence[dict[str, str]], response: str) -> bool:
        text = self._template(messages, response)
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) > self.max_tokens

    def response_lengths(self, messages: Sequence[dict[str, str]], responses: Sequence[str]) -> list[int]:
        """How many of each text's ids are its response and its closing, as encode leaves it."""
        texts = [self._template(messages, response) for response in responses]
        whole = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        prompt = self._prompt_length(messages)
        most = self.max_tokens - min(prompt, self.max_tokens // 2)
        return [max(1, min(len(ids) - prompt, most)) for ids in whole]

    def _prompt_length(self, messages: Sequence[dict[str, str]]) -> int:
        prompt = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return len(self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])

    def _template(self, messages: Sequence[dict[str, str]], response: str) -> str:
        turns = [*messages, {"role": "assistant", "content": response}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False)

    def _fit(self, ids: tuple[int, ...], messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        if len(ids) <= self.max_tokens:
            return ids
        self.num_truncated += 1
        length = self._prompt_length(messages)
        half = self.max_tokens // 2
        if length > half:  # the prompt's end stays: it holds the question
            opening = ids[:1] if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else ()
            ids = opening + ids[length - half + len(opening) : length] + ids[length:]
        if len(ids) <= self.max_tokens:  # the response is whole, with its closing
            return ids
        return ids[: self.max_tokens - len(self._closing)] + self._closing

    def _closing_ids(self) -> tuple[int, ...]:
        """What the template writes after an assistant's words."""
        after = self._template([{"role": "user", "content": "a"}], _MARKER).rpartition(_MARKER)[2]
        ids = tuple(self.tokenizer(after, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError("the chat template closes no turn: a reward model reads the token that ends the response")
        return ids

    def _choose_pad(self) -> int:
        """HF's decoders pool at the rightmost token that is not padding: it must not be the one that ends a text."""
        tokenizer = self.tokenizer
        known = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, 0, 1]
        pad = next(i for i in known if i is not None and i != self._closing[-1])
        if pad != tokenizer.pad_token_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        return pad


def _plain_template(tokenizer: Any) -> str:
    drops_breaks = tokenizer.tokenize("a\nb") == tokenizer.tokenize("a b")
    if not drops_breaks or tokenizer.tokenize(_LINE_BREAK) != [_LINE_BREAK]:
        return _PLAIN_TEMPLATE
    return _PLAIN_TEMPLATE.replace("m['content']", f"m['content'] | replace('\\n', ' {_LINE_BREAK} ')")
