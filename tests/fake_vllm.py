"""A stand-in for `vllm serve`: a real process and a real HTTP server that samples from a real (tiny) model, and fails on
demand: a file fault.KIND in $FAKE_VLLM_DIR is taken by the next request that KIND is for, fault.KIND.SEED by the one with
that seed. Answers are logged there."""

import argparse
import json
import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from ampo_fast.config import ModelConfig
from ampo_fast.evaluation import response_logp
from ampo_fast.model import Policy
from ampo_fast.rollouts.decoding import TransformersEngine
from ampo_fast.types import Candidate, CandidateGroup, Prompt, Sampling

NOBODY = Prompt(id="-", messages=())


def here():
    return Path(os.environ.get("FAKE_VLLM_DIR", "no faults"))


class Server:
    def __init__(self, model):
        self.model = model
        self.lock = threading.Lock()
        self.load()

    def load(self):
        self.policy = Policy.load(ModelConfig(path=self.model))
        self.weight_version = "default"

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
            tensors = [load_file(file) for file in Path(path).glob("*.safetensors")]
            self.policy.model.load_state_dict({name: value for part in tensors for name, value in part.items()})
        return {"results": [None]}


def take(kind, seed=None):
    """Whether this fault was asked for; each one is taken once, by one server."""
    if seed is not None and take(f"{kind}.{seed}"):
        return True
    try:
        (here() / f"fault.{kind}").rename(here() / f"taken.{kind}.{time.monotonic_ns()}")
    except FileNotFoundError:
        return False
    return True


class Handler(BaseHTTPRequestHandler):
    server_state: Server
    logprobs_mode = "processed_logprobs"
    max_model_len = None

    def do_GET(self):
        if self.path.startswith("/server_info"):
            mode = "raw_logprobs" if take("raw") else self.logprobs_mode
            env = {"VLLM_ALLOW_INSECURE_SERIALIZATION": take("insecure")}
            return self.reply(200, {"vllm_config": {"model_config": {"logprobs_mode": mode}}, "vllm_env": env})
        if self.path == "/weight_info":
            return self.reply(200, {"weight_version": self.server_state.weight_version})
        models = {"data": [{"id": "tiny", "max_model_len": self.max_model_len}]}
        return self.reply(200, models if self.path == "/v1/models" else None)

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
            if take("busy_reload"):
                return self.reply(503, {"error": "busy"})
            return self.reply(200, self.server_state.reload(body["kwargs"]["weights_path"]))
        if self.path == "/update_weight_version":
            self.server_state.weight_version = body["new_version"]
            return self.reply(200, {"success": True})
        if self.path == "/reset_prefix_cache":
            return self.reply(200, {"success": not take("keeps_cache")})
        if is_sampling and take("die", body["seed"]):
            print("the last words of a dying server", flush=True)
            os.killpg(0, signal.SIGKILL)
        if is_sampling and take("hang", body["seed"]):
            time.sleep(600)
        if "prompt_logprobs" in body and take("die_score"):
            os.killpg(0, signal.SIGKILL)
        if take("busy" if is_sampling else "busy_score"):
            return self.reply(503, {"error": "busy"})
        if is_sampling and take("start_again"):
            return self.start_again()
        answer = self.server_state.completions(body)
        if is_sampling and take("garbage"):
            answer["choices"][0]["token_ids"] = answer["choices"][0]["token_ids"][:-1]
        if is_sampling and take("other_prompt"):
            answer["choices"][0]["prompt_token_ids"] = [1, 2, 3]
        if is_sampling:
            with (here() / "answered.log").open("a") as log:
                log.write(f"{os.getpid()} {body['seed']}\n")
        return self.reply(200, answer)

    def start_again(self):
        """Breaks this request off, and answers the next ones from the weights that it began with."""
        with self.server_state.lock:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            time.sleep(0.5)  # a start takes longer than a broken connection takes to be noticed
            self.server_state.load()

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
    parser.add_argument("--host", default="0.0.0.0")  # as vLLM's: everybody
    parser.add_argument("--logprobs-mode", default="raw_logprobs")
    parser.add_argument("--max-model-len", type=int)
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    Handler.server_state = Server(arguments.model)
    Handler.logprobs_mode, Handler.max_model_len = arguments.logprobs_mode, arguments.max_model_len
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
