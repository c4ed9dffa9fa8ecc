"""Kernels are tested on a GPU at real shapes, without one in Triton's interpreter at tiny ones."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, where there is one."""
    found = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if found else torch.device("cpu")
