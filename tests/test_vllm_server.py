"""The vllm-server engine against real server processes that are killed, hang, lie and refuse; no vllm is needed here."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from builders import prompt

from ampo_fast.config import ModelConfig
from ampo_fast.engine_config import VllmConfig, read_options
from ampo_fast.evaluation import response_logp
from ampo_fast.http_client import HttpError
from ampo_fast.model import Policy
from ampo_fast.random_streams import stream_seed
from ampo_fast.rollouts.protocol import IncompleteBatch
from ampo_fast.types import Sampling
from ampo_fast.vllm import process
from ampo_fast.vllm.canary import SyncError
from ampo_fast.vllm.replica import Replica
from ampo_fast.vllm.server import VllmServerEngine
from ampo_fast.weight_sync import push_weights

HERE = Path(__file__).parent
PROMPTS = [prompt(i, f"say {word}") for i, word in enumerate(["tea", "sun", "rain", "wind", "stone", "moss"])]
SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture
def policy(tiny_model):
    return Policy.load(ModelConfig(path=str(tiny_model)))


@pytest.fixture
def make(policy, tmp_path, monkeypatch):
    """Engines on fake servers, started with the command that starts real ones; everything they start is ended."""
    monkeypatch.setenv("FAKE_VLLM_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(process, "find_spec", lambda name: name)
    monkeypatch.setattr(process, "_entry_point", lambda model: ["fake_vllm", "--model", model])
    engines = []

    def build(**options):
        settings = {"request_timeout_s": 20, "sync_timeout_s": 20, "start_timeout_s": 120} | options
        engines.append(VllmServerEngine(policy, VllmConfig(**settings), "float32"))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


class Running:
    """Somebody's servers, on threads of this process."""

    def __init__(self, model):
        self.model, self.servers = str(model), []

    def start(self, port=0, **settings):
        """-> its URL"""
        handler = type("Handler", (fake_vllm.Handler,), settings | {"server_state": fake_vllm.Server(self.model)})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    def stop(self):
        """The newest; -> its port"""
        server = self.servers.pop()
        server.shutdown()
        server.server_close()
        return server.server_port

    def start_again(self):
        self.start(self.stop())


@pytest.fixture
def running(tiny_model, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "k")
    running = Running(tiny_model)
    yield running
    while running.servers:
        running.stop()


def nudge(policy, scale=0.01):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def answered(tmp_path):
    """[pid, seed] of each answered request for a prompt: those of the canary are left out."""
    seeds = {str(stream_seed(SAMPLING.seed, SAMPLING.step, one.id) >> 1) for one in PROMPTS}
    lines = (line.split() for line in (tmp_path / "answered.log").read_text().splitlines())
    return [[pid, seed] for pid, seed in lines if seed in seeds]


def assert_whole(groups, policy, version=0):
    assert [g.prompt for g in groups] == PROMPTS
    assert {len(g.candidates) for g in groups} == {3}
    assert {c.version for g in groups for c in g.candidates} == {version}
    engine = torch.tensor([v for g in groups for c in g.candidates for v in c.logp])
    torch.testing.assert_close(response_logp(policy, groups, 1000), engine, atol=5e-4, rtol=0)


def test_groups_are_the_policys_and_follow_every_sync(make, policy, tmp_path):
    engine = make()
    first = engine.generate(PROMPTS, 3, SAMPLING)
    assert_whole(first, policy)
    assert engine.generate(PROMPTS, 3, SAMPLING) == first
    for version in (1, 2):
        nudge(policy)
        push_weights(policy, engine, version)
        assert engine.sync_metrics["sync/logp_difference"] < 1e-3
        assert engine.sync_metrics["sync/logp_change"] > 1e-2
        assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy, version)
    assert list(engine._files.newest.parent.iterdir()) == [engine._files.newest]  # only the newest weights are kept


