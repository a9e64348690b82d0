"""The variational autoencoder as two short Pyro programs. Start here."""

import pyro
from torch import Tensor, nn

from pyro_vae.contracts import DecoderLike, Distribution, EncoderLike, PriorLike
from pyro_vae.supports import code


class VAE(nn.Module):
    r"""A variational autoencoder: the model p(x, z) = p(z) p(x | z) and the guide q(z | x).

    .. math:: \log p(x) \ge \mathrm{ELBO}(x) = \mathbb E_{q(z|x)} [\log p(x, z) - \log q(z \mid x)]

    ``model`` and ``guide`` are plain Pyro programs: train them with ``pyro.infer.SVI`` and any objective
    of ``pyro.infer``, or with :func:`pyro_vae.fit`. Each term is swapped by passing another callable.

    Args:
        prior: p(z), a callable without arguments that returns a distribution.
        decoder: p(x | z), a callable z -> distribution over x.
        encoder: q(z | x), a callable x -> distribution over z.
        name: prefix of the parameters in Pyro's parameter store.

    Source: Kingma, Welling (2014), Auto-Encoding Variational Bayes, arXiv:1312.6114.

    Example:
        >>> import torch
        >>> from pyro_vae import Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(
        ...     prior=StandardNormal(2),
        ...     decoder=Decoder(Mlp(2, 16, 7), Bernoulli()),
        ...     encoder=DiagonalNormal(Mlp(7, 16, 2 * 2)),
        ... )
        >>> vae.reconstruct(torch.ones(5, 7)).shape, vae.sample(3).shape
        (torch.Size([5, 7]), torch.Size([3, 7]))
    """

    def __init__(self, prior: PriorLike, decoder: DecoderLike, encoder: EncoderLike, name: str = "vae"):
        super().__init__()
        self.prior, self.decoder, self.encoder, self.name = prior, decoder, encoder, name

    def model(self, x: Tensor) -> Tensor:
        """p(x, z): draw z from the prior, score x [B, *E] under the decoder."""
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())  # log p(z)
            return pyro.sample("x", self.decoder(z), obs=x)  # log p(x | z)

    def guide(self, x: Tensor) -> Tensor:
        """q(z | x): draw z [B, D] from the encoder."""
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.encoder(x))  # log q(z | x)

    def encode(self, x: Tensor) -> Distribution:
        """The approximate posterior q(z | x) of x [B, *E]; ``.mean`` is the code, ``.sample()`` a draw."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Distribution:
        """The distribution p(x | z) of z [*batch, D]; ``.mean`` is what pictures show. Decoding draws nothing."""
        return self.decoder(z)

    def reconstruct(self, x: Tensor, sample: bool = False) -> Tensor:
        """The mean of p(x | z) at the posterior mean (the most probable z where it is discrete), or at a posterior draw
        (``sample``), [B, *E]."""
        q = self.encode(x)
        return self.decode(q.sample() if sample else code(q)).mean

    def sample(self, num_samples: int) -> Tensor:
        """Draws from p(x): z from the prior, then x from the decoder, [num_samples, *E]."""
        return self.decode(self.prior().sample((num_samples,))).sample()

    def _register(self) -> None:
        """``pyro.module(self.name, self)``, made safe for several VAEs of one name.

        Pyro keeps the parameter that first took a name, so a second VAE of that name would silently never train.
        Here the VAE in use takes the name over; optimisers hold on to the tensors themselves, so all of them train.
        """
        store = pyro.get_param_store()
        for name, parameter in self.named_parameters():
            full_name = f"{self.name}$$${name}"
            if full_name in store and store[full_name] is not parameter:
                del store[full_name]
        trainable = all(parameter.requires_grad for parameter in self.parameters())
        if trainable:
            pyro.module(self.name, self)
        else:  # pyro.module warns about each frozen parameter; freezing is not a mistake
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    pyro.param(f"{self.name}$$${name}", parameter)
