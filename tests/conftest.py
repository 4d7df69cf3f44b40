"""What holds for every test: no network, and the same random numbers each time."""

import logging
import os

# Before anything imports transformers: weights come from installed packages only.
os.environ["HF_HUB_OFFLINE"] = "1"

from importlib import import_module

import pytest
import torch

from tests.kernels import COMPILED, SETS, forget_choices

# pytest listens to every logger that keeps its records to itself. As soon as torch's one has a listener, whatever torch
# compiles, exports or copies without data is traced: a record with the stack of the call for every tensor.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _short_healing(monkeypatch):
    """Healing of a test model ends after a few steps, unless a test says how many."""
    monkeypatch.setattr(import_module("panther.heal"), "EPOCHS", 2)  # the name panther.heal is the function


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Each set that this processor has, in use; the best one is what the other tests run with."""
    before = COMPILED.set_instruction_set(request.param)
    forget_choices()
    yield request.param
    COMPILED.set_instruction_set(before)
    forget_choices()


@pytest.fixture
def scalar_kernels():
    if COMPILED is None:
        pytest.skip("no compiled kernels here")
    before = COMPILED.set_instruction_set("scalar")
    forget_choices()
    yield
    COMPILED.set_instruction_set(before)
    forget_choices()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
