import pytest
import torch
from ranks import TwoRanks


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors on a shared machine: a second thread costs more than it brings."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def two_ranks():
    """Two processes that share a gloo group, started when first asked for."""
    ranks = TwoRanks()
    yield ranks
    ranks.stop()
