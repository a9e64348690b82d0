"""Splines: Pyro's as a second route, the exact inverse, slopes, tails, gradients."""

import pytest
import torch
from pyro.distributions.transforms.spline import _monotonic_rational_spline

from pyro_vae.splines import Spline, num_parameters

K, B, D, BINS = 3, 5, 2, 8


def make(spread=1.0, bound=5.0, num_bins=BINS, dtype=None):
    return Spline(spread * torch.randn(B, num_parameters(num_bins) * D, dtype=dtype), num_bins, bound)


def line(spline, margin=2.0, num=4001):
    """Points across the interval and both tails, [num, B, D]."""
    z = torch.linspace(-spline.bound - margin, spline.bound + margin, num, dtype=spline.x.dtype)
    return z.reshape(-1, 1, 1).expand(-1, B, D)


@pytest.mark.parametrize("num_bins", [2, 8, 11])
def test_equals_pyros_spline(float64, num_bins):
    spline = make(num_bins=num_bins)
    z = line(spline, num=301)

    def others(value, inverse):
        parts = spline.x.diff(dim=-1), spline.y.diff(dim=-1), spline.slope[..., 1:-1]
        widths, heights, slopes = (p.expand(*value.shape, -1).clone() for p in parts)
        share = 2 * spline.bound
        return _monotonic_rational_spline(
            value, widths / share, heights / share, slopes,
            inverse=inverse, bound=spline.bound, min_bin_width=0.0, min_bin_height=0.0, min_derivative=0.0, eps=0.0,
        )  # fmt: skip

    y, log_slope = spline.forward(z)
    expected, expected_log_slope = others(z, inverse=False)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_slope, expected_log_slope, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(spline.inverse(y)[0], others(y, inverse=True)[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_inverse(dtype, tolerance):
    spline = make(dtype=dtype)
    z = torch.cat([line(spline), spline.x.movedim(-1, 0)])  # the knots too
    y, log_slope = spline.forward(z)
    back, same = spline.inverse(y)
    assert y.dtype == log_slope.dtype == dtype
    torch.testing.assert_close(back, z, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(same, log_slope, rtol=10 * tolerance, atol=10 * tolerance)


def test_goes_through_its_knots_with_its_slopes_and_grows(float64):
    spline = make(spread=2.0)
    x = spline.x.movedim(-1, 0).clone().requires_grad_()
    y, log_slope = spline.forward(x)
    torch.testing.assert_close(y, spline.y.movedim(-1, 0))
    torch.testing.assert_close(log_slope.exp(), spline.slope.movedim(-1, 0))
    y, log_slope = spline.forward(line(spline))
    assert (y.diff(dim=0) > 0).all()
    z = line(spline).clone().requires_grad_()
    (slope,) = torch.autograd.grad(spline.forward(z)[0].sum(), z)
    torch.testing.assert_close(slope.log(), log_slope)


def test_identity_in_the_tails_and_at_the_start(float64):
    spline = make()
    far = torch.tensor([-1e6, -5.0, 5.0, 7.0]).reshape(-1, 1, 1).expand(-1, B, D)
    for way in (spline.forward, spline.inverse):
        value, log_slope = way(far)
        assert torch.equal(value, far) and (log_slope == 0).all()
    start = Spline(torch.zeros(B, num_parameters() * D))
    z = line(start)
    for way in (start.forward, start.inverse):
        value, log_slope = way(z)
        torch.testing.assert_close(value, z, rtol=0, atol=1e-13)
        torch.testing.assert_close(log_slope, torch.zeros_like(z), rtol=0, atol=1e-13)


@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_gradients(float64, way):
    """Of value and slope, in the parameters and in z, inside, outside and on the border."""
    h = torch.randn(B, num_parameters() * D).requires_grad_()
    z = (4 * torch.randn(K, B, D)).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, z: getattr(Spline(h), way)(z), (h, z), atol=1e-6)
    border = torch.tensor([-5.0, 5.0, 1e200]).reshape(K, 1, 1).expand(K, B, D).clone().requires_grad_()
    gradients = torch.autograd.grad(sum(t.sum() for t in getattr(Spline(h), way)(border)), (h, border))
    assert all(torch.isfinite(g).all() for g in gradients)


def test_extreme_parameters_stay_finite_and_invertible():
    """Softmaxes that put everything in one bin: no width, height or slope falls to 0."""
    spline = Spline(30 * torch.randn(B, num_parameters() * D))
    z = line(spline).clone().requires_grad_()
    y, log_slope = spline.forward(z)
    assert torch.isfinite(y).all() and torch.isfinite(log_slope).all() and (y.diff(dim=0) >= -1e-5).all()
    assert torch.isfinite(torch.autograd.grad(log_slope.sum(), z)[0]).all()
    torch.testing.assert_close(spline.forward(spline.inverse(y)[0])[0], y, rtol=1e-3, atol=1e-3)
