"""What holds for every test: no network, and the same random numbers each time."""

import os

# Before anything imports transformers: weights come from installed packages only.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
