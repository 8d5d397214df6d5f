"""What must be settled before anything is imported: threads, and without a GPU Triton's interpreter."""

import os

# The tensors of the tests are too small to share: a second thread would mostly spin while it waits for the first, for 1.5 to
# 1.8 times the processor time. Tests of threads set their number themselves; subprocesses inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before fixtures of any scope
def pytest_runtest_setup():
    """A test draws the same numbers whatever tests its process has run before: xdist divides them anew each time."""
    torch.manual_seed(0)
