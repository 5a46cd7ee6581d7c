"""Generation by a vLLM server, which the user starts on GPUs of its own: `generation.server`.

The trainer needs no vLLM. Prompts and responses go over HTTP as token ids. Weights go over as safetensors files in a
folder that both sides see: in memory where the server is on this machine, else below `output_dir`. The server reads
them by vLLM's own `reload_weights`, with tensor parallelism each worker its part. The first of several processes hands
the weights over; each sends its own prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import socket
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from r2m import processes
from r2m.config import R2MConfig
from r2m.integrations.vllm import (
    RELEASE,
    check_adapter,
    check_lengths,
    checkpoint_weights,
    greatest_length,
    sampling_params,
)
from r2m.method.hidden_states import causal_lm
from r2m.policy.generate import GeneratorFailed, Sampling
from r2m.progress import waiting

logger = logging.getLogger(__name__)

_CONNECT = 10.0  # seconds
_AT_ONCE = 512  # requests in flight; a process may have 1024 files open
_IN_MEMORY = Path("/dev/shm")

# Nothing narrower than the temperature, whatever the checkpoint's own defaults are.
_NOT_NARROWED = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def check_answers(server: str) -> None:
    """Raises GeneratorFailed where `server` does not answer, and for another release than the tested one."""
    with waiting(f"asking {server}"):
        release = _answer(_ask(server, "GET", "/version", timeout=_CONNECT)).get("version")
    if not str(release).startswith(f"{RELEASE}."):
        raise GeneratorFailed(f"generation.server {server} runs vLLM {release}; expected {RELEASE}")


class VLLMServer:
    """A `Generator` (r2m.policy.generate).

    Raises ValueError for an adapter that is no plain LoRA of linear layers, and GeneratorFailed as `check_answers`
    does, and for a server that was started with other options than the run needs; the message names them.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, config: R2MConfig):
        assert config.generation.server is not None
        check_adapter(policy)
        model: Any = causal_lm(policy)
        self.server, self.timeout = config.generation.server, 60 * config.placement.timeout
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.length = greatest_length(model.config, config)
        check_answers(self.server)
        with waiting("reading the options of the vLLM server"):
            self._check_options()
        self.salt = ""  # of the weights that the server has
        self.folder = _folder(self.server, config.output_dir, model.num_parameters() * self.dtype.itemsize)
        if processes.index() == 0:
            logger.info("weights go to %s through %s", self.server, self.folder)

    def _check_options(self) -> None:
        connection = _ask(self.server, "GET", "/server_info?config_format=json", timeout=self.timeout)
        model = _answer(connection, {404: "start it with VLLM_SERVER_DEV_MODE=1"})["vllm_config"]["model_config"]
        dtype = str(self.dtype).removeprefix("torch.")
        wrong = {
            "--logprobs-mode processed_logprobs": model["logprobs_mode"] != "processed_logprobs",  # at the temperature
            f"--dtype {dtype}": model["dtype"] != str(self.dtype),
            f"--max-model-len {self.length}": model["max_model_len"] < self.length,
        }
        if any(wrong.values()):
            needed = " ".join(option for option, is_wrong in wrong.items() if is_wrong)
            raise GeneratorFailed(f"generation.server {self.server} has other options; expected {needed}")

    @torch.no_grad()
    def update(self, policy: nn.Module) -> None:
        with _made(self.folder) as folder:
            for i, (name, weight) in enumerate(checkpoint_weights(policy, self.dtype)):  # sharded ones: all take part
                if processes.index() == 0:
                    save_file({name: weight.contiguous()}, folder / f"{i:06}.safetensors")  # one in memory at a time
            if processes.index() == 0:
                reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                _answer(
                    _ask(self.server, "POST", "/collective_rpc", reload, timeout=self.timeout),
                    {500: f"expected a server that reads {folder} and runs the policy's model; start it again"},
                )
        # Keys and values that the server has kept are found by the salt as well, so those of other weights are not.
        self.salt = processes.from_first(uuid.uuid4().hex)

    def generate(
        self, prompt_ids: list[list[int]], num_generations: int, settings: Sampling
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Log-probabilities are None where `settings.greedy`, which nothing trains on. Raises ValueError as
        `check_lengths` does, and OSError where the server does not answer."""
        check_lengths(prompt_ids, settings, self.length)
        shared = sampling_params(num_generations, settings) | _NOT_NARROWED
        shared |= {"return_token_ids": True, "cache_salt": self.salt}
        seeds = random.Random(settings.seed)
        choices: list[dict[str, Any]] = []
        in_flight = deque[HTTPConnection]()
        try:
            for ids in prompt_ids:
                if len(in_flight) == _AT_ONCE:
                    choices += _choices(in_flight.popleft())
                body = shared | {"prompt": ids, "seed": seeds.getrandbits(32)}  # vLLM adds 0 to K - 1 to it
                in_flight.append(_ask(self.server, "POST", "/v1/completions", body, timeout=self.timeout))
            while in_flight:
                choices += _choices(in_flight.popleft())
        finally:
            for connection in in_flight:  # the server stops working on them
                connection.close()
        rows = [choice["token_ids"] for choice in choices]
        return rows, None if settings.greedy else [choice["logprobs"]["token_logprobs"] for choice in choices]


def _folder(server: str, output_dir: str, nbytes: int) -> Path:
    """Where the weights are while they go over. Of the run alone, and the same when it is resumed: what a killed run
    has left there is removed."""
    is_here = urlsplit(server).hostname in ("localhost", "127.0.0.1", socket.gethostname())
    in_memory = is_here and _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free > nbytes
    of_run = Path(output_dir).resolve()
    name = hashlib.sha256(str(of_run).encode()).hexdigest()[:16]
    return _IN_MEMORY / f"r2m-{name}" if in_memory else of_run / "weights-for-vllm"


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """`folder`, new and empty in the first process, and gone afterwards."""
    if processes.index():
        yield folder
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- HTTP ----

_HEADERS = {"Content-Type": "application/json"}


def _ask(server: str, method: str, path: str, body: Any = None, *, timeout: float) -> HTTPConnection:
    """Sends a request and does not wait for its answer. timeout: seconds to wait for that."""
    address = urlsplit(server)
    assert address.hostname is not None
    connection = HTTPConnection(address.hostname, address.port, timeout=_CONNECT)
    try:
        connection.connect()
        connection.sock.settimeout(timeout)
        connection.request(method, path, None if body is None else json.dumps(body), _HEADERS)
    except OSError as error:
        connection.close()
        raise _silent(server, error) from error
    return connection


def _answer(connection: HTTPConnection, hints: dict[int, str] | None = None) -> Any:
    """Waits for the answer to `_ask`. hints: what to do, by the status of an answer that is an error."""
    server = f"http://{connection.host}:{connection.port}"
    with closing(connection):
        try:
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except (OSError, HTTPException) as error:
            raise _silent(server, error) from error
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if response.status == 200 and answer is not None:
        return answer
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        text = answer["error"].get("message", text)
    hint = (hints or {}).get(response.status)
    raise GeneratorFailed(
        f"generation.server {server} answered {response.status}: {text[:500]}" + (f"; {hint}" if hint else "")
    )


def _choices(connection: HTTPConnection) -> list[dict[str, Any]]:
    return sorted(_answer(connection)["choices"], key=lambda choice: choice["index"])


def _silent(server: str, error: Exception) -> GeneratorFailed:
    return GeneratorFailed(
        f"generation.server {server} does not answer: {type(error).__name__}: {error}; expected a vLLM server there"
    )
