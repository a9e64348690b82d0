"""The posts' losses: as printed, and exactly the model that each is said to belong to, in values and gradients."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae import ELBO, IWAE, VAE, Beta, Decoder, DiagonalNormal, FullNormal, Mlp, StandardNormal, fit, likelihoods
from pyro_vae.objectives import Objective
from pyro_vae.printed_loss import PrintedLoss
from pyro_vae.wrong_losses import (
    LOSSES,
    AveragedKL,
    EntropyDropped,
    GreyCrossEntropy,
    HalvedCrossEntropy,
    LostHalf,
    MeanSquares,
    SummedSquares,
    SwappedCrossEntropy,
    conventions,
)

B, D, E, K = 5, 2, 7, 3
EVERY = [*(loss() for loss in LOSSES), SummedSquares(1.7, 0.3), SummedSquares(1.0, 0.0), SummedSquares(0.0, 1.0)]

pytestmark = pytest.mark.usefixtures("float64")


def make_vae(latent_dim=D, data_dim=E, scale=0.6):
    net = nn.Sequential(Mlp(latent_dim, 6, data_dim), nn.Sigmoid())  # the mean of p(x|z) lies in (0, 1)
    decoder = Decoder(net, likelihoods.Normal(scale, learn_scale=False))
    return VAE(StandardNormal(latent_dim), decoder, DiagonalNormal(Mlp(data_dim, 6, 2 * latent_dim)))


def grey(num=B, data_dim=E, seed=1):
    return 0.02 + 0.96 * torch.rand(num, data_dim, generator=torch.Generator().manual_seed(seed))


def gradients(loss, vae):
    vae.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in vae.named_parameters()}


def assert_same_gradients(first, second, factor=1.0, tolerance=1e-10):
    assert first.keys() == second.keys()
    assert any(g.abs().max() > 1e-6 for g in first.values())
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, factor * second[name], rtol=tolerance, atol=tolerance, msg=name)


# ------------------------------------------------------------------------------------------------- as printed

# The scalars that the posts' programs hand to their optimisers, written from their text: x, x_hat [B, D]; m, s [B, d].


def kvfrans_as_printed(x, x_hat, m, s):
    return ((x - x_hat) ** 2).mean() + 0.5 * (m**2 + s**2 - (s**2).log() - 1).sum()


def kvfrans_simplified(x, x_hat, m, s):
    return ((x - x_hat) ** 2).sum() + 0.5 * (m**2 + s**2).sum()


def dagang_wei(x, x_hat, m, s):
    log_var = (s**2).log()
    reconstruction = ((x - x_hat) ** 2).mean(-1) * x.shape[-1]
    return (reconstruction + -0.5 * (1 + log_var - m**2 - log_var.exp()).mean()).mean()


def avandekleut(x, x_hat, m, s):
    return ((x - x_hat) ** 2).sum() + (s**2 + m**2 - s.log() - 0.5).sum()


def wiseodd(x, x_hat, m, s):
    log_var = 2 * s.log()
    reconstruction = nn.functional.binary_cross_entropy(x_hat, x, reduction="none").sum(1)
    return (reconstruction + 0.5 * (log_var.exp() + m**2 - 1 - log_var).sum(1)).mean()


def wiseodd_swapped(x, x_hat, m, s):
    log_var = 2 * s.log()
    reconstruction = -(x_hat * x.log() + (1 - x_hat) * (1 - x).log()).sum(1)
    return (reconstruction + 0.5 * (log_var.exp() + m**2 - 1 - log_var).sum(1)).mean()


def comp_three(x, x_hat, m, s):
    bce = nn.functional.binary_cross_entropy(x_hat, x, reduction="sum") / len(x)
    return 1.0 * 0.5 * (m**2 + s**2 - 2 * s.log() - 1).sum() / len(x) + 0.5 * bce


def summed(x, x_hat, m, s):
    prior = dist.Normal(torch.zeros_like(m), 1.0)
    return ((x - x_hat) ** 2).sum() + kl_divergence(dist.Normal(m, s), prior).sum()


PRINTED = [  # the loss, the post's scalar, and what the post divides it by
    (SummedSquares(), summed, 1),
    (EntropyDropped(), kvfrans_simplified, 1),
    (MeanSquares(), kvfrans_as_printed, 1),
    (AveragedKL(), dagang_wei, B),
    (LostHalf(), avandekleut, 1),
    (GreyCrossEntropy(), wiseodd, B),
    (HalvedCrossEntropy(), comp_three, B),
    (SwappedCrossEntropy(), wiseodd_swapped, B),
]


def test_every_loss_is_compared_with_its_post():
    assert {type(loss) for loss, _, _ in PRINTED} == set(LOSSES)


@pytest.mark.parametrize(("loss", "printed", "divisor"), PRINTED, ids=lambda v: type(v).__name__)
def test_the_loss_is_what_the_post_prints(loss, printed, divisor):
    vae, x = make_vae(), grey()
    torch.manual_seed(3)
    ours = loss.differentiable_loss(vae.model, vae.guide, x)
    torch.manual_seed(3)
    q = vae.encoder(x)
    z = q.rsample()
    posts = printed(x, vae.decoder(z).mean, q.base_dist.loc, q.base_dist.scale)
    torch.testing.assert_close(ours, divisor * posts, rtol=1e-12, atol=1e-12)
    assert_same_gradients(gradients(ours, vae), gradients(posts, vae), factor=divisor)


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_particles_are_averaged(loss):
    vae, x = make_vae(), grey()
    many = type(loss)(**{**vars(loss), "num_particles": K})
    torch.manual_seed(5)
    together = many.bound(vae.model, vae.guide, x)
    torch.manual_seed(5)
    z = vae.encoder(x).rsample((K,))
    q = vae.encoder(x).base_dist
    x_weight, z_weight = loss.weights(B, E, D)
    expected = x_weight * loss.distance(x, vae.decoder(z).mean).sum(-1).mean(0)
    expected = expected + z_weight * loss.latent_loss(q.loc, q.scale).sum(-1)
    assert together.shape == (B,)
    torch.testing.assert_close(together, -expected, rtol=1e-12, atol=1e-12)


def test_particles_in_a_loop_are_all_counted():
    vae, x = make_vae(), grey()
    looped = AveragedKL(num_particles=K, vectorize_particles=False)
    torch.manual_seed(5)
    together = looped.bound(vae.model, vae.guide, x)
    torch.manual_seed(5)
    one_by_one = torch.stack([AveragedKL().bound(vae.model, vae.guide, x) for _ in range(K)])
    torch.testing.assert_close(together, one_by_one.mean(0), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------- what it really optimises


def equal_to_its_equivalent(loss, vae, x, beta=None, seed=7):
    model, guide, factor, constant = loss.equivalent(vae, x, beta)
    pyro.set_rng_seed(seed)
    printed = loss.differentiable_loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(seed)
    pyros = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
    torch.testing.assert_close(printed, factor * pyros - len(x) * constant, rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients(printed, vae), gradients(pyros, vae), factor)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_the_equivalent_model_has_the_same_values_and_gradients(loss, seed):
    """Against Pyro's engine: its mean-field ELBO of a model with that prior, that likelihood and that beta."""
    torch.manual_seed(seed)
    equal_to_its_equivalent(loss, make_vae(), grey(seed=seed), seed=seed)


