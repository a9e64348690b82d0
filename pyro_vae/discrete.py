r"""Discrete codes: encoders q(z | x) whose z is one of C classes or a vector of bits, and what replaces ``rsample``.

A discrete draw has no derivative. Three ways around it, each with the member that it needs:

- Sum over all values: ``fit(objective=pyro.infer.TraceEnum_ELBO())`` with :class:`OneHotCategorical` or
  :class:`Bernoulli`. Value and gradient are exact; the decoder runs once for each value of z.
- Differentiate the probability of the draw instead (score function): ``pyro.infer.TraceGraph_ELBO()`` with the same
  two. Unbiased, noisy, any number of values.
- Relax z to a point of the simplex: :class:`RelaxedOneHotCategorical`, a true bound of a model whose prior is relaxed
  too; or :class:`StraightThrough`, the discrete model's bound with a gradient that is biased.
"""

from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.contracts import Distribution, Encoder
from pyro_vae.relaxed_priors import check_temperature, concrete
from pyro_vae.supports import plain_support

MOST_VALUES = 4096
"""How many values of z are summed over at most: 12 bits."""

_NO_SHAPE = torch.Size()


class OneHotCategorical(Encoder):
    r"""One of C classes, as a vector with a single 1.

    .. math:: q(z = e_c \mid x) = \mathrm{softmax}(\mathrm{net}(x))_c

    Train it with ``pyro.infer.TraceEnum_ELBO`` (exact) or ``TraceGraph_ELBO`` (score function); its partner is
    ``priors.OneHotCategorical``. Reached as ``discrete.OneHotCategorical``.

    Args:
        net: x [*batch, *E] -> [*batch, C].

    Returns:
        A distribution with batch shape ``batch`` and event shape (C,), enumerable, without ``rsample``.

    Source: the definition; exact sums over a discrete z inside a VAE: Kingma et al. (2014), Semi-supervised learning
        with deep generative models, arXiv:1406.5298.

    Example:
        >>> from pyro_vae import Mlp, discrete
        >>> q = discrete.OneHotCategorical(Mlp(7, 16, 3))(torch.zeros(5, 7))
        >>> q.event_shape, q.enumerate_support(expand=False).shape
        (torch.Size([3]), torch.Size([3, 1, 3]))
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """C."""
        return latent_dim

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        return _OneHot(logits=self.net(x))


class Bernoulli(Encoder):
    r"""Independent bits.

    .. math:: q(z \mid x) = \prod_d \pi_d^{z_d} (1 - \pi_d)^{1 - z_d}, \qquad \pi = \sigma(\mathrm{net}(x))

    Train it with ``pyro.infer.TraceGraph_ELBO``, or, up to 12 bits, exactly with ``TraceEnum_ELBO``: the vector is one
    site with 2^D values. Its partner is ``priors.Bernoulli``. Reached as ``discrete.Bernoulli``.

    Args:
        net: x [*batch, *E] -> [*batch, D].

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), enumerable up to 12 bits, without ``rsample``.

    Raises:
        ValueError: it is enumerated with more than 12 bits.

    Source: the definition.

    Example:
        >>> from pyro_vae import Mlp, discrete
        >>> q = discrete.Bernoulli(Mlp(7, 16, 3))(torch.zeros(5, 7))
        >>> q.event_shape, q.enumerate_support(expand=False).shape
        (torch.Size([3]), torch.Size([8, 1, 3]))
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """D."""
        return latent_dim

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        return _Bits(dist.Bernoulli(logits=self.net(x)), 1)


