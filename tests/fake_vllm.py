"""A stand-in for `vllm serve`: a real process and a real HTTP server that samples from a real (tiny) model, and fails on
demand: a file fault.KIND in $FAKE_VLLM_DIR is taken by the next request that KIND is for, fault.KIND.SEED by the one with
that seed. Answers are logged there."""

import argparse
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from ampo_fast.config import ModelConfig
from ampo_fast.evaluation import response_logp
from ampo_fast.model import Policy
from ampo_fast.rollouts import TransformersEngine
from ampo_fast.types import Candidate, CandidateGroup, Prompt, Sampling

HERE = Path(os.environ.get("FAKE_VLLM_DIR", "no faults"))
NOBODY = Prompt(id="-", messages=())


class Server:
    def __init__(self, model):
        self.policy = Policy.load(ModelConfig(path=model))
        self.lock = threading.Lock()

    def completions(self, body):
        with self.lock:
            if "prompt_logprobs" in body:
                return self.score(body["prompt"])
            return self.sample(body)

    def sample(self, body):
        sampling = Sampling(temperature=body["temperature"], top_p=body["top_p"], max_new_tokens=body["max_tokens"])
        noise = torch.rand(
            body["n"], body["max_tokens"], dtype=torch.float64, generator=torch.Generator().manual_seed(body["seed"])
        )
        engine = TransformersEngine(self.policy, body["n"])
        with torch.no_grad():
            rows = engine._decode([body["prompt"]], body["n"], noise, sampling)
        choices = [
            {
                "index": i,
                "token_ids": ids,
                "logprobs": {"token_logprobs": logp},
                "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
                "prompt_token_ids": body["prompt"],
            }
            for i, (ids, logp) in enumerate(rows)
        ]
        return {"choices": choices[::-1]}

    def score(self, tokens):
        candidate = Candidate(content="", token_ids=tuple(tokens[1:]))
        group = CandidateGroup(prompt=NOBODY, prompt_ids=tuple(tokens[:1]), candidates=(candidate,))
        logp = response_logp(self.policy, [group], 1).tolist()
        rows = [None, *({str(t): {"logprob": v}} for t, v in zip(tokens[1:], logp, strict=True))]
        return {"choices": [{"prompt_logprobs": rows}]}

    def reload(self, path):
        if not take("stale"):
            self.policy.model.load_state_dict(load_file(Path(path) / "model.safetensors"))
        return {"results": [None]}


def take(kind, seed=None):
    """Whether this fault was asked for; each one is taken once, by one server."""
    if seed is not None and take(f"{kind}.{seed}"):
        return True
    try:
        (HERE / f"fault.{kind}").rename(HERE / f"taken.{kind}.{time.monotonic_ns()}")
    except FileNotFoundError:
        return False
    return True


class Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_GET(self):
        if self.path.startswith("/server_info"):
            mode = "raw_logprobs" if take("raw") else "processed_logprobs"
            env = {"VLLM_ALLOW_INSECURE_SERIALIZATION": take("insecure")}
            return self.reply(200, {"vllm_config": {"model_config": {"logprobs_mode": mode}}, "vllm_env": env})
        return self.reply(200, {"data": [{"id": "tiny"}]} if self.path == "/v1/models" else None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        is_sampling = self.path == "/v1/completions" and "seed" in body
        if self.path.startswith("/v1") and self.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            return self.reply(401, {"error": "Unauthorized"})
        if self.path == "/collective_rpc":
            if take("die_in_sync"):
                os.killpg(0, signal.SIGKILL)
            if take("stall_in_sync"):
                time.sleep(600)
            return self.reply(200, self.server_state.reload(body["kwargs"]["weights_path"]))
        if self.path == "/reset_prefix_cache":
            return self.reply(200, {"success": not take("keeps_cache")})
        if is_sampling and take("die", body["seed"]):
            print("the last words of a dying server", flush=True)
            os.killpg(0, signal.SIGKILL)
        if is_sampling and take("hang", body["seed"]):
            time.sleep(600)
        if is_sampling and take("busy"):
            return self.reply(503, {"error": "busy"})
        answer = self.server_state.completions(body)
        if is_sampling and take("garbage"):
            answer["choices"][0]["token_ids"] = answer["choices"][0]["token_ids"][:-1]
        if is_sampling:
            with (HERE / "answered.log").open("a") as log:
                log.write(f"{os.getpid()} {body['seed']}\n")
        return self.reply(200, answer)

    def reply(self, code, body):
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    Handler.server_state = Server(arguments.model)
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
