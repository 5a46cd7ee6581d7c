import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers_every_run():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Every torch.empty comes filled with NaN, and an op whose result could change from run to run raises."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