@pytest.mark.parametrize("seed", range(5))
def test_weights_beta_and_the_variance_are_one_knob(seed):
    torch.manual_seed(seed)
    x_weight, z_weight, beta = torch.empty(3).exponential_().add(0.05).tolist()
    loss, vae, x = SummedSquares(x_weight, z_weight), make_vae(), grey()
    equal_to_its_equivalent(loss, vae, x, beta)
    assert loss.effective_beta(B, E, D) == pytest.approx(z_weight / x_weight)

    # The same by hand: this library's VAE with that sigma; log-densities written out, the KL from torch.
    scale = math.sqrt(z_weight / (2 * beta * x_weight))
    torch.manual_seed(1)
    q = vae.encoder(x)
    log_px = torch.distributions.Normal(vae.decoder(q.rsample()).mean, scale).log_prob(x).sum(-1)
    kl = kl_divergence(q.base_dist, torch.distributions.Normal(torch.zeros(D), 1.0)).sum(-1)
    constant = E * (math.log(scale) + 0.5 * math.log(2 * math.pi))
    torch.manual_seed(1)
    printed = loss.bound(vae.model, vae.guide, x)
    torch.testing.assert_close(printed, (z_weight / beta) * (log_px - beta * kl + constant), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("latent_dim", [1, 2, 5, 10])
def test_averaging_the_kl_is_beta_one_over_d(latent_dim):
    loss, vae, x = AveragedKL(), make_vae(latent_dim), grey()
    right, kl_only = SummedSquares(), SummedSquares(0.0, 1.0)
    torch.manual_seed(0)
    wrong_part = gradients(loss.loss_of(right.draw(vae.model, vae.guide, x)), vae)
    torch.manual_seed(0)
    x_part = gradients(SummedSquares(1.0, 0.0).loss_of(right.draw(vae.model, vae.guide, x)), vae)
    z_part = gradients(kl_only.loss_of(right.draw(vae.model, vae.guide, x)), vae)
    ratio = {name: x_part[name] + z_part[name] / latent_dim for name in x_part}
    assert_same_gradients(wrong_part, ratio)
    assert loss.effective_beta(B, E, latent_dim) == pytest.approx(1 / latent_dim)
    assert loss.implied_scale(B, E, latent_dim) ** 2 == pytest.approx(1 / (2 * latent_dim))


def test_the_table_of_conventions():
    """Values worked out by hand for 100 images of 784 pixels and two latent dimensions."""
    beta = {type(loss).__name__: loss.effective_beta(100, 784, 2) for loss in (family() for family in LOSSES)}
    assert beta == pytest.approx(
        {
            "SummedSquares": 1,
            "EntropyDropped": 1,
            "MeanSquares": 78_400,
            "AveragedKL": 0.5,
            "LostHalf": 1,
            "GreyCrossEntropy": 1,
            "HalvedCrossEntropy": 2,
            "SwappedCrossEntropy": 1,
        }
    )
    assert MeanSquares().implied_scale(100, 784, 2) ** 2 == pytest.approx(39_200)
    assert SummedSquares().implied_scale(100, 784, 2) ** 2 == pytest.approx(0.5)
    assert math.isnan(GreyCrossEntropy().implied_scale(100, 784, 2))
    assert LostHalf.prior_scale**2 == pytest.approx(0.5)
    table = conventions(100, 784, 2).splitlines()
    assert len(table) == 1 + len(LOSSES)
    assert [line.split()[0] for line in table[1:]] == [family.__name__ for family in LOSSES]
    assert "N(0, 0.5 I)" in next(line for line in table if line.startswith("LostHalf"))


def latent_curve(loss, loc=0.3):
    scale = torch.linspace(0.02, 3.0, 500).requires_grad_()
    m = torch.full_like(scale, loc)
    value = loss.latent_loss(m, scale)
    return m, scale, value, torch.autograd.grad(value.sum(), scale)[0]


def test_without_its_entropy_the_latent_loss_is_a_cross_entropy_with_minimum_at_no_noise():
    m, s, value, slope = latent_curve(EntropyDropped())
    q, p = torch.distributions.Normal(m, s), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(value, kl_divergence(q, p) + q.entropy() - 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(slope, s)  # not s - 1 / s: no minimum above 0
    _, s, _, right = latent_curve(SummedSquares())
    torch.testing.assert_close(right, s - 1 / s)


def test_losing_a_half_changes_the_prior():
    m, s, value, _ = latent_curve(LostHalf())
    narrow = torch.distributions.Normal(0.0, math.sqrt(0.5))
    torch.testing.assert_close(value, kl_divergence(torch.distributions.Normal(m, s), narrow) + 0.5 * math.log(2))


@pytest.mark.parametrize(
    ("loss", "best", "lowest"),
    [(SummedSquares(), 1.0, 0.0), (LostHalf(), 0.7071, 0.3466), (EntropyDropped(), 0.0, 0.0)],
    ids=lambda v: type(v).__name__,
)
def test_where_the_latent_loss_alone_leads(loss, best, lowest):
    loc, scale = torch.tensor(0.8, requires_grad=True), torch.tensor(1.4, requires_grad=True)
    optimizer = torch.optim.Adam([loc, scale], lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        value = loss.latent_loss(loc, scale)
        value.backward()
        optimizer.step()
        with torch.no_grad():
            scale.clamp_(min=1e-6)
    assert (loc.item(), scale.item()) == pytest.approx((0.0, best), abs=1e-4)
    assert value.item() == pytest.approx(lowest, abs=5e-5)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_cross_entropies_of_grey_pixels_are_no_densities(p):
    x, p = torch.linspace(0, 1, 20_001), torch.tensor(p)
    inner = x[1:-1]
    grey_mass = torch.trapezoid((-GreyCrossEntropy.distance(x, p)).exp(), x)
    odds = (1 - 2 * p).abs()
    expected = 0.5 if odds < 1e-9 else (odds / (2 * torch.atanh(odds))).item()  # one over the constant C(p)
    assert grey_mass.item() == pytest.approx(expected, rel=1e-6)
    assert grey_mass < 0.9
    swapped_mass = torch.trapezoid((-SwappedCrossEntropy.distance(inner, p)).exp(), inner)
    constant = (torch.lgamma(1 + p) + torch.lgamma(2 - p)).exp() / 2
    assert swapped_mass.item() == pytest.approx(constant.item(), rel=1e-4)  # a cusp at either end
    assert swapped_mass < 0.6


def test_grey_cross_entropy_is_the_expected_score_of_bits():
    x, p = grey(3), torch.full((3, E), 0.3)
    bits = [torch.distributions.Bernoulli(p).log_prob(torch.full_like(p, b)) for b in (0.0, 1.0)]
    torch.testing.assert_close(-GreyCrossEntropy.distance(x, p), (1 - x) * bits[0] + x * bits[1])
    best = GreyCrossEntropy.distance(x, x).sum(-1)  # a perfect reconstruction still costs the pixels' entropy
    torch.testing.assert_close(best, torch.distributions.Bernoulli(x).entropy().sum(-1))


def test_swapped_arguments_are_linear_in_the_prediction():
    x = torch.tensor([0.0, 0.2, 0.49, 0.51, 0.8, 1.0]).expand(4, 6)
    x_hat = torch.rand(4, 6).requires_grad_()
    (slope,) = torch.autograd.grad(SwappedCrossEntropy.distance(x, x_hat).sum(), x_hat)
    torch.testing.assert_close(slope, -x.clamp(1e-7, 1 - 1e-7).logit())  # the same whatever is predicted
    assert (slope[:, :3] > 0).all() and (slope[:, 3:] < 0).all()
    assert not torch.allclose(SwappedCrossEntropy.distance(x, x_hat), GreyCrossEntropy.distance(x, x_hat))


def test_on_bits_the_cross_entropy_is_the_elbo():
    """Nothing is wrong with it there: the printed loss, a Bernoulli decoder's ELBO and Pyro's own agree."""
    x = grey().round()
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, 6, E), likelihoods.Bernoulli()), DiagonalNormal(Mlp(E, 6, 2 * D)))
    for loss, factor, weight in ((GreyCrossEntropy(), 1.0, 1.0), (HalvedCrossEntropy(), 0.5, 2.0)):
        torch.manual_seed(2)
        printed = loss.bound(vae.model, vae.guide, x)
        torch.manual_seed(2)
        q = vae.encoder(x)
        log_px = vae.decoder(q.rsample()).log_prob(x)
        kl = kl_divergence(q.base_dist, torch.distributions.Normal(torch.zeros(D), 1.0)).sum(-1)
        torch.testing.assert_close(printed, factor * (log_px - weight * kl), rtol=1e-9, atol=1e-9)