def test_stale_weights_stop_the_run_with_both_values(make, policy, tmp_path):
    engine = make()
    engine.generate(PROMPTS[:1], 3, SAMPLING)
    (tmp_path / "fault.stale").touch()
    nudge(policy)
    with pytest.raises(SyncError, match=r"differ by .*engine mean -\d.*trainer mean -\d"):
        push_weights(policy, engine, 1)
    assert engine.version == 0


def test_stale_weights_are_seen_even_where_they_are_within_the_tolerance(make, policy, tmp_path):
    engine = make(canary_tol=0.5)
    engine.generate(PROMPTS[:1], 3, SAMPLING)
    (tmp_path / "fault.stale").touch()
    nudge(policy, 0.02)
    with pytest.raises(SyncError, match="did not arrive"):
        push_weights(policy, engine, 1)


def test_another_model_than_the_trainers_is_refused_at_the_start(make, policy):
    nudge(policy, 0.1)
    with pytest.raises(SyncError, match="another model"):
        make().generate(PROMPTS[:1], 3, SAMPLING)


def test_a_cache_that_is_not_emptied_is_asked_again(make, policy, tmp_path):
    engine = make()
    engine.generate(PROMPTS[:1], 3, SAMPLING)
    (tmp_path / "fault.keeps_cache").touch()
    push_weights(policy, engine, 1)
    assert list(tmp_path.glob("taken.keeps_cache.*"))


@pytest.mark.parametrize("fault", ["die", "hang", "busy", "garbage", "other_prompt"])
def test_a_fault_during_generation_costs_no_group(make, policy, tmp_path, fault):
    engine = make(request_timeout_s=8 if fault == "hang" else 20)
    nudge(policy)
    push_weights(policy, engine, 3)
    before = len(answered(tmp_path))
    (tmp_path / f"fault.{fault}").touch()
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy, 3)
    assert list(tmp_path.glob(f"taken.{fault}.*"))
    if fault in ("busy", "hang"):  # what was answered is not asked for again
        assert len(answered(tmp_path)) == before + len(PROMPTS)
    if fault in ("garbage", "other_prompt"):
        assert len(answered(tmp_path)) == before + len(PROMPTS) + 1
    assert engine.replicas[0].generation == (1 if fault == "die" else 0)


def test_nothing_counts_from_a_server_that_came_back_with_other_weights(make, policy, tmp_path):
    engine = make()
    nudge(policy, 0.05)
    push_weights(policy, engine, 1)
    for fault in ("die", "stale"):  # the reload after the death leaves the weights that it started with
        (tmp_path / f"fault.{fault}").touch()
    kept = []
    with pytest.raises(SyncError, match="vllm-server-0"):
        engine.generate(PROMPTS, 3, SAMPLING, kept.extend)
    engine_logp = torch.tensor([v for group in kept for c in group.candidates for v in c.logp])
    torch.testing.assert_close(response_logp(policy, kept, 1000), engine_logp, atol=5e-4, rtol=0)
    assert engine.replicas[0].is_lost
    assert not engine.replicas[0].process.is_alive()


def test_a_server_that_is_started_again_is_asked_only_once_it_has_the_weights(make, policy, monkeypatch):
    engine = make()
    nudge(policy, 0.05)
    push_weights(policy, engine, 1)
    (replica,) = engine.replicas
    load, is_up = replica.load, threading.Event()

    def load_late(path):
        is_up.set()
        time.sleep(1)
        load(path)

    monkeypatch.setattr(replica, "load", load_late)
    replica.process.kill()
    with ThreadPoolExecutor(1) as pool:
        repair = pool.submit(engine._failed, replica, replica.generation, HttpError("it died", True))
        assert is_up.wait(60)
        assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy, version=1)
        repair.result()


