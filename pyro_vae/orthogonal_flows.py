"""Flows made of reflections: Householder's, which turn a diagonal normal, and Sylvester's, which bend it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_vae.contracts import check_at_least_one
from pyro_vae.flow_encoders import FlowNormal
from pyro_vae.flows import Map, solve_bend


class Reflections:
    """The orthogonal map H_1 ... H_n, each H z = z - 2 v (v^T z) / |v|^2; vectors v [*batch, n, D]."""

    def __init__(self, vectors: Tensor):
        square = (vectors**2).sum(-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
        self.normals = (vectors * square.rsqrt()).unbind(-2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log |det dy/dz| = 0."""
        for v in reversed(self.normals):
            z = z - 2 * v * (v * z).sum(-1, keepdim=True)
        return z, z.new_zeros(z.shape[:-1])

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """A reflection is its own inverse: the same in the other order."""
        for v in self.normals:
            y = y - 2 * v * (v * y).sum(-1, keepdim=True)
        return y, y.new_zeros(y.shape[:-1])


class Sylvester:
    """z + Q R tanh(S Q^T z + b): Q orthogonal, R and S upper triangular [*batch, D, D] with R_dd S_dd > -1."""

    def __init__(self, q: Reflections, r: Tensor, s: Tensor, b: Tensor):
        self.q, self.r, self.s, self.b = q, r, s, b
        self.slope = (r * s).diagonal(dim1=-2, dim2=-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log |det dy/dz|: in the basis Q the matrix of derivatives is triangular."""
        bend = (_times(self.s, self.q.inverse(z)[0]) + self.b).tanh()
        return z + self.q.forward(_times(self.r, bend))[0], self._log_det(bend)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """In the basis Q the last number stands alone, and each of the others needs those behind it only."""
        y = self.q.inverse(y)[0]
        zs: list[Tensor] = []
        bends: list[Tensor] = []
        for d in reversed(range(y.shape[-1])):
            shift, target = self.b[..., d], y[..., d]
            for later, (z, bend) in enumerate(zip(zs, bends, strict=True), start=d + 1):
                shift = shift + self.s[..., d, later] * z
                target = target - self.r[..., d, later] * bend
            z = solve_bend(target, self.r[..., d, d], self.s[..., d, d], shift)
            zs.insert(0, z)
            bends.insert(0, (self.s[..., d, d] * z + shift).tanh())
        return self.q.forward(torch.stack(zs, dim=-1))[0], self._log_det(torch.stack(bends, dim=-1))

    def _log_det(self, bend: Tensor) -> Tensor:
        return torch.log1p(self.slope * (1 - bend**2)).sum(-1)


class HouseholderFlow(FlowNormal):
    r"""Householder flow: a diagonal normal, turned by T reflections into one with correlations.

    .. math:: z = H_T \cdots H_1 z_0, \qquad H_t = I - 2 \frac{v_t v_t^\top}{|v_t|^2}

    All of v come from the network. z is still normal, with covariance H diag(s^2) H^T: few reflections are a cheap step
    from the diagonal towards the full one, D of them reach every orthogonal H. Volumes stay, so nothing is added to the
    log-density. (In the paper each v is a linear function of the one before; here the network gives each.)

    Args:
        net: x [*batch, *E] -> [*batch, 2 D + T D].
        latent_dim: number of latent dimensions D.
        num_transforms: number of reflections T.

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``; its ``mean`` is exact.

    Raises:
        ValueError: latent_dim or num_transforms < 1, or the network has another number of outputs.

    Source: Tomczak, Welling (2016), Improving variational auto-encoders using Householder flow, arXiv:1611.09630.

    Example:
        >>> from pyro_vae import Mlp
        >>> width = HouseholderFlow.num_outputs(2, num_transforms=3)
        >>> HouseholderFlow(Mlp(7, 16, width), latent_dim=2, num_transforms=3)(torch.zeros(5, 7)).event_shape
        torch.Size([2])
    """

    def __init__(self, net: nn.Module, latent_dim: int, num_transforms: int = 4):
        super().__init__(net, latent_dim, num_transforms)

    @staticmethod
    def num_outputs(latent_dim: int, num_transforms: int = 4) -> int:
        """2 D + T D."""
        return 2 * latent_dim + num_transforms * latent_dim

    @property
    def width(self) -> int:
        """Number of outputs that the network must have."""
        return self.num_outputs(self.latent_dim, self.num_transforms)

    def maps(self, h: Tensor) -> Sequence[Map]:
        """One map for all reflections."""
        return [Reflections(h.unflatten(-1, (self.num_transforms, -1)))]


class SylvesterFlow(FlowNormal):
    r"""Sylvester flow: each map bends z along all D directions at once, in a basis of its own.

    .. math:: f(z) = z + Q R \tanh(S Q^\top z + b), \qquad
        |\det \partial f| = \prod_d (1 + R_{dd} S_{dd} \tanh'((S Q^\top z + b)_d))

    R and S are upper triangular with a diagonal within (-1, 1), so that f is invertible; Q is orthogonal, a product of
    Householder reflections. All of them come from the network. A planar flow is the same with one direction: this one
    needs fewer maps, and D (D + 1) + D + D n numbers for each. Inverting it (to score another z than its own draw)
    takes D bisections.

    Args:
        net: x [*batch, *E] -> [*batch, 2 D + T D (D + 2 + n)].
        latent_dim: number of latent dimensions D.
        num_transforms: number of maps T.
        num_reflections: number n of reflections in each Q; D reach every orthogonal one.

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``; its ``mean`` is approximate.

    Raises:
        ValueError: a size below 1, or the network has another number of outputs.

    Source: van den Berg, Hasenclever, Tomczak, Welling (2018), Sylvester normalizing flows for variational inference,
        arXiv:1803.05649 (the variant with Householder reflections).

    Example:
        >>> from pyro_vae import Mlp
        >>> width = SylvesterFlow.num_outputs(2, num_transforms=3)
        >>> SylvesterFlow(Mlp(7, 16, width), latent_dim=2, num_transforms=3)(torch.zeros(5, 7)).event_shape
        torch.Size([2])
    """

    def __init__(self, net: nn.Module, latent_dim: int, num_transforms: int = 4, num_reflections: int = 4):
        super().__init__(net, latent_dim, num_transforms)
        check_at_least_one(num_reflections=num_reflections)
        self.num_reflections = num_reflections

    def extra_repr(self) -> str:
        """Show the constructor's numbers."""
        return f"{super().extra_repr()}, num_reflections={self.num_reflections}"

    @staticmethod
    def num_outputs(latent_dim: int, num_transforms: int = 4, num_reflections: int = 4) -> int:
        """2 D + T D (D + 2 + n)."""
        return 2 * latent_dim + num_transforms * latent_dim * (latent_dim + 2 + num_reflections)

    @property
    def width(self) -> int:
        """Number of outputs that the network must have."""
        return self.num_outputs(self.latent_dim, self.num_transforms, self.num_reflections)

    def maps(self, h: Tensor) -> Sequence[Map]:
        """One map for each row of parameters."""
        dim = self.latent_dim
        above = dim * (dim - 1) // 2
        maps: list[Map] = []
        for row in h.unflatten(-1, (self.num_transforms, -1)).unbind(-2):
            v, b, *parts = row.split([dim * self.num_reflections, dim, dim, dim, above, above], dim=-1)
            r, s = (_upper(0.999 * parts[i].tanh(), parts[i + 2]) for i in (0, 1))  # never quite -1, when rounded
            maps.append(Sylvester(Reflections(v.unflatten(-1, (self.num_reflections, dim))), r, s, b))
        return maps


def _upper(diagonal: Tensor, above: Tensor) -> Tensor:
    """The upper triangular matrix [*batch, D, D] with this diagonal, and these numbers above it row by row."""
    dim = diagonal.shape[-1]
    rows, columns = torch.triu_indices(dim, dim, offset=1, device=diagonal.device)
    flat = torch.diag_embed(diagonal).flatten(-2)
    return flat.index_add(-1, rows * dim + columns, above).unflatten(-1, (dim, dim))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