def test_without_noise_the_simplified_loss_is_an_autoencoders():
    """At s -> 0 it is minus log p(x, z) at the code: a point-mass guide, which has no entropy either."""
    vae, x = make_vae(scale=math.sqrt(0.5)), grey()

    class Code(nn.Module):
        def forward(self, x):
            return dist.Delta(vae.encoder(x).mean).to_event(1)

    class Narrow(nn.Module):
        def forward(self, x):
            return dist.Normal(vae.encoder(x).mean, 1e-7).to_event(1)

    autoencoder = VAE(vae.prior, vae.decoder, Code(), name="autoencoder")
    at_code = ELBO().bound(autoencoder.model, autoencoder.guide, x)
    noiseless = VAE(vae.prior, vae.decoder, Narrow(), name="noiseless")
    printed = EntropyDropped().bound(noiseless.model, noiseless.guide, x)
    constant = 0.5 * E * math.log(math.pi) + 0.5 * D * math.log(2 * math.pi)
    torch.testing.assert_close(printed, at_code + constant, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------- trained, and refused


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_a_printed_loss_goes_wherever_objectives_go(loss):
    torch.set_default_dtype(torch.float32)
    x = grey(40).float()
    assert isinstance(loss, Objective) and not loss.is_bound and not loss.is_tight
    assert loss.post and loss.formula and loss.wrong and loss.really
    history = fit(make_vae(), x, objective=loss, epochs=2, batch_size=16)
    assert math.isfinite(history["objective"][-1]) and math.isfinite(history["elbo"][-1])
    vae = make_vae()
    before = [p.detach().clone() for p in vae.parameters()]
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
    assert math.isfinite(svi.step(x))
    assert any(not torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))


