"""A prior of flexible shape: a standard normal pushed through a chain of invertible maps."""

from typing import Any, Literal

import torch
from pyro.distributions import Normal, TransformedDistribution, transforms
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor, nn

from pyro_vae.contracts import Distribution, Prior, check_positive, check_several
from pyro_vae.flows import Autoregressive, Coupling, Flow, Inverse, Map, MaskedMlp, normal_points, start_at_zero
from pyro_vae.splines import Spline, num_parameters

_KINDS = ("coupling", "autoregressive", "spline", "autoregressive_spline")


class FlowPrior(Prior):
    r"""A normalising flow: a standard normal x, mapped to z by a composition g of learned invertible transforms.

    .. math:: p(z) = \mathcal N(x; 0, I) \left| \det \frac{\partial g(x)}{\partial x} \right|^{-1}, \qquad x = g^{-1}(z)

    It starts as the standard normal. The kinds: *coupling*, where half of the dimensions shift and scale the other
    half, scores and samples in one pass; *autoregressive*, where a masked network gives each dimension's mean and scale
    from those before it, scores in one pass and samples in D. With one transform the latter is the autoregressive
    normal prior p(z) = p(z_1) p(z_2 | z_1) ... itself. *spline* and *autoregressive_spline* are the same two with a
    monotone spline of 8 bins on [-5, 5] (:mod:`pyro_vae.splines`) in place of shift and scale: with one transform the
    last is p(z_1) p(z_2 | z_1) ... with factors of almost any shape, and the only kind for a single dimension. Between
    transforms the order of the dimensions is reversed.

    Args:
        latent_dim: number of latent dimensions D.
        kind: coupling, autoregressive, spline or autoregressive_spline.
        num_transforms: number of transforms, each with a network of its own.
        hidden: width of the hidden layers of each network (two; autoregressive_spline: one).

    Returns:
        A distribution with batch shape () and event shape (D,), with ``rsample``.

    Raises:
        ValueError: latent_dim < 2 (autoregressive_spline: < 1), num_transforms < 1, hidden < 1 (both autoregressive
            kinds: hidden < D), or an unknown kind.

    Source: Dinh, Sohl-Dickstein, Bengio (2017), Density estimation using Real NVP, arXiv:1605.08803 (coupling);
        Papamakarios, Pavlakou, Murray (2017), Masked Autoregressive Flow, arXiv:1705.07057 (autoregressive);
        Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows, arXiv:1906.04032 (splines).

    Example:
        >>> prior = FlowPrior(2, kind="autoregressive", num_transforms=1)
        >>> prior().log_prob(torch.zeros(3, 5, 2)).shape
        torch.Size([3, 5])
    """

    loc: Tensor
    order: Tensor
    points: Tensor

    def __init__(
        self,
        latent_dim: int,
        kind: Literal["coupling", "autoregressive", "spline", "autoregressive_spline"] = "coupling",
        num_transforms: int = 4,
        hidden: int = 64,
    ):
        super().__init__()
        check_positive(latent_dim=latent_dim, num_transforms=num_transforms, hidden=hidden)
        if kind not in _KINDS:
            raise ValueError(f"expected kind to be one of {', '.join(map(repr, _KINDS))}, found {kind!r}.")
        if kind != "autoregressive_spline":
            check_several(latent_dim)
        if kind.startswith("autoregressive") and hidden < latent_dim:
            raise ValueError(f"expected hidden >= {latent_dim} (latent_dim), found {hidden}: widen the masked network.")
        self.latent_dim, self.kind, self.num_transforms, self.hidden = latent_dim, kind, num_transforms, hidden
        self.nets = nn.ModuleList(self._net() for _ in range(num_transforms))
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("order", torch.arange(latent_dim - 1, -1, -1), persistent=False)
        self.register_buffer("points", normal_points(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return (
            f"latent_dim={self.latent_dim}, kind={self.kind!r}, num_transforms={self.num_transforms}, "
            f"hidden={self.hidden}"
        )

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        normal = Normal(self.loc, torch.ones_like(self.loc)).to_event(1)
        if self.kind.endswith("spline"):
            return Flow(normal, self._splines(), self.points)
        # Pyro's transforms keep their last pair (x, y) and its graph: made anew, they cannot answer from old parameters
        steps: list[torch.distributions.Transform] = []
        for net in self.nets:
            if steps:
                steps.append(transforms.Permute(self.order))
            if self.kind == "coupling":
                steps.append(transforms.AffineCoupling(self.latent_dim // 2, net))
            else:  # x -> z is the slow direction: a prior is scored far more often than sampled
                steps.append(transforms.AffineAutoregressive(net).inv)
        return TransformedDistribution(normal, steps)

    def _splines(self) -> list[Map]:
        nothing = self.loc.new_zeros(0)  # the context of a prior
        if self.kind == "spline":
            return [Coupling(net, nothing, self.latent_dim // 2, Spline) for net in self.nets]
        return [Inverse(Autoregressive(net, nothing, Spline)) for net in self.nets]

    def _net(self) -> nn.Module:
        net: DenseNN | AutoRegressiveNN
        widths, kept = [self.hidden, self.hidden], self.latent_dim // 2
        tanh = nn.Tanh()  # bounded: far out the flow is linear, and the tails stay those of a normal
        if self.kind == "spline":
            last = nn.Linear(self.hidden, num_parameters() * (self.latent_dim - kept))
            inner = [nn.Linear(kept, self.hidden), tanh, nn.Linear(self.hidden, self.hidden), tanh]
            return start_at_zero(nn.Sequential(*inner, last), last)
        if self.kind == "autoregressive_spline":
            return MaskedMlp(self.latent_dim, 0, self.hidden, nn.Tanh, num_parameters())
        if self.kind == "coupling":
            net = DenseNN(kept, widths, param_dims=[self.latent_dim - kept] * 2, nonlinearity=tanh)
        else:
            given_order: Any = torch.arange(self.latent_dim)
            net = _MaskedNet(self.latent_dim, widths, permutation=given_order, nonlinearity=tanh)
        for parameter in net.layers[-1].parameters():
            nn.init.zeros_(parameter)
        return net


class _MaskedNet(AutoRegressiveNN):
    """Takes x of any type: Pyro's sampler starts from zeros of torch's default type, not of the parameters'."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x.to(next(self.parameters()).dtype))
