"""Encoders q(z | x) with normalising flows: a diagonal normal from the network, bent by a chain of invertible maps."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from pyro.distributions import Normal
from torch import Tensor, nn

from pyro_vae.contracts import Distribution, Encoder, check_at_least_one
from pyro_vae.flows import (
    Autoregressive,
    Coupling,
    Flow,
    Map,
    MaskedMlp,
    Planar,
    Radial,
    ShiftScale,
    normal_points,
    start_at_zero,
)
from pyro_vae.networks import Mlp
from pyro_vae.splines import Spline, num_parameters


class FlowNormal(Encoder):
    r"""What the flows of this module share: a diagonal normal from the network, followed by T invertible maps.

    The network gives (m, log s) and then what the maps ask for: their parameters, or a context for their own networks.
    The posterior's ``mean`` has no closed form; it is the average over 256 fixed points (128 scrambled Sobol points and
    their mirror images), the same at each call.

    Args:
        net: x [*batch, *E] -> [*batch, num_outputs].
        latent_dim: number of latent dimensions D.
        num_transforms: number of maps T.
    """

    points: Tensor

    def __init__(self, net: nn.Module, latent_dim: int, num_transforms: int):
        super().__init__()
        check_at_least_one(latent_dim=latent_dim, num_transforms=num_transforms)
        self.net, self.latent_dim, self.num_transforms = net, latent_dim, num_transforms
        self.register_buffer("points", normal_points(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's numbers."""
        return f"latent_dim={self.latent_dim}, num_transforms={self.num_transforms}"

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of outputs that the network must have."""

    @abstractmethod
    def maps(self, h: Tensor) -> Sequence[Map]:
        """The maps f_1, ..., f_T from the network's outputs [*batch, width - 2 D]."""

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        loc, log_scale, rest = self.parts(x)
        return Flow(Normal(loc, log_scale.exp()).to_event(1), self.maps(rest), self.points)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The network's outputs: m and log s, [*batch, D] each, and the rest."""
        h = self.net(x)
        if h.shape[-1] != self.width:
            raise ValueError(
                f"{type(self).__name__} expected {self.width} outputs of its network, found {h.shape[-1]}: make the "
                f"last layer {type(self).__name__}.num_outputs(...) wide, with the arguments of the encoder."
            )
        return h.split([self.latent_dim, self.latent_dim, self.width - 2 * self.latent_dim], dim=-1)


class PlanarFlow(FlowNormal):
    r"""Planar flow: each map pushes z along one direction, by an amount that depends on the distance to a plane.

    .. math:: f(z) = z + \hat u \tanh(w^\top z + b), \qquad
        \hat u = u + (\operatorname{softplus}(w^\top u + \log(e - 1)) - 1 - w^\top u) \frac{w}{|w|^2}

    All of u, w, b come from the network. The hat keeps w^T u > -1, so that f is invertible; it is shifted so that u = 0
    is the identity. Each map bends one direction only: take many in more than a few dimensions.

    Args:
        net: x [*batch, *E] -> [*batch, 2 D + T (2 D + 1)].
        latent_dim: number of latent dimensions D.
        num_transforms: number of maps T.

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``; its ``mean`` is approximate.

    Raises:
        ValueError: latent_dim or num_transforms < 1, or the network has another number of outputs.

    Source: Rezende, Mohamed (2015), Variational inference with normalizing flows, section 4.1, arXiv:1505.05770.

    Example:
        >>> import torch
        >>> from pyro_vae import Mlp
        >>> width = PlanarFlow.num_outputs(2, num_transforms=3)
        >>> PlanarFlow(Mlp(7, 16, width), latent_dim=2, num_transforms=3)(torch.zeros(5, 7)).event_shape
        torch.Size([2])
    """

    def __init__(self, net: nn.Module, latent_dim: int, num_transforms: int = 8):
        super().__init__(net, latent_dim, num_transforms)

    @staticmethod
    def num_outputs(latent_dim: int, num_transforms: int = 8) -> int:
        """2 D + T (2 D + 1)."""
        return 2 * latent_dim + num_transforms * (2 * latent_dim + 1)

    @property
    def width(self) -> int:
        """Number of outputs that the network must have."""
        return self.num_outputs(self.latent_dim, self.num_transforms)

    def maps(self, h: Tensor) -> Sequence[Map]:
        """One map for each row of parameters."""
        rows = h.unflatten(-1, (self.num_transforms, -1)).unbind(-2)
        return [Planar(*row.split([self.latent_dim, self.latent_dim, 1], dim=-1)) for row in rows]