def test_the_equivalent_trains_the_same_parameters():
    """One step of Pyro's SVI on the equivalent is one step on the printed loss: Adam does not see the factor."""
    steps = []
    for as_printed in (True, False):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae, x, loss = make_vae(), grey(), MeanSquares()
        model, guide, factor, _ = loss.equivalent(vae, x)
        adam = pyro.optim.Adam({"lr": 0.01, "eps": 1e-30})
        svi = SVI(vae.model, vae.guide, adam, loss) if as_printed else SVI(model, guide, adam, TraceMeanField_ELBO())
        for _ in range(3):
            svi.step(x)
        steps.append([p.detach().clone() for p in vae.parameters()])
    assert factor == pytest.approx(1 / (B * E))
    for first, second in zip(*steps, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-8)


def test_mean_squares_with_a_sum_of_kl_makes_all_reconstructions_alike():
    torch.manual_seed(0)
    x = torch.cat([grey(40) * 0.1, 0.9 + grey(40) * 0.1])  # two kinds of x that the right loss keeps apart
    kept = {}
    for loss in (MeanSquares(), SummedSquares(10.0, 1.0)):
        torch.manual_seed(0)
        vae = make_vae()
        fit(vae, x, objective=loss, epochs=120, batch_size=80, lr=0.03)
        with torch.no_grad():
            q = vae.encoder(x).base_dist
            kl = SummedSquares.latent_loss(q.loc, q.scale).sum(-1).mean().item()
            x_hat = vae.reconstruct(x)
        kept[type(loss)] = kl, (x_hat.amax(0) - x_hat.amin(0)).max().item(), (x_hat - x.mean(0)).abs().max().item()
    kl, spread, off_mean = kept[MeanSquares]
    assert kl < 0.01 and spread < 0.02 and off_mean < 0.1
    kl, spread, _ = kept[SummedSquares]
    assert kl > 0.5 and spread > 0.3


def test_refusals():
    vae, x = make_vae(), grey()
    with pytest.raises(ValueError, match=r"expected weights >= 0, one of them > 0, found x_weight=0\.0, z_weight=0\.0"):
        SummedSquares(0.0, 0.0)
    full = VAE(vae.prior, vae.decoder, FullNormal(Mlp(E, 6, FullNormal.num_outputs(D))))
    with pytest.raises(ValueError, match="expected a guide with a diagonal normal, found MultivariateNormal"):
        AveragedKL().bound(full.model, full.guide, x)

    def two_sites(x):
        vae.model(x)
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match=r"expected one observed site, found \['x', 'y'\]"):
        AveragedKL().bound(two_sites, vae.guide, x)
    for loss, beta in ((GreyCrossEntropy(), 2.0), (SummedSquares(1.0, 0.0), 2.0), (AveragedKL(), -1.0)):
        with pytest.raises(ValueError, match="expected no beta of your own"):
            loss.equivalent(vae, x, beta)


def test_right_objectives_are_not_among_them():
    assert not any(isinstance(objective, PrintedLoss) for objective in (ELBO(), IWAE(), Beta()))
