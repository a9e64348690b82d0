"""Decoders p(x | z): a network followed by a likelihood. Any callable ``z -> Distribution`` will do as well."""

from torch import Tensor, nn

from pyro_vae.contracts import Distribution, Likelihood, LikelihoodLike, mean_and_scale
from pyro_vae.initialization import set_output_bias


class Decoder(nn.Module):
    r"""The decoder p(x | z): the likelihood of what the network makes of z.

    .. math:: p(x \mid z) = \mathrm{likelihood}(x; h), \qquad h = \mathrm{net}(z)

    Args:
        net: z [*batch, D] -> h [*batch, num_outputs * E[0], *E[1:]].
        likelihood: h -> distribution over x [*batch, *E].

    Example:
        >>> import torch
        >>> from pyro_vae import Bernoulli, Mlp
        >>> Decoder(Mlp(2, 16, 7), Bernoulli())(torch.zeros(3, 5, 2)).batch_shape
        torch.Size([3, 5])
    """

    def __init__(self, net: nn.Module, likelihood: LikelihoodLike):
        super().__init__()
        self.net, self.likelihood = net, likelihood

    def forward(self, z: Tensor) -> Distribution:
        """The distribution p(x | z)."""
        return self.likelihood(self.net(z))

    def start_at_data(self, x: Tensor) -> None:
        """Set the bias of the last layer so that p(x | z) starts with the data's mean (and scale); NaN is left out.

        Without it, importance-weighted results on MNIST end about one nat worse.

        Args:
            x: training data, [N, *E].

        Raises:
            ValueError: the likelihood cannot say which output has a given mean, or the network's last layer has no
                bias of the right size.

        Source: the code of Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519.
        """
        bias = self._bias_at(x)
        if bias is None:
            raise ValueError(
                f"{type(self.likelihood).__name__} has no output_bias(mean, scale), expected one to start at the "
                "data's mean: add it, or skip start_at_data."
            )
        set_output_bias(self.net, bias)

    def _bias_at(self, x: Tensor) -> Tensor | None:
        if isinstance(self.likelihood, Likelihood):
            try:
                return self.likelihood.bias_at(x)
            except NotImplementedError:
                return None
        output_bias = getattr(self.likelihood, "output_bias", None)  # a likelihood of your own need not be derived
        return None if output_bias is None else output_bias(*mean_and_scale(x))