class RelaxedOneHotCategorical(Encoder):
    r"""The Concrete or Gumbel-softmax distribution: one of C classes, relaxed to a point of the simplex.

    .. math:: z = \mathrm{softmax}((h + g) / \tau), \qquad h = \mathrm{net}(x), \quad g_c \sim \mathrm{Gumbel}

    Scored by the density of the relaxation, so with a prior of the same kind (``RelaxedOneHotCategorical`` of
    ``relaxed_priors``, or a Dirichlet) every objective is a true bound on log p(x) of the *relaxed* model. That is
    another model than the discrete one, and so are its nats. h is squashed where draws could underflow.
    Reached as ``discrete.RelaxedOneHotCategorical``.

    Args:
        net: x [*batch, *E] -> [*batch, C].
        temperature: the temperature tau; low is nearly discrete, with gradients of high variance.

    Returns:
        A distribution with batch shape ``batch`` and event shape (C,), with ``rsample``; its ``mean`` is approximate.

    Raises:
        ValueError: temperature <= 0, or (when called) one whose draws would underflow.

    Source: Maddison, Mnih, Teh (2017), The Concrete distribution, arXiv:1611.00712; Jang, Gu, Poole (2017),
        Categorical reparameterization with Gumbel-softmax, arXiv:1611.01144.

    Example:
        >>> from pyro_vae import Mlp, discrete
        >>> z = discrete.RelaxedOneHotCategorical(Mlp(7, 16, 3))(torch.zeros(5, 7)).rsample()
        >>> z.shape, z.requires_grad
        (torch.Size([5, 3]), True)
    """

    def __init__(self, net: nn.Module, temperature: float = 0.5):
        super().__init__()
        check_temperature(temperature)
        self.net, self.temperature = net, temperature

    def extra_repr(self) -> str:
        """Show the temperature."""
        return f"temperature={self.temperature}"

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """C."""
        return latent_dim

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        return concrete(self.net(x), self.temperature)


class StraightThrough(Encoder):
    r"""One of C classes, with a gradient borrowed from the relaxation: **biased**.

    .. math:: z = e_{\arg\max_c (h_c + g_c)}, \qquad \frac{\partial z}{\partial h} := \frac{\partial}{\partial h}
        \mathrm{softmax}((h + g) / \tau), \qquad h = \mathrm{net}(x)

    Forward it is :class:`OneHotCategorical` to the last bit: the same draws' distribution, the same log q, so every
    value is an unbiased estimate of the *discrete* model's bound. Backward it is not: the gradient is that of another
    function, wrong by an amount that falls with the temperature while its variance grows, and
    ``testing.check_encoder`` says so. Its partner is ``priors.OneHotCategorical``. A prior with learned probabilities
    gives z no gradient (it looks the class up), which adds to the bias.

    Args:
        net: x [*batch, *E] -> [*batch, C].
        temperature: the temperature tau of the backward pass.

    Returns:
        A distribution with batch shape ``batch`` and event shape (C,), with an ``rsample``; not enumerable.

    Raises:
        ValueError: temperature <= 0.

    Source: Bengio, Léonard, Courville (2013), Estimating or propagating gradients through stochastic neurons,
        arXiv:1308.3432; Jang, Gu, Poole (2017), section 2.2, arXiv:1611.01144.

    Example:
        >>> from pyro_vae import Mlp
        >>> z = StraightThrough(Mlp(7, 16, 3))(torch.zeros(5, 7)).rsample()
        >>> z.sum(-1), z.requires_grad
        (tensor([1., 1., 1., 1., 1.], grad_fn=<SumBackward1>), True)
    """

    def __init__(self, net: nn.Module, temperature: float = 0.5):
        super().__init__()
        check_temperature(temperature)
        self.net, self.temperature = net, temperature

    def extra_repr(self) -> str:
        """Show the temperature."""
        return f"temperature={self.temperature}"

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """C."""
        return latent_dim

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        q = _StraightThrough(logits=self.net(x))
        q.temperature = self.temperature
        return q


class _OneHot(dist.OneHotCategorical):
    """Torch's, drawn without ``one_hot``: that looks at the values, which a captured step cannot."""

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        with torch.no_grad():
            index = self._categorical.sample(torch.Size(sample_shape))
        return _one_hot(index, self.probs)


class _StraightThrough(_OneHot):
    """Draws by the Gumbel-max trick, differentiated as the softmax; scored linearly in z, so that z has a gradient."""

    has_rsample = True
    has_enumerate_support = False  # TraceEnum_ELBO leaves the probabilities of sites with rsample out of its sums
    temperature: float

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_StraightThrough":
        new = super().expand(batch_shape, _instance)
        new.temperature = self.temperature
        return new

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        noise = torch.rand(self._extended_shape(torch.Size(sample_shape)), dtype=self.logits.dtype, device=self._device)
        info = torch.finfo(noise.dtype)
        gumbel = -(-noise.clamp(info.tiny, 1 - info.eps).log()).log()
        soft = ((self.logits + gumbel) / self.temperature).softmax(-1)
        hard = _one_hot((self.logits + gumbel).argmax(-1), soft)
        return hard + (soft - soft.detach())  # the bracket is 0 exactly: z stays one-hot to the last bit

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (self.logits * value).sum(-1)

    @property
    def _device(self) -> torch.device:
        return self.logits.device