@pytest.mark.parametrize("fault", ["die_in_sync", "stall_in_sync"])
def test_a_fault_during_the_sync_ends_in_the_new_version(make, policy, tmp_path, fault):
    engine = make(sync_timeout_s=5)
    engine.generate(PROMPTS[:1], 3, SAMPLING)
    (tmp_path / f"fault.{fault}").touch()
    nudge(policy)
    push_weights(policy, engine, 1)
    assert engine.replicas[0].generation == 1
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy, 1)


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_server_that_dies_between_the_weights_and_the_canary_does_not_end_the_run(make, policy, tmp_path, restarts):
    engine = make(replicas=2, restarts=restarts)
    engine.generate(PROMPTS[:1], 3, SAMPLING)
    (tmp_path / "fault.die_score").touch()
    nudge(policy)
    push_weights(policy, engine, 1)
    assert list(tmp_path.glob("taken.die_score.*"))
    assert sum(replica.generation for replica in engine.replicas) == restarts
    assert [replica.is_lost for replica in engine.replicas].count(True) == 1 - restarts
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy, 1)


@pytest.mark.parametrize("fault", ["busy_score", "busy", "busy_reload"])
def test_a_server_that_is_busy_for_a_moment_of_the_sync_is_asked_again(make, policy, running, tmp_path, fault):
    engine = make(base_urls=(running.start(),), attempts=2, sync_timeout_s=60)
    push_weights(policy, engine, 0)
    nudge(policy)
    (tmp_path / f"fault.{fault}").touch()
    push_weights(policy, engine, 1)
    assert list(tmp_path.glob(f"taken.{fault}.*"))
    assert not engine.replicas[0].is_lost
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy, 1)


def test_a_running_server_that_is_away_in_a_sync_is_left_out_until_it_is_back(make, policy, running):
    engine = make(base_urls=(running.start(), running.start()), attempts=2)
    push_weights(policy, engine, 0)
    port = running.stop()
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy, 0)
    nudge(policy)
    push_weights(policy, engine, 1)
    assert [replica.is_lost for replica in engine.replicas] == [False, True]
    running.start(port)
    push_weights(policy, engine, 2)
    assert [replica.is_lost for replica in engine.replicas] == [False, False]
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy, 2)


def test_when_all_running_servers_are_away_in_a_sync_the_error_says_why(make, policy, running):
    engine = make(base_urls=(running.start(), running.start()), attempts=1)
    push_weights(policy, engine, 0)
    running.stop()
    running.stop()
    with pytest.raises(HttpError, match=r"(?s)no server is left: .*refused.*refused"):
        push_weights(policy, engine, 1)


@pytest.mark.parametrize(
    ("scale", "tolerance"), [(0.05, None), (0.002, 0.15)]
)  # half precision's, and a few small steps
def test_a_running_server_that_came_back_with_other_weights_gets_ours_before_it_is_asked(
    make, policy, running, scale, tolerance
):
    engine = make(base_urls=(running.start(),), canary_tol=tolerance)
    nudge(policy, scale)
    push_weights(policy, engine, 1)
    running.start_again()
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy, 1)
    assert engine.replicas[0].generation == 1


def test_what_a_running_server_answers_after_a_start_in_between_counts_only_with_our_weights(
    make, policy, running, tmp_path
):
    engine = make(base_urls=(running.start(),))
    nudge(policy, 0.05)
    push_weights(policy, engine, 1)
    (tmp_path / "fault.start_again").touch()
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy, 1)
    assert engine.replicas[0].generation == 1


def test_a_running_server_that_came_back_and_does_not_take_our_weights_stops_the_run(make, policy, running, tmp_path):
    engine = make(base_urls=(running.start(),))
    nudge(policy, 0.05)
    push_weights(policy, engine, 1)
    running.start_again()
    (tmp_path / "fault.stale").touch()
    with pytest.raises(SyncError, match=r"http://127\.0\.0\.1:\d+: .* differ by"):
        engine.generate(PROMPTS, 3, SAMPLING)
    assert engine.replicas[0].generation == 1  # once, not for each prompt


