"""The HTTP scorer against a real server on this machine that fails, stalls and talks nonsense."""

import json
import logging
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from builders import config, group

from ampo_fast.http_client import HttpError, JsonClient
from ampo_fast.rewards import make_reward

KEY = "a-key-that-nobody-may-see"


class Scorer:
    """Scores a response by its length; `fault(call number)` names what goes wrong with a call, or None."""

    def __init__(self, fault):
        self.fault, self.calls, self.keys, self.largest = fault, 0, set(), 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                owner.answer(self)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.calls += 1
            fault = self.fault(self.calls)
            self.keys.add(handler.headers.get("Authorization"))
            self.largest = max(self.largest, len(body["responses"]))
        assert len(body["prompts"]) == len(body["responses"])
        rewards = [float(len(text)) for text in body["responses"]]
        if fault == "reset":
            handler.connection.close()
            return
        if fault == "stall":
            threading.Event().wait(3)
            return
        text = {"garbage": "<html>", "few": json.dumps({"rewards": rewards[1:]}), "nan": '{"rewards": [NaN]}'}.get(
            fault, json.dumps({"rewards": rewards})
        )
        handler.send_response({"500": 500, "401": 401, "429": 429}.get(fault, 200))
        handler.end_headers()
        handler.wfile.write(text.encode())


@pytest.fixture
def serve():
    servers = []

    def start(fault=lambda call: None):
        servers.append(Scorer(fault))
        return servers[-1]

    yield start
    for scorer in servers:
        scorer.server.shutdown()
        scorer.server.server_close()


def reward_of(url, **options):
    return make_reward(config(reward={"kind": url, "options": {"batch": 3, "concurrency": 2} | options}))


def groups_of(count):
    return [group([f"{'a' * (k + 1)}" for k in range(5)], i) for i in range(count)]


def test_with_thirty_percent_of_the_calls_failing_every_group_is_scored(serve):
    draw = random.Random(0)
    faults = ["500", "429", "reset", "garbage", "few", "nan"]
    scorer = serve(lambda call: draw.choice(faults) if draw.random() < 0.3 else None)
    rewards = reward_of(scorer.url, attempts=12)(groups_of(30))
    assert rewards == [[1.0, 2.0, 3.0, 4.0, 5.0]] * 30
    assert scorer.calls > 50 * 1.2  # 150 responses in batches of 3 are 50 calls; the rest were repeated
    assert scorer.largest == 3


def test_a_stalled_answer_is_given_up_and_asked_for_again(serve):
    scorer = serve(lambda call: "stall" if call == 1 else None)
    assert reward_of(scorer.url, timeout_s=0.3)(groups_of(1)) == [[1.0, 2.0, 3.0, 4.0, 5.0]]
    assert scorer.calls == 3


def test_a_scorer_that_stays_broken_stops_the_run_after_the_stated_attempts(serve):
    scorer = serve(lambda call: "few")
    with pytest.raises(HttpError, match=r"3 numbers or nulls.*sent 2 rewards"):
        reward_of(scorer.url, attempts=2, concurrency=1)([group(["a", "b", "c"])])
    assert scorer.calls == 2


def test_a_refused_key_is_not_tried_again(serve):
    scorer = serve(lambda call: "401")
    with pytest.raises(HttpError, match="401"):
        reward_of(scorer.url, concurrency=1)([group(["a"])])
    assert scorer.calls == 1


def test_the_key_comes_from_the_environment_and_is_never_shown(serve, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    scorer = serve(lambda call: "500")
    with pytest.raises(HttpError) as caught:
        reward_of(scorer.url, key_env="MY_KEY", attempts=2)([group(["a"])])
    assert scorer.keys == {f"Bearer {KEY}"}
    assert "retrying" in caplog.text
    assert KEY not in caplog.text + str(caught.value) + repr(caught.value)


@pytest.mark.parametrize("url", ["http://me:secret@127.0.0.1/x", "http://127.0.0.1/x?key=secret"])
def test_a_key_in_the_url_is_refused_without_repeating_it(url):
    with pytest.raises(ValueError, match="environment variable") as caught:
        reward_of(url)
    assert "secret" not in str(caught.value)


def test_a_redirect_is_an_error_since_it_would_carry_the_key_away(serve):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", scorer.url)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    scorer = serve()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(HttpError, match="302"):
        JsonClient(f"http://127.0.0.1:{server.server_port}", key=KEY).get("/")
    server.shutdown()
    assert scorer.calls == 0


def test_unknown_options_are_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"reward\.options\.bach; known: batch"):
        reward_of("http://127.0.0.1:1/", bach=3)
