"""Comparisons in the place of a likelihood: distances by hand, gradients, frozen features, and no claim about p(x)."""

import copy
import math

import pytest
import torch
from torch import nn

from pyro_vae import ELBO, VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, elbo_terms, fit, likelihoods, log_evidence
from pyro_vae.comparisons import (
    Comparison,
    Perceptual,
    absolute_error,
    binary_cross_entropy,
    huber,
    squared_error,
    structural_dissimilarity,
)
from pyro_vae.dry_run import check_vae
from pyro_vae.supports import NO_LIKELIHOOD

K, B, D, E = 3, 5, 2, 7
DISTANCES = [squared_error, absolute_error, huber, binary_cross_entropy, structural_dissimilarity]


def make(likelihood):
    torch.manual_seed(3)
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, 8, E), likelihood), DiagonalNormal(Mlp(E, 8, 2 * D)))
    return vae.to(torch.get_default_dtype())


def test_cross_entropy_gives_the_numbers_of_the_bernoulli_likelihood(float64):
    x = (torch.rand(B, E) < 0.4).double()
    values, gradients = [], []
    for likelihood in (likelihoods.Bernoulli(), Comparison(binary_cross_entropy)):
        vae = make(likelihood)
        torch.manual_seed(1)
        bound = ELBO(K).bound(vae.model, vae.guide, x)
        values.append(bound)
        gradients.append(torch.autograd.grad(bound.sum(), list(vae.parameters())))
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-12)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_squared_error_is_a_normal_likelihood_with_variance_one_half_up_to_its_constant(float64):
    x, h = torch.randn(B, E), torch.randn(K, B, E, requires_grad=True)
    score = Comparison(squared_error, bounded=False)(h).log_prob(x)
    normal = likelihoods.Normal(math.sqrt(0.5), learn_scale=False).double()(h).log_prob(x)
    torch.testing.assert_close(score, normal + E / 2 * math.log(math.pi), rtol=0, atol=1e-5)
    ours, theirs = (torch.autograd.grad(v.sum(), h, retain_graph=True)[0] for v in (score, normal))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: d.__name__)
def test_distances_are_one_number_an_example_with_the_right_gradient(float64, distance):
    shape = (B, 2, 9, 8)
    x, x_hat = torch.rand(shape), (0.1 + 0.8 * torch.rand(shape)).requires_grad_()
    found = distance(x, x_hat)
    assert found.shape == (B,) and bool((found > 0).all())
    torch.testing.assert_close(distance(x[2:3], x_hat[2:3]), found[2:3])
    small = x_hat[:2, :1, :5, :4].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: distance(x[:2, :1, :5, :4], y), small)
    if distance is not binary_cross_entropy:
        torch.testing.assert_close(distance(x, x), torch.zeros(B))


def test_simple_distances_by_hand(float64):
    x, x_hat = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[0.05, 0.5, 0.5]])
    assert squared_error(x, x_hat).item() == pytest.approx(0.2525)
    assert absolute_error(x, x_hat).item() == pytest.approx(0.55)
    assert huber(x, x_hat).item() == pytest.approx(0.05**2 / 2 + 0.1 * (0.5 - 0.05))
    expected = -(math.log(0.95) + math.log(0.5) + math.log(0.5))
    assert binary_cross_entropy(x, x_hat).item() == pytest.approx(expected)
    assert binary_cross_entropy(torch.ones(1, 1), torch.zeros(1, 1)).isfinite().all()


def test_structural_similarity_by_loops(float64):
    x, x_hat = torch.rand(1, 1, 13, 12), torch.rand(1, 1, 13, 12)
    window = {(i, j): math.exp(-(i * i + j * j) / (2 * 1.5**2)) for i in range(-5, 6) for j in range(-5, 6)}
    total = sum(window.values())
    values = []
    for row in range(5, 8):
        for column in range(5, 7):
            pairs = [
                (w / total, x[0, 0, row + i, column + j].item(), x_hat[0, 0, row + i, column + j].item())
                for (i, j), w in window.items()
            ]
            m, n = (sum(w * value[k] for w, *value in pairs) for k in (0, 1))
            v, u = sum(w * (a - m) ** 2 for w, a, _ in pairs), sum(w * (b - n) ** 2 for w, _, b in pairs)
            c = sum(w * (a - m) * (b - n) for w, a, b in pairs)
            top = (2 * m * n + 1e-4) * (2 * c + 9e-4)
            values.append(top / ((m * m + n * n + 1e-4) * (v + u + 9e-4)))
    assert len(values) == 3 * 2
    assert structural_dissimilarity(x, x_hat).item() == pytest.approx(1 - sum(values) / 6, abs=1e-12)
    with pytest.raises(ValueError, match=r"expected pictures \[B, C, H, W\], found shape \(5, 7\)"):
        structural_dissimilarity(torch.zeros(B, E), torch.zeros(B, E))


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(E, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).to(torch.get_default_dtype())