def test_a_running_server_is_waited_for_whatever_the_number_of_attempts(make, policy, running):
    engine = make(base_urls=(running.start(),), attempts=1, request_timeout_s=60)
    push_weights(policy, engine, 0)
    port = running.stop()
    threading.Timer(1.0, running.start, (port,)).start()
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy)


TOO_SHORT = r"max_model_len.* = 256: .* takes 2\d\d tokens; set it to 2\d\d or more"


def test_a_context_too_short_for_the_canary_is_refused_before_anything_is_started(make):
    with pytest.raises(ValueError, match=TOO_SHORT):
        make(max_model_len=256)


def test_a_running_server_whose_context_is_too_short_for_the_canary_is_refused(make, running):
    engine = make(base_urls=(running.start(max_model_len=256),))
    with pytest.raises(ValueError, match=TOO_SHORT):
        engine.start()


def test_a_score_without_numbers_names_the_server():
    rows = [None, {"7": {"logprob": None}}]
    client = SimpleNamespace(post=lambda path, body: {"choices": [{"prompt_logprobs": rows}]})
    with pytest.raises(HttpError, match=r"server-0 scored with garbage: .*log-probs that are none"):
        Replica("server-0", VllmConfig(), client=client).score([3], [7])


def test_requests_go_to_the_least_busy_server_and_to_another_after_a_failure(make):
    engine = make(replicas=3)
    first, second, third = engine.replicas
    assert [engine._pick() for _ in range(6)] == [first, second, third] * 2
    second.in_flight = 0
    assert [engine._pick() for _ in range(2)] == [second] * 2
    second.in_flight, second.failures = 0, 1
    assert [engine._pick() for _ in range(2)] == [first, third]


def test_with_two_replicas_and_one_lost_the_other_answers(make, policy, tmp_path):
    engine = make(replicas=2, restarts=0)
    engine.generate(PROMPTS, 3, SAMPLING)
    assert len({pid for pid, _ in answered(tmp_path)}) == 2
    (tmp_path / "fault.die").touch()
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy)
    assert [replica.is_lost for replica in engine.replicas].count(True) == 1
    nudge(policy)
    push_weights(policy, engine, 1)
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy, 1)


def test_when_no_server_is_left_the_error_has_its_last_words(make, tmp_path):
    engine = make(restarts=0)
    kept = []
    engine.generate(PROMPTS[:1], 3, SAMPLING)
    (tmp_path / "fault.die").touch()
    with pytest.raises(IncompleteBatch, match="last words of a dying server") as caught:
        engine.generate(PROMPTS, 3, SAMPLING, kept.extend)
    assert engine.replicas[0].process._key not in str(caught.value)
    assert f"{len(kept)} of {len(PROMPTS)} prompts were answered" in str(caught.value)
    assert len(kept) < len(PROMPTS)


def test_closed_while_another_thread_generates_it_has_kept_what_was_finished_and_starts_nothing(make, tmp_path):
    engine = make()
    kept = []
    engine.generate(PROMPTS[:1], 3, SAMPLING)
    (tmp_path / "fault.hang").touch()
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(engine.generate, PROMPTS, 3, SAMPLING, kept.extend)
        deadline = time.monotonic() + 20
        while len(kept) < len(PROMPTS) - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        engine.close()
        with pytest.raises(IncompleteBatch, match="the engine was closed"):
            under_way.result(timeout=10)
    assert len({group.prompt.id for group in kept}) == len(kept) == len(PROMPTS) - 1
    assert engine.replicas[0].generation == 0
    assert not engine.replicas[0].process.is_alive()


@pytest.mark.parametrize("is_ours", [True, False])
def test_nobody_waits_for_answers_that_nobody_wants_any_more(make, running, tmp_path, is_ours):
    engine = make() if is_ours else make(base_urls=(running.start(),))
    engine.start()
    (tmp_path / "fault.hang").touch()

    def interrupt(groups):
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, 3, SAMPLING, interrupt)
    assert time.monotonic() - started < engine.options.request_timeout_s / 2


