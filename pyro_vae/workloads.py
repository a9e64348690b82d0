"""What the benchmark trains, and the ways to train it: one model of each size, written once for each way."""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyro.infer
import pyro.optim
import torch
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor, nn

from pyro_vae.compiling import CompiledStep
from pyro_vae.decoders import Decoder
from pyro_vae.encoders import DiagonalNormal
from pyro_vae.fast_svi import FastSVI
from pyro_vae.networks import ConvPair, MlpPair, NetworkPair
from pyro_vae.objectives import ELBO, IWAE
from pyro_vae.optimizers import Adam
from pyro_vae.priors import StandardNormal
from pyro_vae.programs import Programs, way_of
from pyro_vae.proportions import Bernoulli
from pyro_vae.vae import VAE

Run = Callable[[int], float]  # takes so many steps; the loss of the last one


@dataclass(frozen=True)
class Workload:
    """A VAE on binary data: sizes as in well-known programs.

    Args:
        networks: encoder and decoder.
        event_shape: shape E of one x.
        latent_dim: number of latent dimensions D.
        batch_size: examples a step, B.
        num_particles: draws of z for each example, K; more than one: the importance-weighted bound.
        origin: where these sizes come from.
    """

    networks: NetworkPair
    event_shape: tuple[int, ...]
    latent_dim: int
    batch_size: int
    num_particles: int = 1
    origin: str = ""

    def make(self) -> tuple[nn.Module, nn.Module]:
        """The encoder's and the decoder's network."""
        encoder = self.networks.encoder(self.event_shape, 2 * self.latent_dim)
        return encoder, self.networks.decoder(self.latent_dim, self.event_shape)

    def draw(self, device: torch.device) -> Tensor:
        """A batch of random bits, [B, *E]."""
        return (torch.rand(self.batch_size, *self.event_shape, device=device) < 0.3).float()

    def describe(self) -> str:
        """Sizes in one line."""
        inputs = "x".join(map(str, self.event_shape))
        if isinstance(self.networks, MlpPair):
            sizes = "-".join([inputs, *map(str, self.networks.hidden)])
        else:
            sizes = f"{inputs} convolutions {'-'.join(map(str, self.networks.channels))}"  # type: ignore[attr-defined]
        particles = f", K={self.num_particles}" if self.num_particles > 1 else ""
        activation = self.networks.activation.__name__  # type: ignore[attr-defined]
        return f"{sizes}-z{self.latent_dim} {activation}, B={self.batch_size}{particles}"


WORKLOADS = {
    "W1": Workload(MlpPair([400], nn.Softplus), (784,), 50, 256, origin="Pyro's example"),
    "W1b": Workload(MlpPair([400], nn.Softplus), (784,), 50, 128, origin="Pyro's example, half the batch"),
    "Wk": Workload(MlpPair([512], nn.ReLU), (784,), 2, 128, origin="Keras tutorials"),
    "Wc": Workload(MlpPair([300, 300], nn.ReLU), (784,), 40, 100, origin="three layers"),
    "Wd": Workload(ConvPair((32, 64), hidden=0), (1, 28, 28), 16, 128, origin="convolutions"),
    "tiny": Workload(MlpPair([8], nn.ReLU), (7,), 2, 32, origin="the smallest"),
    "iwae": Workload(MlpPair([200, 200], nn.Tanh), (784,), 50, 20, 50, origin="Burda et al., K=50"),
}


class HandWritten(nn.Module):
    """The same model without Pyro: the loss of a batch from the densities' formulas, as one would write it in torch."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.num_particles, self.event_dim = workload.num_particles, len(workload.event_shape)
        self.encoder, self.decoder = workload.make()

    def forward(self, x: Tensor) -> Tensor:
        """Minus the bound, summed over the batch."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = torch.randn(self.num_particles, *loc.shape, device=x.device)
        z = loc + log_scale.exp() * noise
        h = self.decoder(z)
        log_px = -nn.functional.binary_cross_entropy_with_logits(h, x.expand_as(h), reduction="none")
        log_px = log_px.flatten(-self.event_dim).sum(-1)
        log_w = log_px + (-0.5 * z.square() + 0.5 * noise.square() + log_scale).sum(-1)  # the constants cancel
        return -(log_w.logsumexp(0) - math.log(self.num_particles)).sum()


def make_vae(workload: Workload, name: str) -> VAE:
    """The same model as two Pyro programs."""
    encoder, decoder = workload.make()
    return VAE(
        StandardNormal(workload.latent_dim),
        Decoder(decoder, Bernoulli(event_dim=len(workload.event_shape))),
        DiagonalNormal(encoder),
        name=name,
    )


def _repeated(step: Callable[[], float]) -> Run:
    def run(count: int) -> float:
        for _ in range(count):
            loss = step()
        return loss

    return run


def _pyro_run(workload: Workload, x: Tensor, name: str, objective: Any, svi_class: Any = SVI) -> Run:
    vae = make_vae(workload, name).to(x.device)
    adam = pyro.optim.Adam({"lr": 1e-3})  # type: ignore[attr-defined]  # made at import
    svi = svi_class(vae.model, vae.guide, adam, objective)
    return _repeated(lambda: svi.step(x))


