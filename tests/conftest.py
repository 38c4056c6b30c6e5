import pytest
import torch

from hessfn import memory

torch.set_num_threads(1)  # the nets of the tests are small: threads only wait for each other


@pytest.fixture(autouse=True)
def memory_is_kept_for_small_results_too(monkeypatch):
    monkeypatch.setattr(memory, "_LARGE", 1)
