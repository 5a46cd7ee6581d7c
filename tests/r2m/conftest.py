import pytest
import tiny


@pytest.fixture
def tokenizer():
    return tiny.tokenizer(pad="</s>")


@pytest.fixture
def policy():
    return tiny.policy()


@pytest.fixture(scope="session")
def reward_checkpoint(tmp_path_factory):
    return tiny.save_reward_checkpoint(tmp_path_factory.mktemp("reward"))
