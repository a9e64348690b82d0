"""The gradient of a reparameterised sampler and of an objective, each against a second route.

The machinery behind :func:`pyro_vae.testing.check_encoder` and :func:`pyro_vae.testing.check_objective`.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor, nn

from pyro_vae.density_checks import ERRORS, expect, limits_of, require


def check_gradient(encoder: Any, x: Tensor, name: str) -> None:
    """The gradient of E f(rsample) along random directions of the parameters, against two others.

    First finite differences with the same random numbers; a sampler that jumps (by rejection, say) fails those but
    may still be right, so then the score-function gradient within standard errors.
    """
    leaves: list[Tensor] = list(encoder.parameters()) if isinstance(encoder, nn.Module) else []
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if not leaves:
        if not x.is_floating_point():
            return
        leaves = [x.requires_grad_()]
    steps: list[Tensor] = []
    rounding = torch.finfo(leaves[0].dtype).eps
    eps = rounding ** (1 / 3)
    low, high = limits_of(encoder(x).sample((1000,)))
    centre, width = (low + high) / 2, (high - low) / 25  # about the mean and the standard deviation

    def f(z: Tensor) -> Tensor:
        z = (z - centre) / width
        return (z.sin() + z.cos()).flatten(2).sum(2)

    def slope(value: Callable[..., Tensor], argument: Any) -> Tensor:
        """(value at +eps - value at -eps) / 2 eps, along the steps."""
        results = []
        for sign in (1, -2):
            for leaf, step in zip(leaves, steps, strict=True):
                leaf.data.add_(step, alpha=sign * eps)
            results.append(value(argument))
        for leaf, step in zip(leaves, steps, strict=True):
            leaf.data.add_(step, alpha=eps)
        return (results[0] - results[1]) / (2 * eps)

    def by_rsample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return f(encoder(x).rsample((500,))).mean(0).sum()

    def log_prob(z: Tensor) -> Tensor:
        return encoder(x).log_prob(z)

    def pathwise(seed: int) -> float:
        with torch.enable_grad():
            value = by_rsample(seed)
            require(
                value.requires_grad,
                f"{name}.rsample() has no gradient: keep it differentiable in the parameters (no detach, no no_grad), "
                "or set has_rsample = False.",
            )
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        return sum((g * s).sum().item() for g, s in zip(gradients, steps, strict=True) if g is not None)

    for direction in range(3):
        torch.manual_seed(direction)
        steps[:] = [torch.randn_like(leaf) for leaf in leaves]
        exact = float(slope(by_rsample, 0))
        if abs(pathwise(0) - exact) <= rounding**0.25 * (1 + abs(exact)):
            continue
        ours = torch.tensor([pathwise(seed) for seed in range(40)])
        z = encoder(x).sample((20_000,))
        value = f(z)
        score = ((value - value.mean(0)) * slope(log_prob, z)).sum(1)
        error = math.sqrt(float(ours.var()) / len(ours) + float(score.var()) / len(score))
        require(
            abs(float(ours.mean() - score.mean())) <= ERRORS * error,
            f"the gradient of {name}.rsample() is {ours.mean():.4g} along a direction, expected {score.mean():.4g} "
            f"(standard error {error:.2g}): keep it differentiable in all parameters (no detach).",
        )


def check_loss(objective: Any, vae: Any, x: Tensor, name: str) -> None:
    """Shape and scale of bound and loss, the gradient, and one step of SVI."""

    def at_seed(method: Callable[..., Any], model: Any = vae.model, guide: Any = vae.guide) -> Any:
        torch.manual_seed(1)
        if callable(getattr(objective, "at_step", None)):
            objective.at_step(0)  # of its schedules
        return method(model, guide, x)

    with torch.enable_grad():
        x = x.clone().requires_grad_()
        bound = at_seed(objective.bound)
        expect(f"bound of {name}", "shape", tuple(bound.shape), (len(x),), "one value for each example")
        require(bool(torch.isfinite(bound).all()), f"bound of {name} is infinite or NaN, expected finite numbers.")
        (of_x,) = torch.autograd.grad(bound[0], x)
        apart = bool((of_x[1:] == 0).all())
        require(
            apart or getattr(objective, "mixes_examples", False),
            f"bound of {name} mixes the examples, expected each by itself: average over particles only (or, if it is "
            "meant to, set mixes_examples = True).",
        )
        for scale in (1.0, 2.5):
            programs = poutine.scale(vae.model, scale), poutine.scale(vae.guide, scale)
            expected = -scale * bound.sum().item()
            for method in (objective.loss, objective.differentiable_loss, objective.loss_and_grads):
                found = torch.as_tensor(at_seed(method, *programs)).item()
                require(
                    math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9),
                    f"{method.__name__} of {name} is {found:.6g}, expected {expected:.6g} = -(scale * bound).sum() "
                    f"at scale {scale}: sum over the examples, with a minus sign.",
                )
        parameters = list(vae.parameters())
        gradients = torch.autograd.grad(at_seed(objective.differentiable_loss), parameters, allow_unused=True)
        vae.zero_grad()
        at_seed(objective.loss_and_grads)
        for (parameter, p), g in zip(vae.named_parameters(), gradients, strict=True):
            same = p.grad is g if p.grad is None or g is None else torch.allclose(p.grad, g, rtol=1e-9, atol=1e-9)
            require(same, f"loss_and_grads of {name} and differentiable_loss differ in the gradient of {parameter}.")
        copied = copy.deepcopy(vae)
        svi = pyro.infer.SVI(copied.model, copied.guide, Adam({"lr": 1e-2}), loss=objective)
        loss = svi.step(x.detach())
        moved = any(not torch.equal(a, b) for a, b in zip(copied.parameters(), parameters, strict=True))
        require(math.isfinite(loss) and moved, f"SVI(loss={name}).step moves nothing, expected a finite step.")