class RadialFlow(FlowNormal):
    r"""Radial flow: each map pulls towards a point or pushes away from it.

    .. math:: f(z) = z + \frac{\beta}{\alpha + |z - c|} (z - c), \qquad \alpha = e^a, \quad \beta = \alpha (e^b - 1)

    All of c, a, b come from the network; beta > -alpha makes f invertible, b = 0 is the identity.

    Args:
        net: x [*batch, *E] -> [*batch, 2 D + T (D + 2)].
        latent_dim: number of latent dimensions D.
        num_transforms: number of maps T.

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``; its ``mean`` is approximate.

    Raises:
        ValueError: latent_dim or num_transforms < 1, or the network has another number of outputs.

    Source: Rezende, Mohamed (2015), Variational inference with normalizing flows, section 4.1, arXiv:1505.05770.

    Example:
        >>> import torch
        >>> from pyro_vae import Mlp
        >>> width = RadialFlow.num_outputs(2, num_transforms=3)
        >>> RadialFlow(Mlp(7, 16, width), latent_dim=2, num_transforms=3)(torch.zeros(5, 7)).event_shape
        torch.Size([2])
    """

    def __init__(self, net: nn.Module, latent_dim: int, num_transforms: int = 8):
        super().__init__(net, latent_dim, num_transforms)

    @staticmethod
    def num_outputs(latent_dim: int, num_transforms: int = 8) -> int:
        """2 D + T (D + 2)."""
        return 2 * latent_dim + num_transforms * (latent_dim + 2)

    @property
    def width(self) -> int:
        """Number of outputs that the network must have."""
        return self.num_outputs(self.latent_dim, self.num_transforms)

    def maps(self, h: Tensor) -> Sequence[Map]:
        """One map for each row of parameters."""
        rows = h.unflatten(-1, (self.num_transforms, -1)).unbind(-2)
        return [Radial(*row.split([self.latent_dim, 1, 1], dim=-1)) for row in rows]


class _ContextFlow(FlowNormal):
    """Flows whose maps are networks of their own, fed with a context from the encoder's network."""

    def __init__(
        self,
        net: nn.Module,
        latent_dim: int,
        num_transforms: int,
        hidden: int,
        context_dim: int,
        activation: type[nn.Module],
    ):
        super().__init__(net, latent_dim, num_transforms)
        check_at_least_one(hidden=hidden, context_dim=context_dim)
        self.context_dim = context_dim
        self.conditioners = nn.ModuleList(self.conditioner(hidden, activation) for _ in range(num_transforms))

    @staticmethod
    def num_outputs(latent_dim: int, context_dim: int = 32) -> int:
        """2 D and the context."""
        return 2 * latent_dim + context_dim

    @property
    def width(self) -> int:
        """Number of outputs that the network must have."""
        return self.num_outputs(self.latent_dim, self.context_dim)

    @abstractmethod
    def conditioner(self, hidden: int, activation: type[nn.Module]) -> nn.Module:
        """The network inside one map."""


class AutoregressiveFlow(_ContextFlow):
    r"""Inverse autoregressive flow: each number is shifted and scaled by a function of those before it.

    .. math:: f_d(z) = z_d \, e^{a_d} + t_d, \qquad (t_d, a_d) = \mathrm{net}_d(z_1, \dots, z_{d-1}, \mathrm{context})

    One pass for all D numbers at once; masked weights keep the order, which turns round after each map. Drawing and
    scoring a draw take one pass a map, scoring another z takes D. The logarithm of the scale a stays within (-2, 2).
    At the start each map is the identity.

    Args:
        net: x [*batch, *E] -> [*batch, 2 D + context_dim].
        latent_dim: number of latent dimensions D.
        num_transforms: number of maps T.
        hidden: size of the hidden layer of each map.
        context_dim: number of outputs of the network that every map sees.
        activation: the class of the activation inside the maps.

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``; its ``mean`` is approximate.

    Raises:
        ValueError: a size below 1, or the network has another number of outputs.

    Source: Kingma et al. (2016), Improving variational inference with inverse autoregressive flow, arXiv:1606.04934.

    Example:
        >>> import torch
        >>> from pyro_vae import Mlp
        >>> net = Mlp(7, 16, AutoregressiveFlow.num_outputs(2, context_dim=4))
        >>> AutoregressiveFlow(net, latent_dim=2, context_dim=4)(torch.zeros(5, 7)).event_shape
        torch.Size([2])
    """

    def __init__(
        self,
        net: nn.Module,
        latent_dim: int,
        num_transforms: int = 2,
        hidden: int = 64,
        context_dim: int = 32,
        activation: type[nn.Module] = nn.Tanh,
    ):
        super().__init__(net, latent_dim, num_transforms, hidden, context_dim, activation)

    def conditioner(self, hidden: int, activation: type[nn.Module]) -> nn.Module:
        """A masked network."""
        return MaskedMlp(self.latent_dim, self.context_dim, hidden, activation)

    def maps(self, h: Tensor) -> Sequence[Map]:
        """One map for each masked network."""
        return [Autoregressive(net, h) for net in self.conditioners]