def _stock(workload: Workload, x: Tensor) -> Run:
    k = workload.num_particles
    many = {"num_particles": k, "vectorize_particles": True, "max_plate_nesting": 1}
    return _pyro_run(workload, x, "stock", Trace_ELBO() if k == 1 else RenyiELBO(alpha=0, **many))


def _jit(workload: Workload, x: Tensor) -> Run:
    if workload.num_particles > 1:
        raise NotImplementedError("Pyro has no compiled importance-weighted bound")
    return _pyro_run(workload, x, "jit", JitTrace_ELBO(ignore_jit_warnings=True))


def _objective(workload: Workload) -> Any:
    return ELBO() if workload.num_particles == 1 else IWAE(num_particles=workload.num_particles)


def _captured(workload: Workload, x: Tensor) -> Run:
    return _pyro_run(workload, x, "captured", _objective(workload), FastSVI)


def _captured_loop(workload: Workload, x: Tensor) -> Run:
    vae = make_vae(workload, "loop").to(x.device)
    svi = FastSVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), _objective(workload))  # type: ignore[attr-defined]
    return lambda count: svi.run(count, x)[-1].item()


def _by_hand(workload: Workload, x: Tensor, mode: str | None = None) -> Run:
    module = HandWritten(workload).to(x.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
    loss_of = module if mode is None else torch.compile(module, fullgraph=True, mode=mode)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        return loss.item()

    return _repeated(step)


def _compiled_by_hand(workload: Workload, x: Tensor) -> Run:
    # With CUDA graphs on a GPU; on a CPU there are none, and this mode is the default one.
    return _by_hand(workload, x, "reduce-overhead" if x.device.type == "cuda" else "default")


def _captured_by_hand(workload: Workload, x: Tensor) -> Run:
    """The capture around the model without Pyro: what Pyro's programs cost once captured."""
    module = HandWritten(workload).to(x.device)
    parameters = list(module.parameters())
    optimizer = Adam(parameters)

    def gradients(x: Tensor) -> Tensor:
        loss = module(x)
        loss.backward()
        return loss.detach()

    way = way_of(x.device, [optimizer])
    backend: Literal["replay", "inductor"] = "replay" if way == "compile" else "inductor"
    captured = CompiledStep(gradients, parameters, module, warm=0, backend=backend, record=way is None)

    def take(x: Tensor) -> Tensor:
        loss = captured(x)
        optimizer.step()
        return loss

    steps = Programs(take, captured, [optimizer], device=x.device, way=way)
    return _repeated(lambda: steps(x).item())


def _numpyro(workload: Workload, x: Tensor) -> Run:
    """NumPyro's own SVI, all steps of a turn in one compiled loop; JAX takes the device that it finds."""
    if not isinstance(workload.networks, MlpPair):
        raise NotImplementedError("convolutions are not written for NumPyro here")
    if importlib.util.find_spec("numpyro") is None:
        raise NotImplementedError("numpyro is not installed")
    jax: Any = importlib.import_module("jax")
    np: Any = importlib.import_module("jax.numpy")
    numpyro: Any = importlib.import_module("numpyro")
    dist: Any = importlib.import_module("numpyro.distributions")
    infer: Any = importlib.import_module("numpyro.infer")
    activation = {nn.Softplus: jax.nn.softplus, nn.ReLU: jax.nn.relu, nn.Tanh: np.tanh}[workload.networks.activation]
    hand = HandWritten(workload)

    def net(name: str, module: nn.Module) -> Callable[[Any], Any]:
        linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
        start = [(layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy().copy()) for layer in linear]

        def apply(h: Any) -> Any:
            for i, (weight, bias) in enumerate(numpyro.param(name, start)):
                h = (h if i == 0 else activation(h)) @ weight + bias
            return h

        return apply

    encode, decode = net("encoder", hand.encoder), net("decoder", hand.decoder)

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(np.zeros(workload.latent_dim), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        loc, log_scale = np.split(encode(x), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, np.exp(log_scale)).to_event(1))

    k = workload.num_particles
    loss = infer.Trace_ELBO() if k == 1 else infer.RenyiELBO(alpha=0, num_particles=k)
    svi = infer.SVI(model, guide, numpyro.optim.Adam(1e-3), loss)
    data = np.asarray(x.cpu().numpy())

    @jax.jit
    def many(state: Any, count: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, carry: svi.update(carry[0], data), (state, np.zeros(())))

    state = svi.init(jax.random.PRNGKey(0), data)

    def run(count: int) -> float:
        nonlocal state
        state, value = many(state, count)
        return float(value)  # waits

    return run


WAYS: dict[str, Callable[[Workload, Tensor], Run]] = {
    "stock SVI": _stock,
    "JitTrace_ELBO": _jit,
    "torch by hand": _by_hand,
    "torch.compile by hand": _compiled_by_hand,
    "NumPyro": _numpyro,
    "FastSVI": _captured,
    "FastSVI.run": _captured_loop,
    "FastSVI without Pyro": _captured_by_hand,
}