class _Bits(dist.Independent):
    """Independent bits as one enumerable site, which torch's Independent is not."""

    has_enumerate_support = True

    @property
    def mode(self) -> Tensor:
        """The most probable code; torch's is nan where a bit is even."""
        return (self.base_dist.logits > 0).to(self.base_dist.logits)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = all_values(self)
        values = values.reshape(len(values), *[1] * len(self.batch_shape), *self.event_shape)
        return values.expand(-1, *self.batch_shape, -1) if expand else values


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    zeros = torch.zeros(*index.shape, like.shape[-1], dtype=like.dtype, device=like.device)
    return zeros.scatter(-1, index.unsqueeze(-1), 1.0)


def all_values(d: Distribution) -> Tensor:
    """All values of a discrete code.

    Args:
        d: a distribution over one-hot vectors or bits, event shape (D,).

    Returns:
        [S, D]: the D one-hot vectors, or the 2^D vectors of bits in binary order.

    Raises:
        ValueError: z is neither, or has more than 4096 values.

    Example:
        >>> all_values(dist.Bernoulli(torch.zeros(2)).to_event(1))
        tensor([[0., 0.],
                [0., 1.],
                [1., 0.],
                [1., 1.]])
    """
    support = plain_support(d)
    is_bits, is_one_hot = support is constraints.boolean, support is constraints.one_hot
    if not (is_bits or is_one_hot) or len(d.event_shape) != 1:
        raise ValueError(
            f"expected z to be a one-hot vector or a vector of bits, found {type(d).__name__} over {support}: values "
            "of another kind cannot be listed; estimate log p(x) with log_evidence."
        )
    (dim,) = d.event_shape
    if dim > MOST_VALUES or (is_bits and 2**dim > MOST_VALUES):
        found = f"2^{dim}" if is_bits else f"{dim}"
        raise ValueError(
            f"expected at most {MOST_VALUES} values of z to sum over, found {found}: lower latent_dim, or draw instead "
            "(train with pyro.infer.TraceGraph_ELBO, estimate log p(x) with log_evidence)."
        )
    like = d.mean
    if is_one_hot:
        return torch.eye(dim, dtype=like.dtype, device=like.device)
    places = torch.arange(dim - 1, -1, -1, device=like.device)
    return (torch.arange(2**dim, device=like.device).unsqueeze(-1) >> places & 1).to(like.dtype)


def is_enumerated(trace: Trace) -> bool:
    """Whether a sample site of the trace holds all its values instead of a draw."""
    return any("_enumerate_dim" in site["infer"] for site in _sites(trace))


def _sites(trace: Trace) -> list[Any]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def enumerated_terms(model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
    r"""The terms of the ELBO where the guide's discrete sites were enumerated: exact expectations over them.

    .. math:: \sum_z q(z|x) \log p(x \mid z), \qquad \sum_z q(z|x) \log p(z), \qquad \sum_z q(z|x) \log q(z \mid x)

    Args:
        model_trace: a trace of the model, the one that ``TraceEnum_ELBO`` made, subsample sites pruned.
        guide_trace: that of the guide.

    Returns:
        Three scalars, each summed over the examples with their scale, nats.

    Raises:
        ValueError: a site was enumerated in the model alone, or the sites are not all in the same plates.
    """
    of_model, of_guide = _sites(model_trace), _sites(guide_trace)
    plates = {frozenset(f for f in s["cond_indep_stack"] if f.vectorized) for s in [*of_model, *of_guide]}
    summed_out = [s["name"] for s in of_model if "_enumerate_dim" in s["infer"] and s["name"] not in guide_trace]
    if len(plates) != 1 or summed_out:
        raise ValueError(
            f"expected all sites in the same plates and enumerated in the guide, found {len(plates)} sets of plates, "
            f"{summed_out} enumerated in the model alone: read the objective instead of its terms."
        )
    particles = [frame.size for frame in next(iter(plates)) if frame.name == "num_particles_vectorized"]
    log_q = sum(s["fn"].log_prob(s["value"]) for s in of_guide if "_enumerate_dim" in s["infer"])
    weight = torch.as_tensor(log_q).exp() / (particles[0] if particles else 1)

    def expected(sites: list[Any]) -> Tensor:
        log_probs = [scale_and_mask(s["fn"].log_prob(s["value"]), s["scale"], s["mask"]) for s in sites]
        return torch.stack([(weight * log_prob).sum() for log_prob in log_probs]).sum()

    observed = [site for site in of_model if site["is_observed"]]
    latent = [site for site in of_model if not site["is_observed"]]
    return expected(observed), expected(latent), expected(of_guide)
