import pytest
import tiny
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """These tests compare bits and run on the CPU, whatever the machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tokenizer():
    return tiny.tokenizer(pad="</s>")


@pytest.fixture
def policy():
    return tiny.policy()


@pytest.fixture(scope="session")
def reward_checkpoint(tmp_path_factory):
    return tiny.save_reward_checkpoint(tmp_path_factory.mktemp("reward"))
