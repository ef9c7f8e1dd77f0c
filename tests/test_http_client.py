"""JSON over HTTP against raw servers on this machine: proxies, slow and torn answers, pauses."""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ampo_fast.http_client import HttpError, JsonClient, retried


@pytest.fixture
def serve():
    """serve(parts, pause_s): a server that sends these bytes to whoever connects -> its port; asked: what it was sent."""
    sockets, asked = [], []

    def start(parts, pause_s=0.0):
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)

        def answer():
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(65536))
                for part in parts:
                    try:
                        connection.sendall(part)
                    except OSError:  # the client has had enough
                        return
                    threading.Event().wait(pause_s)

        threading.Thread(target=answer, daemon=True).start()
        return listener.getsockname()[1]

    start.asked = asked
    yield start
    for listener in sockets:
        listener.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"


def client(port, timeout_s=20.0):
    return JsonClient(f"http://127.0.0.1:{port}", timeout_s=timeout_s)


def test_an_answer_in_pieces_is_read_whole(serve):
    assert client(serve([HEAD, b'{"a": ', b"123}"], pause_s=0.02)).get("/") == {"a": 123}


def test_a_call_that_another_thread_breaks_off_ends_at_once(serve):
    one = client(serve([b""], pause_s=20))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one.get, "/")
        while not serve.asked:
            time.sleep(0.01)
        one.break_off()
        with pytest.raises(HttpError):
            call.result(timeout=10)


def test_an_answer_that_trickles_in_is_given_up(serve):
    drops = [b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", *[b" "] * 500]
    with pytest.raises(HttpError, match="no whole answer in time") as caught:
        client(serve(drops, pause_s=0.02), timeout_s=0.2).get("/")
    assert caught.value.is_passing


@pytest.mark.parametrize("body", [b"", b"[1]"])
def test_an_answer_that_breaks_off_is_none(serve, body):
    with pytest.raises(HttpError, match="IncompleteRead") as caught:
        client(serve([HEAD + body])).get("/")
    assert caught.value.is_passing


def test_a_refusal_is_quoted(serve):
    refusal = b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nlate"
    with pytest.raises(HttpError, match="HTTP 503: late") as caught:
        client(serve([refusal])).get("/")
    assert caught.value.is_passing


def test_a_server_that_is_asked_too_often_says_how_long_to_wait(serve, clock):
    refusal = b"HTTP/1.1 429 Slow down\r\nRetry-After: 30\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(HttpError, match="HTTP 429") as caught:
        client(serve([refusal])).get("/")
    with pytest.raises(HttpError):
        retried(failing(caught.value), attempts=3)
    assert len(clock) == 2
    assert all(30 < pause < 31 for pause in clock)


def test_a_proxy_never_sees_what_is_meant_for_this_machine(serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    proxy = serve([b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"proxy"'])
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy}")
    direct = serve([b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n"direct"'])
    assert client(direct).get("/") == "direct"
    assert JsonClient("http://scorer.example").get("/") == "proxy"  # the environment is minded elsewhere


@pytest.fixture
def clock(monkeypatch):
    """Time passes only in pauses, which are kept."""
    pauses = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    monkeypatch.setattr("time.monotonic", lambda: sum(pauses))
    random.seed(0)
    return pauses


def failing(error):
    def call():
        call.count += 1
        raise error

    call.count = 0
    return call


def test_pauses_between_calls_grow_up_to_a_limit(clock):
    call = failing(HttpError("away", True))
    with pytest.raises(HttpError, match="away"):
        retried(call, attempts=60)
    assert call.count == 60
    assert all(pause > 0 for pause in clock)
    assert max(clock[:2]) < 1 < max(clock[10:]) <= 20


def test_calls_go_on_for_the_time_they_were_given_and_no_longer_than_allowed(clock):
    call = failing(HttpError("away", True))
    with pytest.raises(HttpError):
        retried(call, attempts=2, at_least_s=100)
    assert call.count > 5
    assert 100 <= sum(clock) < 120
    clock.clear()
    call = failing(HttpError("away", True))
    with pytest.raises(HttpError):
        retried(call, attempts=10**6, at_most_s=100)
    assert 100 <= sum(clock) < 120


def test_a_failure_that_will_not_pass_is_not_repeated(clock):
    call = failing(HttpError("refused"))
    with pytest.raises(HttpError):
        retried(call, attempts=5, at_least_s=100)
    assert call.count == 1
