"""JSON over HTTP with bounded waits and retries. Keys travel in a header and appear in no error, log or repr."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import math
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import tenacity

from ampo_fast.urls import checked_url, is_loopback

log = logging.getLogger(__name__)

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_MAX_SHOWN = 400
_CHUNK_BYTES = 1 << 16
_LONGEST_WAIT_S = 20.0
_LONGEST_ASKED_WAIT_S = 300.0


class HttpError(ConnectionError):
    """A call that failed. `is_passing`: the same call may succeed later (the server is away, busy or broke off), and not
    before wait_s where the server named a time (Retry-After in seconds, of rate limits); `status`: what it answered, where
    it did."""

    def __init__(self, message: str, is_passing: bool = False, status: int | None = None, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.is_passing, self.status = is_passing, status
        self.wait_s = min(wait_s, _LONGEST_ASKED_WAIT_S)


class JsonClient:
    """One server. `post` and `get` return the decoded body, or raise HttpError: after timeout_s of silence, and when an
    answer that trickles in is not whole by then."""

    def __init__(self, base_url: str, key: str | None = None, timeout_s: float = 60.0) -> None:
        self.base_url = checked_url(base_url)
        self.timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        # A proxy from the environment must never see what is meant for this machine.
        handlers = [urllib.request.ProxyHandler({})] if is_loopback(self.base_url) else []
        self._waiting: set[http.client.HTTPConnection] = set()
        self._opener = urllib.request.build_opener(
            *handlers, _NoRedirect(), _Http(self._waiting), _Https(self._waiting)
        )

    def post(self, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        return self._call("POST", path, json.dumps({} if body is None else body).encode(), timeout_s)

    def get(self, path: str, timeout_s: float | None = None) -> Any:
        return self._call("GET", path, None, timeout_s)

    def break_off(self) -> None:
        """Ends the calls that other threads wait in: they raise HttpError, and the server sees that nobody waits any more."""
        for connection in list(self._waiting):
            if connection.sock is not None:
                with contextlib.suppress(OSError):  # the server was faster
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _call(self, method: str, path: str, data: bytes | None, timeout_s: float | None) -> Any:
        url = self.base_url + path
        request = urllib.request.Request(url, data=data, headers=self._headers, method=method)
        try:
            status, text, wait_s = self._exchange(request, timeout_s or self.timeout_s)
        except (OSError, http.client.HTTPException) as error:  # URLError, timeouts, resets, torn answers
            raise HttpError(f"{method} {url}: {getattr(error, 'reason', error)!r}", True) from None
        if status >= 300:
            shown = text[:_MAX_SHOWN].decode(errors="replace")
            raise HttpError(f"{method} {url}: HTTP {status}: {shown}", status in _PASSING, status, wait_s)
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            raise HttpError(f"{method} {url}: the answer is not JSON: {text[:_MAX_SHOWN]!r}", True) from None

    def _exchange(self, request: urllib.request.Request, timeout_s: float) -> tuple[int, bytes, float]:
        """(status, body, the wait that it asks for)"""
        deadline = time.monotonic() + timeout_s
        try:
            answer = self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as refusal:
            answer = refusal
        with answer:
            asked = answer.headers.get("Retry-After", "")
            return answer.status, _read(answer, deadline), float(asked) if asked.isdecimal() else 0.0


def _read(answer: Any, deadline: float) -> bytes:
    """The whole body. Raises TimeoutError past the deadline: a socket's own timeout begins anew with every byte."""
    parts = []
    while part := answer.read1(_CHUNK_BYTES):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError(f"no whole answer in time, {sum(map(len, parts))} bytes of it")
    body = b"".join(parts)
    if answer.length:  # read1, unlike read, does not mind an end that comes too early
        raise http.client.IncompleteRead(body, answer.length)
    return body


class _Waiting(urllib.request.AbstractHTTPHandler):
    """Keeps in `waiting` the connections whose server has not begun to answer: urllib shows them to nobody."""

    def __init__(self, waiting: set[http.client.HTTPConnection]) -> None:
        super().__init__()
        self._waiting = waiting

    def do_open(self, http_class: Callable[..., Any], request: Any, **arguments: Any) -> Any:
        made: list[http.client.HTTPConnection] = []

        def make(*args: Any, **kwargs: Any) -> http.client.HTTPConnection:
            made.append(http_class(*args, **kwargs))
            self._waiting.update(made)
            return made[-1]

        try:
            return super().do_open(make, request, **arguments)
        finally:
            self._waiting.difference_update(made)


class _Http(_Waiting, urllib.request.HTTPHandler):
    pass


class _Https(_Waiting, urllib.request.HTTPSHandler):
    pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to wherever it points."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def retried(call: Callable[[], Any], attempts: int, at_least_s: float = 0.0, at_most_s: float = math.inf) -> Any:
    """call(), repeated with growing random pauses while it raises a passing HttpError; the last error is raised.

    It ends after `attempts` calls or, where that is later, after at_least_s; in any case after at_most_s. A pause is no
    shorter than the error asks for.
    """
    enough = tenacity.stop_all(tenacity.stop_after_attempt(attempts), tenacity.stop_after_delay(at_least_s))
    growing = tenacity.wait_random_exponential(multiplier=0.2, max=_LONGEST_WAIT_S)
    retrying = tenacity.Retrying(
        stop=tenacity.stop_any(enough, tenacity.stop_after_delay(at_most_s)),
        wait=lambda state: growing(state) + state.outcome.exception().wait_s,
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, HttpError) and error.is_passing),
        before_sleep=lambda state: log.warning("retrying: %s", state.outcome.exception()),
        reraise=True,
    )
    return retrying(call)
