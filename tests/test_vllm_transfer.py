"""Weights over vLLM's weight-transfer API: the calls and their order, against stand-ins of the trainer's side and the server."""

import threading
from types import SimpleNamespace

import pytest
import torch

from ampo_fast.engine_config import VllmConfig
from ampo_fast.http_client import HttpError
from ampo_fast.vllm.replica import Replica
from ampo_fast.vllm.transfer import ROUTES, WeightTransfer

WEIGHTS = [("a.weight", torch.arange(6.0).reshape(2, 3)), ("lm_head.weight", torch.ones(4, 3))]


class FakeClient:
    """A server: what it was asked, in order, and what it says of itself."""

    def __init__(self, backend="nccl", routes=None, workers=2):
        self.calls = []
        config = {"parallel_config": {"world_size": workers, "data_parallel_size": 2}}
        config |= {"weight_transfer_config": {"backend": backend} if backend else None}
        self.answers = {
            "/openapi.json": {"paths": {route: {} for route in (ROUTES.values() if routes is None else routes)}},
            "/server_info?config_format=json": {"vllm_config": config},
        }

    def get(self, path):
        return self.answers[path]

    def post(self, path, body=None, timeout_s=None):
        self.calls.append((path, body))
        return {"success": True}


class FakeSender:
    """vLLM's trainer side in the shape of 0.32: a rendezvous, then per version start, update beside the broadcast, finish."""

    def __init__(self, info, client, source):
        self.info, self.client, self.source, self.received = info, client, source, []
        client.init_weight_transfer_engine({"world_size": info.world_size, "rank_offset": 1})

    def send_weights(self):
        meta = self.source.metadata()
        self.client.start_weight_update()
        self.client.update_weights({"names": [m.name for m in meta], "shapes": [list(m.shape) for m in meta]})
        for expected, (name, tensor) in zip(meta, self.source, strict=True):
            assert (expected.name, expected.dtype, expected.shape) == (name, tensor.dtype, tuple(tensor.shape))
            self.received.append((name, tensor))
        self.client.finish_weight_update()


@pytest.fixture
def senders():
    return []


@pytest.fixture
def api(senders):
    def trainer_init(info, client, source):
        senders.append(FakeSender(info, client, source))
        return senders[-1]

    return SimpleNamespace(
        WeightSource=object, Factory=SimpleNamespace(trainer_init=trainer_init),
        ParamMeta=lambda name, dtype, shape: SimpleNamespace(name=name, dtype=dtype, shape=shape),
        TrainerInfo=lambda **fields: SimpleNamespace(**fields),
    )  # fmt: skip


def transfer(api, client, timeout_s=20.0):
    return WeightTransfer(
        api, "server-0", client, VllmConfig(transfer="nccl", sync_timeout_s=timeout_s), torch.bfloat16
    )


def test_one_rendezvous_then_start_update_and_finish_for_every_version(api, senders):
    client = FakeClient()
    sync = transfer(api, client)
    for version in (3, 4):
        sync.send(version, WEIGHTS)
    each = [ROUTES["start"], ROUTES["update"], ROUTES["finish"]]
    assert [path for path, _ in client.calls] == [ROUTES["init"], *each, *each]
    assert [body["weight_version"] for path, body in client.calls if path == ROUTES["finish"]] == ["3", "4"]
    (sender,) = senders
    assert sender.info.world_size == 1 + 2 * 2  # every worker of every replica of the server, and this process
    assert [name for name, _ in sender.received] == 2 * ["a.weight", "lm_head.weight"]
    assert {tensor.dtype for _, tensor in sender.received} == {torch.bfloat16}
    torch.testing.assert_close(sender.received[0][1].float(), WEIGHTS[0][1])


def test_a_replica_forgets_its_keys_and_values_after_the_weights_and_is_never_started_again(api, monkeypatch):
    monkeypatch.setattr("ampo_fast.vllm.replica.transfer_api", lambda: api)
    client = FakeClient()
    replica = Replica("server-0", VllmConfig(transfer="nccl", restarts=3), process=object(), client=client)
    replica.receive(1, WEIGHTS, torch.float32)
    assert [path for path, _ in client.calls][-2:] == [ROUTES["finish"], "/reset_prefix_cache"]
    assert replica.restarts_left == 0


@pytest.mark.parametrize(
    ("server", "match"),
    [
        ({"routes": ()}, "has no /init_weight"),
        ({"backend": "ipc"}, "backend = 'ipc'"),
        ({"backend": None}, "backend = None"),
    ],
)
def test_a_server_that_does_not_offer_it_is_refused_with_the_way_out(api, server, match):
    with pytest.raises(ValueError, match=rf"{match}.*--weight-transfer-config.*transfer = \"file\""):
        transfer(api, FakeClient(**server))


def test_what_fails_on_either_side_ends_the_sync_for_good(api, monkeypatch):
    def broken(self):
        raise RuntimeError("NCCL error: unhandled cuda error")

    monkeypatch.setattr(FakeSender, "send_weights", broken)
    with pytest.raises(HttpError, match="server-0 did not take version 1 over NCCL: NCCL error") as caught:
        transfer(api, FakeClient()).send(1, WEIGHTS)
    assert not caught.value.is_passing


def test_a_transfer_that_hangs_is_given_up_after_its_time(api, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(FakeSender, "send_weights", lambda self: release.wait(30))
    with pytest.raises(HttpError, match=r"no end within rollout\.options\.sync_timeout_s = 0\.2"):
        transfer(api, FakeClient(), timeout_s=0.2).send(1, WEIGHTS)
    release.set()