def test_a_server_that_cannot_start_says_why(make, monkeypatch):
    monkeypatch.setattr(process, "serve_command", lambda *a: lambda port: [sys.executable, "-c", "exit('no GPU')"])
    with pytest.raises(process.ServerDied, match="no GPU"):
        make().generate(PROMPTS, 3, SAMPLING)


def test_the_cause_far_above_a_dead_servers_last_words_is_named_too(make, monkeypatch):
    script = "print('RuntimeError: the worker broke'); print('noise ' * 2000); exit('last words')"
    monkeypatch.setattr(process, "serve_command", lambda *a: lambda port: [sys.executable, "-c", script])
    with pytest.raises(process.ServerDied, match=r"(?s)last words.*exceptions before that:\nRuntimeError: the worker"):
        make().generate(PROMPTS, 3, SAMPLING)


def test_a_port_that_is_taken_in_between_is_left_for_another(make, policy, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [taken.getsockname()[1], free_port()]
        monkeypatch.setattr(process, "free_port", lambda host: ports.pop(0))
        engine = make()
        assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy)
    assert not ports


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_running_servers_get_our_weights_first_and_are_left_running(make, policy, tmp_path, monkeypatch):
    owner = make()
    client = owner.replicas[0].process.start()
    monkeypatch.setenv("MY_VLLM_KEY", owner.replicas[0].process._key)
    nudge(policy)
    engine = make(base_urls=(client.base_url,), key_env="MY_VLLM_KEY")
    assert_whole(engine.generate(PROMPTS, 3, SAMPLING), policy)
    engine.close()
    client.get("/health")
    for fault, match in (("raw", "start it with --logprobs-mode processed_logprobs"), ("insecure", "unpickles")):
        (tmp_path / f"fault.{fault}").touch()
        with pytest.raises(ValueError, match=match):
            make(base_urls=(client.base_url,), key_env="MY_VLLM_KEY").generate(PROMPTS, 3, SAMPLING)
    monkeypatch.setenv("MY_VLLM_KEY", "wrong")
    with pytest.raises(HttpError, match="401"):
        make(base_urls=(client.base_url,), key_env="MY_VLLM_KEY").generate(PROMPTS, 3, SAMPLING)


def test_a_running_server_without_the_sync_endpoints_is_refused_with_the_way_out(make, running):
    def do_get(handler):
        is_open = handler.path.startswith("/v1")
        handler.reply(200 if is_open else 404, {"data": [{"id": "tiny"}]} if is_open else {"detail": "Not Found"})

    with pytest.raises(ValueError, match="start it with VLLM_SERVER_DEV_MODE=1"):
        make(base_urls=(running.start(do_GET=do_get),)).start()


