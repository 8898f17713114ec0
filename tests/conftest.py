import pytest
import torch


@pytest.fixture
def float64():
    """Double precision as the default of this test: a spike cannot flip by rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
