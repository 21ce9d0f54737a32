"""One thread: small graphs are run, on a shared machine."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch = pytest.importorskip("torch", reason="the bridge needs PyTorch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
