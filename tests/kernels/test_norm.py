"""The norm's backward against torch's own."""

import pytest
import torch

from train.kernels import norm


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("rows", [0, 1, 67])
def test_norm_and_its_gradients_equal_torchs_own(monkeypatch, dtype, bound, rows):
    monkeypatch.setattr(norm, "PIECE", 640)
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    # a part of each row of something wider, as the latent is
    x, weight, grad = normal(rows, 3, 48)[..., :32].requires_grad_(), normal(32), normal(rows, 3, 32)
    found = []
    for cls in (torch.nn.RMSNorm, norm.RMSNorm):
        module = cls(32, eps=1e-5, dtype=dtype)
        module.weight.data.copy_(weight)
        y = module(x)
        found.append([y, *torch.autograd.grad(y, (x, module.weight), grad)])
    for expected, a in zip(*found, strict=True):
        assert a.dtype == dtype
        assert (a - expected).norm() <= bound * expected.norm()
