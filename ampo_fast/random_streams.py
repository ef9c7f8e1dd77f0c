"""A seed for every random stream, from what names the stream: no state, so that resuming and batching change no draw."""

from __future__ import annotations

import hashlib


def stream_seed(*parts: object) -> int:
    """A 63-bit seed from what identifies a random stream, e.g. (seed, step, prompt id, candidate index)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
