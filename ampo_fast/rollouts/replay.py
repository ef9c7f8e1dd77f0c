"""The replay buffer: a round's groups join those of earlier rounds, and what is trained on is drawn from all of them.

What is in the buffer, and how often each was drawn, follows from the rounds' files alone, so that a resumed run draws what
one that never stopped draws.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from ampo_fast.random_streams import stream_seed
from ampo_fast.types import SelectedGroup


class ReplayBuffer:
    """First in, first out, of at most `size` trained groups; drawn with probability ~ 1 / (times drawn + 1) (SAPO,
    arXiv 2405.20830)."""

    def __init__(self, size: int, seed: int, read: Callable[[int], Sequence[SelectedGroup]]) -> None:
        """read: the groups of an earlier round, for a run that is resumed."""
        self.seed, self.read = seed, read
        self._groups: deque[SelectedGroup] = deque(maxlen=size)
        self._times: deque[int] = deque(maxlen=size)
        self._next = 0
        self._drawn: list[SelectedGroup] = []

    def draw(self, index: int, new: Sequence[SelectedGroup]) -> list[SelectedGroup]:
        """As many groups as round `index` has, `new`, drawn from the buffer that they join; rounds are asked for in order.

        No group twice in a round (the released code draws with replacement). Where the buffer holds fewer, the round's
        own groups that are left out fill it up.
        """
        while self._next < index:
            self._join(self._next, self.read(self._next))
        if self._next == index:
            self._join(index, new)
        return self._drawn

    def _join(self, index: int, new: Sequence[SelectedGroup]) -> None:
        for group in new:
            if group.is_trained:
                self._groups.append(group)
                self._times.append(0)
        count = min(len(new), len(self._groups))
        chosen: list[int] = []
        if count:
            weight = torch.tensor([1.0 / (times + 1) for times in self._times], dtype=torch.float64)
            generator = torch.Generator().manual_seed(stream_seed("replay", self.seed, index))
            chosen = torch.multinomial(weight, count, generator=generator).tolist()
        for i in chosen:
            self._times[i] += 1
        left_out = [group for group in new if not group.is_trained]
        self._drawn = [self._groups[i] for i in chosen] + left_out[: len(new) - count]
        self._next = index + 1
