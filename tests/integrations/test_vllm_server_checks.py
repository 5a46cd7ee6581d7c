"""r2m.integrations.vllm_server beside a stand-in for the server: what is sent, what is refused, and how a run ends."""

import json
import re
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "r2m"))  # for tiny

import tiny
from small_run import write_config

from r2m import R2MTrainer
from r2m.commands.build import load_data
from r2m.commands.memory import estimate_memory
from r2m.config import config_from_dict, load_config
from r2m.integrations import vllm_server
from r2m.policy.generate import GeneratorFailed, Sampling
from r2m.policy.loss import token_log_probs

LENGTH, TEMPERATURE = 48, 0.5
SETTINGS = {"temperature": TEMPERATURE, "max_new_tokens": 5, "eos_ids": [1], "stop_strings": [], "seed": 3}


class StandIn(ThreadingHTTPServer):
    """Answers as vLLM's server does, from a policy of its own. `answers`: what it says instead, by the path's end."""

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.policy = tiny.policy(seed=9, num_hidden_layers=1)
        self.asked, self.folders, self.answers = [], [], {}
        self.options = {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32", "max_model_len": LENGTH}
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=partial(self.serve_forever, poll_interval=0.01), daemon=True).start()

    def handle_error(self, *_):
        """A run that ends hangs up."""

    def stop(self):
        self.shutdown()
        self.server_close()

    def version(self, body):
        return {"version": "0.32.0"}

    def server_info(self, body):
        return {"vllm_config": {"model_config": self.options}}

    def collective_rpc(self, body):
        folder = Path(body["kwargs"]["weights_path"])
        self.folders.append(folder)
        weights = {name: w for file in folder.iterdir() for name, w in load_file(file).items()}
        self.policy.load_state_dict(weights)
        return {"results": [None]}

    def completions(self, body):
        self.asked.append(body)
        choices = [self._choice(body, k) for k in range(body["n"])]
        return {"choices": choices[::-1]}  # which have their index

    @torch.no_grad()
    def _choice(self, body, k):
        ids, generator = list(body["prompt"]), torch.Generator().manual_seed(body["seed"] + k)
        temperature, log_probs = body["temperature"] or 1e-6, []
        while len(log_probs) < body["max_tokens"] and not (log_probs and ids[-1] in body["stop_token_ids"]):
            logits = self.policy(torch.tensor([ids])).logits[:, -1:]
            token = (logits[0] / temperature).softmax(-1).multinomial(1, generator=generator)
            log_probs.append(token_log_probs(logits, token, temperature).item())
            ids.append(token.item())
        return {
            "index": k,
            "token_ids": ids[len(body["prompt"]) :],
            "logprobs": None if body["logprobs"] is None else {"token_logprobs": log_probs},
        }


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        answer = self.server.answers[name] if name in self.server.answers else getattr(self.server, name)(body)
        status, answer = answer if isinstance(answer, tuple) else (200, answer)
        if answer is None:  # hung up
            return
        text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = StandIn()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny.save_reward_checkpoint(tmp_path_factory.mktemp("reward"))


def run_config(server, folder, **generation):
    generation = {"max_new_tokens": 5, "max_prompt_tokens": LENGTH - 5, "temperature": TEMPERATURE} | generation
    return config_from_dict({
        "rounds": 2, "prompts_per_round": 2, "num_generations": 3, "micro_batch_size": 3, "precision": "float32",
        "learning_rate": 1e-2, "output_dir": str(folder), "checkpoints": {"every": 1},
        "generation": generation | {"engine": "vllm", "server": server.address},
    })  # fmt: skip


def make(server, checkpoint, folder, **generation):
    policy = tiny.policy(num_hidden_layers=1)
    config = run_config(server, folder, **generation)
    prompts = ["hello ", "what is it? ", "a b", "xyz"]
    return R2MTrainer(policy, tiny.reward_model(checkpoint, policy), tiny.tokenizer(), prompts, config)


def without_costs(rows):
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "memory"))} for row in rows]


# ---- what goes over ----


def test_each_round_samples_from_the_weights_that_the_server_was_sent(server, checkpoint, tmp_path):
    trainer = make(server, checkpoint, tmp_path)
    rows = trainer.train()
    assert all(row["generation/importance_ratio"] == pytest.approx(1, abs=1e-4) for row in rows)
    assert len(server.folders) == 2  # before each round, whose steps change them
    assert not any(folder.exists() for folder in server.folders)
    salts = [body["cache_salt"] for body in server.asked]
    assert len(set(salts)) == 2 and salts[-1] == trainer.learner.generator.salt != salts[0]
    seeds = [body["seed"] for body in server.asked]
    assert len(set(seeds)) == len(seeds)
    asked = server.asked[-1]
    assert (asked["n"], asked["temperature"], asked["max_tokens"], asked["ignore_eos"]) == (3, TEMPERATURE, 5, True)


def test_responses_come_in_the_order_of_the_prompts_from_a_seed_alone(server, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "_AT_ONCE", 2)
    generator = vllm_server.VLLMServer(server.policy, run_config(server, tmp_path))
    generator.update(server.policy)
    prompts = [[60 + i] * (i + 1) for i in range(3)]
    rows, log_probs = generator.generate(prompts, 2, Sampling(**SETTINGS))
    assert sorted(body["prompt"] for body in server.asked) == prompts
    by_prompt = {tuple(body["prompt"]): body for body in server.asked}
    choices = [server._choice(by_prompt[tuple(ids)], k) for ids in prompts for k in range(2)]
    assert rows == [choice["token_ids"] for choice in choices]
    assert log_probs == [choice["logprobs"]["token_logprobs"] for choice in choices]
    assert generator.generate(prompts, 2, Sampling(**SETTINGS)) == (rows, log_probs)
    assert generator.generate(prompts, 2, Sampling(**SETTINGS | {"seed": 4}))[0] != rows