def test_a_started_server_wants_its_key_and_hears_this_machine_alone(make):
    engine = make()
    engine.generate(PROMPTS[:1], 2, SAMPLING)
    url = engine.replicas[0].client.base_url
    request = urllib.request.Request(f"{url}/v1/completions", data=b"{}", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
    with socket.socket() as other:
        other.settimeout(5)
        assert other.connect_ex((other_address(), int(url.rpartition(":")[2]))) != 0


def other_address():
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no other network interface")
        return probe.getsockname()[0]


def test_servers_die_with_a_trainer_that_is_killed():
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-m', 'ampo_fast.vllm.lifeline', sys.executable, '-c',"
        " 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'], stdin=subprocess.PIPE,"
        " stdout=subprocess.PIPE, start_new_session=True)\n"
        "print(p.stdout.readline().decode(), flush=True)\n"
        "time.sleep(600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    server = int(trainer.stdout.readline())
    os.kill(server, 0)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and is_running(server):
        time.sleep(0.05)
    assert not is_running(server)


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_server_and_its_workers_may_clear_up_before_they_end_with_their_trainer(tmp_path, is_killed):
    worker = "import pathlib, sys, time; time.sleep(0.5); pathlib.Path(sys.argv[1]).write_text('cleared up')"
    server = (
        "import signal, subprocess, sys, time\n"
        "def end(number, frame):\n"
        "    subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]])\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('up', flush=True)\n"
        "time.sleep(600)"
    )
    note = tmp_path / "note"
    command = [sys.executable, "-c", server, str(note), worker]
    one = process.VllmProcess("x", lambda port: command, VllmConfig(), None)
    one._launch(0)
    deadline = time.monotonic() + 20
    while "up" not in one.output_tail() and time.monotonic() < deadline:
        time.sleep(0.02)
    if is_killed:
        one.kill()
    one.close()
    assert note.exists() is not is_killed
    assert not one.is_alive()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "options", [{"host": "0.0.0.0"}, {"base_urls": ["http://10.0.0.7:8000"]}, {"base_urls": ["https://gpu.example"]}]
)
def test_open_sync_endpoints_are_refused_unless_declared(options):
    with pytest.raises(ValueError, match=r"no key.*behind_proxy = true"):
        read_options(VllmConfig, options, "rollout.options")
    assert read_options(VllmConfig, options | {"behind_proxy": True}, "rollout.options").behind_proxy


def test_a_server_is_named_without_its_interface():
    with pytest.raises(ValueError, match=r"8000/v1' is one .* without /v1"):
        read_options(VllmConfig, {"base_urls": ["http://127.0.0.1:8000/v1/"]}, "rollout.options")


def test_loopback_servers_need_no_declaration():
    read_options(VllmConfig, {"base_urls": ["http://127.0.0.1:8000", "http://localhost:1", "http://[::1]:2"]}, "x")


def test_insecure_serialisation_is_never_passed_on(make, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    engine = make()
    engine.generate(PROMPTS[:1], 2, SAMPLING)
    environment = Path(f"/proc/{engine.replicas[0].process.group}/environ").read_bytes()
    assert b"INSECURE" not in environment
    command = Path(f"/proc/{engine.replicas[0].process.group}/cmdline").read_bytes()
    assert engine.replicas[0].process._key.encode() not in command  # anybody may read a command line


def flags(engine):
    """The command line that the engine's first server really runs with, as {flag: what follows it}."""
    group = engine.replicas[0].process.group
    words = Path(f"/proc/{group}/cmdline").read_text().split("\0")
    return {word: after for word, after in itertools.pairwise(words) if word.startswith("--")}


def test_a_started_server_runs_with_every_flag_that_the_answers_depend_on(make):
    engine = make(enforce_eager=True, max_model_len=512)
    engine.start()
    given = flags(engine)
    assert given["--host"] == "127.0.0.1"
    assert given["--logprobs-mode"] == "processed_logprobs"
    assert given["--generation-config"] == "vllm"
    assert given["--dtype"] == "float32"
    assert json.loads(given["--hf-overrides"]) == {"head_dtype": "float32"}
    assert given["--max-model-len"] == "512"
    assert given.keys() >= {"--enable-prefix-caching", "--enforce-eager"}
    assert "--trust-remote-code" not in given


def test_code_that_comes_with_the_model_is_run_by_a_server_only_where_it_was_asked_for(make, policy):
    policy.trust_remote_code = True
    (server,) = make().replicas
    assert "--trust-remote-code" in server.process._command(8000)


def test_a_server_of_several_devices_splits_its_model(monkeypatch):
    monkeypatch.setattr(process, "find_spec", lambda name: name)
    options = read_options(VllmConfig, {"replicas": 3, "devices": ["0", "1,2", "3,4,5,6"]}, "rollout.options")
    commands = [server._command(8000) for server in process.make_processes("m", "float32", options)]
    assert "--tensor-parallel-size" not in commands[0]
    assert [c[c.index("--tensor-parallel-size") + 1] for c in commands[1:]] == ["2", "4"]
