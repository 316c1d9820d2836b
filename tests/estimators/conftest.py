"""Fixtures of the estimators' tests."""

import pytest
import torch


@pytest.fixture
def float64_by_default():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