def test_greedy_responses_have_no_log_probs(server, tmp_path):
    generator = vllm_server.VLLMServer(server.policy, run_config(server, tmp_path))
    generator.update(server.policy)
    rows, log_probs = generator.generate([[60], [61]], 2, Sampling(**SETTINGS, greedy=True))
    assert log_probs is None and rows[0] == rows[1] and server.asked[-1]["temperature"] == 0


@pytest.mark.parametrize(
    ("address", "nbytes", "in_memory"),
    [("http://localhost:8000", 1000, True), ("http://localhost:8000", 2**60, False), ("http://other:80", 1000, False)],
)
def test_weights_go_through_memory_where_the_server_is_here_and_they_fit(
    tmp_path, monkeypatch, address, nbytes, in_memory
):
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(vllm_server, "_IN_MEMORY", memory)
    folder = vllm_server._folder(address, tmp_path / "run", nbytes)
    assert folder.parent == (memory if in_memory else tmp_path / "run")
    assert folder == vllm_server._folder(address, tmp_path / "run", nbytes)  # a resumed run finds what is left


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "000000.safetensors").touch()
    with vllm_server._made(tmp_path / "left") as folder:
        assert not list(folder.iterdir())
    assert not folder.exists()


def test_the_trainers_memory_has_no_engine(checkpoint, tmp_path):
    config = write_config(tmp_path, checkpoint)
    estimate = estimate_memory(load_config(config, ["generation.engine=vllm", "generation.server=http://other:80"]))
    assert not [name for name in estimate.parts if "vLLM" in name]
    assert estimate.phases["rollout"] < estimate_memory(load_config(config)).phases["rollout"]


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        (
            {"server": "http://a:1"},
            r"generation\.server is 'http://a:1' with the engine 'transformers'; expected 'vllm'",
        ),
        ({"server": "a:1", "engine": "vllm"}, r"generation\.server is 'a:1'; expected http://host:port"),
        ({"server": "http://a:1/v1", "engine": "vllm"}, "expected http://host:port"),
    ],
)
def test_an_address_that_is_none_is_named(generation, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict({"generation": generation})


def test_a_run_without_a_server_ends_before_anything_is_loaded(server, tmp_path):
    server.stop()
    values = ["generation.engine=vllm", f"generation.server={server.address}"]
    config = load_config(write_config(tmp_path, "no/such-model"), values)
    message = f"generation.server {server.address} does not answer: ConnectionRefusedError"
    with pytest.raises(GeneratorFailed, match=re.escape(message)):
        load_data(config)


@pytest.mark.parametrize(
    ("answers", "options", "message"),
    [
        ({"version": {"version": "0.31.4"}}, {}, r"runs vLLM 0\.31\.4; expected 0\.32"),
        ({"version": (200, "<html>")}, {}, "answered 200: <html>"),
        ({"version": {}}, {}, "runs vLLM None; expected"),
        ({"server_info": (404, {"detail": "Not Found"})}, {}, "answered 404: .*; start it with VLLM_SERVER_DEV_MODE=1"),
        (
            {},
            {"logprobs_mode": "raw_logprobs", "dtype": "torch.bfloat16", "max_model_len": LENGTH - 1},
            f"has other options; expected --logprobs-mode processed_logprobs --dtype float32 --max-model-len {LENGTH}$",
        ),
    ],
)
def test_a_server_of_another_kind_is_refused_at_the_start(server, tmp_path, answers, options, message):
    server.answers, server.options = answers, server.options | options
    with pytest.raises(GeneratorFailed, match=message):
        vllm_server.VLLMServer(server.policy, run_config(server, tmp_path))


def refused(message):
    return 500, {"error": {"message": message}}


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        (
            "collective_rpc",
            refused("shapes differ"),
            "answered 500: shapes differ; expected a server that reads /.* and",
        ),
        ("completions", refused("EngineCore encountered"), "answered 500: EngineCore encountered"),
        ("completions", (200, None), "does not answer: RemoteDisconnected"),
    ],
)
def test_a_server_that_fails_in_a_round_ends_the_run(server, checkpoint, tmp_path, path, answer, message):
    failing = make(server, checkpoint, tmp_path / "run")
    finish = failing.session.finish

    def finish_and_break(t, *args):
        server.answers[path] = answer
        return finish(t, *args)

    failing.session.finish = finish_and_break
    with pytest.raises(GeneratorFailed, match=f"round 2: generation.server {server.address} {message}.*checkpoint-1"):
        failing.train()


def test_the_run_goes_on_with_another_server(server, checkpoint, tmp_path):
    whole = without_costs(make(server, checkpoint, tmp_path).train())
    other = StandIn()
    resumed = make(other, checkpoint, tmp_path).train(tmp_path / "checkpoint-1")
    assert without_costs(resumed) == whole and other.folders
    other.stop()


def test_a_server_that_hangs_is_given_up_after_the_time_that_processes_wait(server, tmp_path):
    released = threading.Event()
    generator = vllm_server.VLLMServer(server.policy, run_config(server, tmp_path))
    generator.timeout = 0.1
    server.completions = lambda body: released.wait(5) and {}
    with pytest.raises(GeneratorFailed, match="does not answer: TimeoutError"):
        generator.generate([[60], [61]], 2, Sampling(**SETTINGS))
    released.set()


def test_other_weights_than_the_policys_are_found_before_the_run(server, checkpoint, tmp_path):
    server.collective_rpc = lambda body: {"results": [None]}
    with pytest.raises(ValueError, match=r"gives the same tokens other values, by up to: in generation \(nats\)"):
        make(server, checkpoint, tmp_path).train()
