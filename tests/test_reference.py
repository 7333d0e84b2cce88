"""The oracle itself, against hand-computed cases and the method page's formulas."""

import pytest
import reference
import torch
from helpers import make_input, make_parameters, near_statistics

from mbnorm.blend import VARIANCE_RULES


def column(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def test_batch_statistics_by_hand():
    mean, var, n = reference.batch_statistics(column(1, 2, 6))
    assert (mean.item(), n) == (3.0, 3)
    assert var.item() == pytest.approx((4 + 1 + 9) / 3)


@pytest.mark.parametrize(("variance", "expected"), [("averaged", 3.0), ("pooled", 4.0)])
def test_mix_by_hand(variance, expected):
    one = torch.ones(1)
    mean, var = reference.mix(0 * one, 2 * one, 2 * one, 4 * one, 0.5, variance)
    assert (mean.item(), var.item()) == (1.0, expected)


@pytest.mark.parametrize("variance", VARIANCE_RULES)
@pytest.mark.parametrize("a", [1.0, 0.4])
def test_gradient_is_the_method_pages_formula(a, variance):
    eps = 1e-3
    x = make_input((4, 3, 5), torch.float64).requires_grad_()
    w, b = (p.requires_grad_() for p in make_parameters(3, torch.float64))
    past = near_statistics(x.detach())
    dy = make_input((4, 3, 5), torch.float64, seed=7)
    y, mB, _, mean, var = reference.blended_batch_norm(x, w, b, *past, a, variance, eps)
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)

    def total(t):
        return t.sum((0, 2), keepdim=True)

    mB, mean, var, w = (t.detach().view(1, 3, 1) for t in (mB, mean, var, w))
    n = 4 * 5
    rstd = (var + eps) ** -0.5
    xhat = (x.detach() - mean) * rstd
    z = xhat if variance == "pooled" else (x.detach() - mB) * rstd
    level = 0.0 if variance == "uncentered" else a / n * total(dy)
    wanted = w * rstd * (dy - level - a / n * z * total(dy * xhat))
    torch.testing.assert_close(dx, wanted, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(dw, total(dy * xhat).flatten(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(db, total(dy).flatten(), rtol=1e-13, atol=1e-14)


def test_momentum_by_hand():
    norm = reference.MomentumNorm(1, history_weight=0.75, eps=0.0)
    norm(column(0, 2))  # mean 1, var 1
    y = norm(column(4, 8))  # batch mean 6, var 4
    mean, var = 0.25 * 6 + 0.75 * 1, 0.25 * 4 + 0.75 * 1
    assert norm.M.item() == mean
    assert y.flatten().tolist() == pytest.approx([(4 - mean) / var**0.5, (8 - mean) / var**0.5])
    assert norm.running_mean.item() == pytest.approx(0.9 * 0.1 * 1 + 0.1 * 6)


def test_matched_by_hand():
    norm = reference.MatchedNorm(1, matched_batch_size=6, measured=False, early_weight=0.0)
    norm(column(0, 2))
    norm(column(4, 8))
    lam = (6 - 2) / (6 + 2)
    assert norm.M.item() == (1 - lam) * 6 + lam * 1
    assert norm.V.item() == (1 - lam) * 4 + lam * 1 + lam * (1 - lam) * 25


def test_memorized_by_hand():
    norm = reference.MemorizedNorm(1, memory_size=2)
    norm(column(0, 2))
    norm(column(4, 8))
    assert (norm.running_mean.item(), norm.running_var.item()) == (
        3.5,
        (3.5**2 + 1.5**2 + 0.5**2 + 4.5**2) / 4,
    )


def test_momentum_noise_is_that_of_the_matched_number_of_values():
    torch.manual_seed(0)
    N, m = 32, 2
    norm = reference.MatchedNorm(20000, matched_batch_size=N, measured=False)
    for _ in range(80):
        norm(torch.randn(m, 20000, dtype=torch.float64))
    # 20000 channels: the estimate is good to about 1 %
    assert norm.M.square().mean().item() == pytest.approx(1 / N, rel=0.05)


def test_paper_lambda_by_hand():
    assert reference.paper_lambda(1, 3, 8) == 0
    assert reference.paper_lambda(2, 3, 8) == pytest.approx(0.25**0.5 - 0.25)
    assert reference.paper_lambda(3, 3, 8) == pytest.approx(0.75)


def test_rewinding_momentum_restores_it():
    norm = reference.MomentumNorm(1, history_weight=0.5)
    norm(column(0, 2))
    mark = norm.mark()
    before = norm.M.clone()
    norm(column(4, 8))
    norm.rewind(mark)
    assert torch.equal(norm.M, before)
    assert norm.batches == 1


def test_rewinding_the_memory_drops_what_came_since_and_keeps_evictions():
    norm = reference.MemorizedNorm(1, memory_size=2)
    for value in (0, 10):
        norm(column(value, value + 2))
    mark = norm.mark()
    norm(column(20, 22))
    norm.rewind(mark)
    assert [e.mean.item() for e in norm.entries] == [11.0]