class CouplingFlow(_ContextFlow):
    r"""Affine coupling: one half of z is shifted and scaled by a function of the other half.

    .. math:: f(z_a, z_b) = (z_a, \; z_b \, e^{a} + t), \qquad (t, a) = \mathrm{net}(z_a, \mathrm{context})

    Both directions take one pass; the halves change places after each map, so two maps at least move all of z. The
    logarithm of the scale a stays within (-2, 2). At the start each map is the identity.

    Args:
        net: x [*batch, *E] -> [*batch, 2 D + context_dim].
        latent_dim: number of latent dimensions D.
        num_transforms: number of maps T.
        hidden: size of the hidden layer of each map.
        context_dim: number of outputs of the network that every map sees.
        activation: the class of the activation inside the maps.

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``; its ``mean`` is approximate.

    Raises:
        ValueError: a size below 1, or the network has another number of outputs.

    Source: Dinh, Sohl-Dickstein, Bengio (2017), Density estimation using Real NVP, arXiv:1605.08803.

    Example:
        >>> import torch
        >>> from pyro_vae import Mlp
        >>> net = Mlp(7, 16, CouplingFlow.num_outputs(2, context_dim=4))
        >>> CouplingFlow(net, latent_dim=2, context_dim=4)(torch.zeros(5, 7)).event_shape
        torch.Size([2])
    """

    def __init__(
        self,
        net: nn.Module,
        latent_dim: int,
        num_transforms: int = 4,
        hidden: int = 64,
        context_dim: int = 32,
        activation: type[nn.Module] = nn.Tanh,
    ):
        super().__init__(net, latent_dim, num_transforms, hidden, context_dim, activation)

    def conditioner(self, hidden: int, activation: type[nn.Module]) -> nn.Module:
        """A perceptron from the first half and the context to shift and scale of the second."""
        kept = self.latent_dim // 2
        mlp = Mlp(kept + self.context_dim, hidden, 2 * (self.latent_dim - kept), activation=activation)
        return start_at_zero(mlp, mlp[-1])

    def maps(self, h: Tensor) -> Sequence[Map]:
        """One map for each perceptron."""
        return [Coupling(net, h, self.latent_dim // 2) for net in self.conditioners]


class SplineFlow(_ContextFlow):
    r"""Spline flow: each number goes through a monotone spline whose knots depend on other numbers and the context.

    .. math:: z = m + s \, f_T(\dots f_1(z_0)), \quad z_0 \sim \mathcal N(0, I), \qquad
        f(z_a, z_b) = (z_a, \; \mathrm{spline}(z_b; \mathrm{net}(z_a, \mathrm{context})))

    A spline of 8 bins has almost any increasing shape on [-5, 5] and is the identity outside (:mod:`pyro_vae.splines`),
    so that one map makes several modes, which shift and scale cannot. Mean m and scale s come last, for the splines to
    act where the mass is. *coupling* moves one half by the other, both directions in one pass; *autoregressive* each
    number by those before it, and takes D passes to score another z than its own draw. In one dimension both bend that
    number by the context alone. At the start each map is the identity.

    Args:
        net: x [*batch, *E] -> [*batch, 2 D + context_dim].
        latent_dim: number of latent dimensions D.
        num_transforms: number of maps T.
        hidden: size of the hidden layer of each map's network.
        context_dim: number of outputs of the network that every map sees.
        kind: coupling or autoregressive.
        activation: the class of the activation inside the maps.

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``; its ``mean`` is approximate.

    Raises:
        ValueError: a size below 1, an unknown kind, or the network has another number of outputs.

    Source: Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows, arXiv:1906.04032.

    Example:
        >>> from pyro_vae import Mlp
        >>> net = Mlp(7, 16, SplineFlow.num_outputs(2, context_dim=4))
        >>> SplineFlow(net, latent_dim=2, context_dim=4)(torch.zeros(5, 7)).event_shape
        torch.Size([2])
    """

    def __init__(
        self,
        net: nn.Module,
        latent_dim: int,
        num_transforms: int = 2,
        hidden: int = 64,
        context_dim: int = 32,
        kind: Literal["coupling", "autoregressive"] = "coupling",
        activation: type[nn.Module] = nn.Tanh,
    ):
        if kind not in ("coupling", "autoregressive"):
            raise ValueError(f"expected kind 'coupling' or 'autoregressive', found {kind!r}.")
        self.kind = kind  # first: the constructor above makes the networks
        super().__init__(net, latent_dim, num_transforms, hidden, context_dim, activation)

    def extra_repr(self) -> str:
        """Show the constructor's numbers."""
        return f"{super().extra_repr()}, kind={self.kind!r}"

    def conditioner(self, hidden: int, activation: type[nn.Module]) -> nn.Module:
        """The network that gives the splines' parameters."""
        if self.kind == "autoregressive":
            return MaskedMlp(self.latent_dim, self.context_dim, hidden, activation, num_parameters())
        kept = self.latent_dim // 2
        width = num_parameters() * (self.latent_dim - kept)
        mlp = Mlp(kept + self.context_dim, hidden, width, activation=activation)
        return start_at_zero(mlp, mlp[-1])

    def maps(self, h: Tensor) -> Sequence[Map]:
        """One map for each network."""
        if self.kind == "autoregressive":
            return [Autoregressive(net, h, Spline) for net in self.conditioners]
        return [Coupling(net, h, self.latent_dim // 2, Spline) for net in self.conditioners]

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        loc, log_scale, rest = self.parts(x)
        normal = Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return Flow(normal, [*self.maps(rest), ShiftScale(loc, log_scale)], self.points)
