"""Settings of all tests: one thread each, so that two workers do not slow each other down."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

import pytest
import torch
from helpers import FEW_IMAGES

import evaluate

torch.set_num_threads(1)


@pytest.fixture
def few_images(monkeypatch):
    """The numbers of an epoch, and those at the end of a run, are made from a few images."""
    for name, count in FEW_IMAGES.items():
        monkeypatch.setattr(evaluate, name, count)
