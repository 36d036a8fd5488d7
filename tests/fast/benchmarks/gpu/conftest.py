import pytest
import torch
from gpu import kernels


@pytest.fixture
def interpretable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter, numpy that is, multiplies no bfloat16."""
    monkeypatch.setattr(kernels, "DTYPE", torch.float16)
    kernels.Pool.of.cache_clear()
    yield
    kernels.Pool.of.cache_clear()
