r"""Missing numbers: NaN in x. What the encoder reads, and what the model puts in their place.

.. math:: p(x_{\mathrm{gap}} \mid x_{\mathrm{there}}) = \int p(x_{\mathrm{gap}} \mid z) \, p(z \mid x_{\mathrm{there}})
    \, dz

The likelihood for such data is :class:`pyro_vae.likelihoods.Masked`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.contracts import untouched
from pyro_vae.masked import WithMissing
from pyro_vae.supports import elements
from pyro_vae.tables import Categories
from pyro_vae.terms import check_num_particles, draw


class FillMissing(nn.Module):
    """Put a number in the place of each NaN, and say where, so that an encoder's network can read x.

    Args:
        value: what is put in: a number, or a tensor that broadcasts with x, such as the data's mean.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].
        append_gaps: append to the first of these axes as many inputs again, 1 where x is missing.

    Example:
        >>> FillMissing(append_gaps=True)(torch.tensor([[2.0, torch.nan]]))
        tensor([[2., 0., 0., 1.]])
    """

    value: Tensor

    def __init__(self, value: Tensor | float = 0.0, event_dim: int = 1, append_gaps: bool = False):
        super().__init__()
        self.register_buffer("value", torch.as_tensor(value, dtype=torch.get_default_dtype()).detach().clone())
        self.event_dim, self.append_gaps = event_dim, append_gaps

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"event_dim={self.event_dim}, append_gaps={self.append_gaps}"

    def forward(self, x: Tensor) -> Tensor:
        """The example without NaN, [*batch, *E], or with the gaps appended [*batch, 2 E[0], *E[1:]]."""
        gap = x.isnan()
        filled = torch.where(gap, self.value.to(x.dtype), x)
        return torch.cat([filled, gap.to(x.dtype)], -self.event_dim) if self.append_gaps else filled


def impute(vae: Any, x: Tensor, num_particles: int = 1000, *, sample: bool = False, seed: int = 0) -> Tensor:
    r"""Fill missing numbers (NaN) with what the model expects there, given the numbers that are there.

    .. math:: \mathbb E[x_{\mathrm{gap}} \mid x_{\mathrm{there}}] \approx \sum_k w_k \,
        \mathbb E[x_{\mathrm{gap}} \mid z_k], \quad w_k \propto \frac{p(x_{\mathrm{there}}, z_k)}{q(z_k \mid x)},
        \quad z_k \sim q(z \mid x)

    The importance weights make up for a posterior that is not exact: with K they tend to the model's own answer.

    Args:
        vae: a trained model with ``decoder`` and a likelihood that takes NaN (``likelihoods.Masked``).
        x: data with gaps, [N, *E].
        num_particles: number K of draws of z for each example.
        sample: draw z by its weight, and x given z, in place of the mean; several calls with other seeds then show how
            uncertain the gap is (multiple imputation).
        seed: seed of the draws; the random state outside is untouched.

    Returns:
        [N, *E] without NaN: what was there is as it was. A category is the most probable one; the mean of bits and
        counts need not be whole.

    Raises:
        ValueError: num_particles < 1, or the likelihood does not take NaN.

    Source: Mattei, Frellsen (2019), MIWAE: deep generative modelling and imputation of incomplete data sets, section
        3.3, arXiv:1812.02633.

    Example:
        >>> from pyro_vae import VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, likelihoods
        >>> decoder = Decoder(Mlp(2, 8, 7), likelihoods.Masked(likelihoods.Normal()))
        >>> vae = VAE(StandardNormal(2), decoder, DiagonalNormal(nn.Sequential(FillMissing(), Mlp(7, 8, 4))))
        >>> filled = impute(vae, torch.tensor([[1.0, torch.nan, 3.0, 4.0, 5.0, 6.0, 7.0]]))
        >>> filled[0, 0], bool(filled.isfinite().all())
        (tensor(1.), True)
    """
    check_num_particles(num_particles)
    rows = max(1, 2**22 // (num_particles * max(1, x[:1].numel())))
    with untouched(vae, seed):
        filled = torch.cat([_expected(vae, part, num_particles, sample) for part in x.split(rows)])
    return torch.where(x.isnan(), filled, x)


def _expected(vae: Any, x: Tensor, num_particles: int, sample: bool) -> Tensor:
    """What p(x | z) gives under the weighted draws of z, [B, *E]."""
    terms = draw(vae.model, vae.guide, x, num_particles=num_particles)
    z: Any = terms.guide_trace.nodes["z"]["value"]  # [K, B, D]
    weight = terms.log_w.softmax(0)  # [K, B]
    if num_particles == 1:
        z = z.reshape(1, len(x), -1)
    if sample:
        chosen = torch.multinomial(weight.T, 1).squeeze(1)  # [B]
        return vae.decoder(z[chosen, torch.arange(len(x), device=x.device)]).sample()
    p = elements(vae.decoder(z))
    return _weighted(p.base if isinstance(p, WithMissing) else p, weight)


def _weighted(p: Any, weight: Tensor) -> Tensor:
    """The mean under the weights [K, B]; of categories the most probable one."""
    if hasattr(p, "parts"):
        return p._together([_weighted(part, weight) for part in p.parts])
    values = p.probs if isinstance(p, Categories) else p.mean
    mean = (weight.reshape(*weight.shape, *[1] * (values.dim() - 2)) * values).sum(0)
    return mean.argmax(-1).to(mean.dtype) if isinstance(p, Categories) else mean