def test_perceptual_distance_by_hand_and_its_zero(float64):
    net = network().eval()
    distance = Perceptual(net, layers=["3", "0"], weights=[0.5, 2.0])
    x, x_hat = torch.rand(B, E), torch.rand(B, E)
    expected = 0.5 * ((net(x) - net(x_hat)) ** 2).sum(1) + 2 * ((net[0](x) - net[0](x_hat)) ** 2).sum(1)
    torch.testing.assert_close(distance(x, x_hat), expected)
    torch.testing.assert_close(Perceptual(net)(x, x_hat), ((net(x) - net(x_hat)) ** 2).sum(1))
    blind = torch.linalg.svd(net[0].weight).Vh[6:]  # what the first layer cannot see
    assert squared_error(x, x + blind[0]).min() > 0.9
    torch.testing.assert_close(distance(x, x + blind[0]), torch.zeros(B))  # zero iff the features are equal
    assert bool((distance(x, x_hat) > 0).all())
    assert torch.autograd.gradcheck(lambda y: distance(x, y), x_hat.requires_grad_())
    assert net[0].weight.requires_grad and "layers=['3', '0']" in repr(distance)


def test_the_network_of_features_is_frozen():
    likelihood = Comparison(Perceptual(network(), layers=["1", "3"]), weight=10.0)
    vae = make(likelihood)
    frozen = copy.deepcopy(likelihood.distance.network.state_dict())
    before = {name: value.detach().clone() for name, value in vae.named_parameters() if value.requires_grad}
    x = torch.rand(40, E)
    history = fit(vae, x, epochs=3, batch_size=16, lr=0.01)
    assert history["objective"][-1] > history["objective"][0]
    for name, value in likelihood.distance.network.state_dict().items():  # batch statistics too
        assert torch.equal(value, frozen[name]), name
    assert not [name for name, value in before.items() if torch.equal(dict(vae.named_parameters())[name], value)]
    assert any("distance.network" in name for name in vae.state_dict())  # saved with the model
    vae.train()
    assert not likelihood.distance.network.training and likelihood.distance.training


def test_a_distance_of_your_own_and_one_that_forgets_to_be_one_number_an_example():
    def mine(x, x_hat):
        return (x - x_hat).abs().amax(1)

    x = torch.rand(B, E)
    p = Comparison(mine, weight=2.0)(torch.zeros(K, B, E))
    torch.testing.assert_close(p.log_prob(x), (-2 * (x - 0.5).abs().amax(1)).expand(K, B))
    with pytest.raises(ValueError, match=r"the distance gave shape \(\), expected \(15,\).*sum over all axes but"):
        Comparison(lambda x, x_hat: ((x - x_hat) ** 2).mean())(torch.zeros(K, B, E)).log_prob(x)


def test_shapes_expansion_mean_and_refusals():
    p = Comparison(squared_error, event_dim=3)(torch.zeros(K, B, 2, 4, 3))
    assert (p.batch_shape, p.event_shape) == ((K, B), (2, 4, 3)) and bool((p.mean == 0.5).all())
    assert p.expand((2, K, B)).log_prob(torch.zeros(B, 2, 4, 3)).shape == (2, K, B)
    with pytest.raises(NotImplementedError, match="expected a likelihood to draw from, found a comparison"):
        p.sample()
    with pytest.raises(ValueError, match="expected weight > 0, found 0"):
        Comparison(weight=0.0)
    with pytest.raises(ValueError, match=r"expected names of the network's layers, found \['9'\]: it has 0, 1, 2, 3"):
        Perceptual(network(), layers=["9"])
    with pytest.raises(ValueError, match="expected 1 weights, found 2"):
        Perceptual(network(), weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="found Comparison, which looks at all of x at once"):
        likelihoods.Masked(Comparison())
    with pytest.raises(ValueError, match=r"x has values outside \[0, 1\] \(found 255\): rescale it"):
        check_vae(make(Comparison()), torch.full((B, E), 255.0))
    assert repr(Comparison(huber)) == "Comparison(distance=huber, weight=1.0, bounded=True, event_dim=1)"


def test_no_evidence_is_claimed():
    vae, x = make(Comparison()), torch.rand(B, E)
    with pytest.raises(ValueError, match=f"found a score in the place of p.x . z. .{NO_LIKELIHOOD}.: use elbo_terms"):
        log_evidence(vae, x, 10)
    terms = elbo_terms(vae, x, K)
    for name in ("elbo", "log_px"):
        assert NO_LIKELIHOOD in str(terms[name]) and terms[name].summary()["caveat"] == NO_LIKELIHOOD
        assert "ELBO" not in terms[name].name and terms[name].name != "log p(x|z)"
    assert NO_LIKELIHOOD not in str(terms["kl"])
    assert "caveat" not in elbo_terms(make(likelihoods.Normal()), x, K)["elbo"].summary()


def test_start_at_the_data():
    x = 0.2 + 0.6 * torch.rand(40, E)
    for bounded in (True, False):
        decoder = make(Comparison(bounded=bounded)).decoder
        decoder.start_at_data(x)
        with torch.no_grad():
            decoder.net[-1].weight.zero_()
        torch.testing.assert_close(decoder(torch.zeros(1, D)).mean[0], x.mean(0), rtol=1e-4, atol=1e-4)
