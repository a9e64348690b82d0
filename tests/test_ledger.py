"""The ledger: each term of each site right, its two errors told apart, by formula only where that is true."""

import copy
import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Estimate, Mlp, StandardNormal, elbo_terms, encoders
from pyro_vae import ledger as top_level
from pyro_vae.exact import LinearGaussian
from pyro_vae.ledger import Ledger, ledger

K, B, D, E = 3, 5, 2, 7


@pytest.fixture(autouse=True)
def double_precision(float64):
    """Numbers are compared, so they are doubles."""


def linear_gaussian():
    weight = torch.tensor([[1.0, 0.2, -0.5, 0.8, 0.0, 0.3, -0.2], [0.3, -0.7, 0.4, 0.5, 0.6, 0.0, 0.1]]).T
    return LinearGaussian(weight, torch.linspace(-1, 1, E), 0.7)


def data(rows, seed=1):
    return torch.randn(rows, E, generator=torch.Generator().manual_seed(seed))


def loose_vae():
    """The best diagonal guide, moved: a gap, a KL with a formula, an ELBO in closed form."""
    vae = linear_gaussian().as_vae(diagonal=True)
    vae.encoder.net.bias.data[:D] += 0.4
    return vae


def within(estimate, exact, errors=4.0):
    return bool(((estimate.values - exact).abs() <= errors * estimate.errors + 1e-12).all())


# ------------------------------------------------------------------------------------------------------ a VAE


def test_each_term_of_a_vae_is_the_closed_form():
    lg, vae, x = linear_gaussian(), loose_vae(), data(B)
    table = ledger(vae, x, num_particles=4000)
    with torch.no_grad():
        q = vae.encoder(x)
        s = q.variance
        kl = 0.5 * (s + q.mean**2 - 1 - s.log()).sum(-1)
        elbo = lg.elbo(x, q.mean, torch.diag_embed(s))
        log_pz = -0.5 * (D * math.log(2 * math.pi) + (q.mean**2 + s).sum(-1))
    torch.testing.assert_close(table["kl_analytic", "z"].values, kl, rtol=0, atol=1e-12)
    assert float(table["kl_analytic", "z"].errors.max()) < 1e-12
    for key, exact in {
        ("kl_sampled", "z"): kl,
        ("log_px", "x"): elbo + kl,
        ("log_pz", "z"): log_pz,
        ("log_qz", "z"): -q.entropy().detach(),
        "reconstruction": elbo + kl,
        "elbo": elbo,
        "elbo_analytic": elbo,
    }.items():
        assert within(table[key], exact), key
        assert float(table[key].errors.min()) > 1e-4, key
    assert float(table["elbo_analytic"].errors.max()) != float(table["elbo"].errors.max())


def test_it_agrees_with_the_estimates_at_one_seed():
    vae, x = loose_vae(), data(B)
    table, terms = ledger(vae, x, num_particles=K, seed=4), elbo_terms(vae, x, K, seed=4)
    for key, other in {"elbo": "elbo", "reconstruction": "log_px", ("kl_sampled", "z"): "kl"}.items():
        torch.testing.assert_close(table[key].values, terms[other].values, rtol=0, atol=1e-12)
        torch.testing.assert_close(table[key].errors, terms[other].errors, rtol=1e-6, atol=1e-10)


def test_passes_of_bounded_memory_add_up():
    """Any cut into passes gives the moments of all K draws: here they are drawn again and averaged in one piece."""
    vae, x, drawn = loose_vae(), data(B), []
    guide = vae.guide

    class Recorded(VAE):
        def guide(self, x):
            z = guide(x)
            drawn.append(z.reshape(-1, len(x), D))
            return z

    vae.__class__ = Recorded
    table = ledger(vae, x, num_particles=40, max_elements=4 * E)
    assert len(drawn) > 9
    sizes = {len(z) for z in drawn}
    assert sizes != {40}
    rows, values = 0, []
    while drawn:  # the passes of some examples follow each other until all 40 draws are there
        part = drawn.pop(0)
        while len(part) < 40:
            part = torch.cat([part, drawn.pop(0)])
        with torch.no_grad():
            values.append(vae.decoder(part).log_prob(x[rows : rows + part.shape[1]]))
        rows += part.shape[1]
    values = torch.cat(values, 1)
    torch.testing.assert_close(table["log_px", "x"].values, values.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(table["log_px", "x"].errors, values.std(0) / math.sqrt(40), rtol=1e-9, atol=0)


def test_monte_carlo_and_data_errors_are_told_apart():
    vae, x = loose_vae(), data(50)
    few, many = (ledger(vae, x, num_particles=k)["elbo"] for k in (10, 1000))
    assert few.monte_carlo_error / many.monte_carlo_error == pytest.approx(10, rel=0.3)
    assert few.data_error == pytest.approx(many.data_error, rel=0.15)
    seeds = torch.stack([ledger(vae, x, num_particles=10, seed=s)["elbo"].values.mean() for s in range(60)])
    assert seeds.std().item() == pytest.approx(few.monte_carlo_error, rel=0.4)


# ----------------------------------------------------------------------------- any model, any guide, by name


def two_layers(order=("z2", "z1"), mask=None, scale=1.0):
    """A model z2 -> z1 -> (x, y), and a guide that draws in either order."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=scale):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2[..., :D], 0.5).to_event(1))
            with poutine.mask(mask=True if mask is None else mask):
                pyro.sample("x", dist.Normal(z1, 0.8).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(z1.sum(-1), 0.3), obs=x[..., 0])

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=scale):
            z = {}
            for name in order:
                loc = sum((value.sum(-1, keepdim=True) for value in z.values()), 0.3 * x[..., :1])
                z[name] = pyro.sample(
                    name, dist.Normal(loc.expand(*loc.shape[:-1], 3 if name == "z2" else D), 0.7).to_event(1)
                )

    return model, guide


def test_every_site_by_name_adds_up_to_pyros_elbo():
    model, guide = two_layers()
    x = data(B)[:, :D]
    table = ledger((model, guide), x, num_particles=2000, seed=3)
    assert [row.name for row in table.rows if row.site] == [
        *("log p(x|z2,z1)", "log p(y|z2,z1)", "log p(z2)", "log p(z1|z2)", "log q(z2|x,y)", "log q(z1|z2,x,y)"),
        *("KL(z2) analytic", "KL(z2) sampled", "KL(z1) analytic", "KL(z1) sampled"),
    ]
    parts = {key: table[key].values for key in [(row.kind, row.site) for row in table.rows if row.estimate]}
    signs = {"log_px": 1, "log_pz": 1, "log_qz": -1}
    total = sum(signs[kind] * value for (kind, site), value in parts.items() if site and kind in signs)
    torch.testing.assert_close(total, table["elbo"].values, rtol=0, atol=1e-10)
    torch.testing.assert_close(parts["log_px", "x"] + parts["log_px", "y"], table["reconstruction"].values)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pyros = -Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x)
    assert table["elbo"].values.sum().item() == pytest.approx(pyros, abs=1e-8)
    for name in ("z1", "z2"):
        analytic, sampled = table["kl_analytic", name], table["kl_sampled", name]
        assert ((analytic.values - sampled.values).abs() < 4 * sampled.errors).all()
    assert float(table["kl_analytic", "z1"].errors.min()) > 0  # it depends on the draw of z2


def test_a_formula_that_would_be_wrong_is_not_shown():
    """The guide draws z1 first: KL(q(z1|x) || p(z1|z2)) at later draws of z2 averages to another number."""
    model, guide = two_layers(order=("z1", "z2"))
    table = ledger((model, guide), data(B)[:, :D], num_particles=K)
    with pytest.raises(KeyError, match="torch has no formula"):
        table["kl_analytic", "z1"]
    with pytest.raises(KeyError, match="torch has no formula"):
        table["elbo_analytic"]
    assert table["kl_analytic", "z2"].num_examples == B
    assert str(table).count("not available") == 3


def test_a_kl_that_torch_does_not_know_is_not_available():
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, 8, E), Bernoulli()), encoders.MixtureOfNormals(Mlp(E, 8, 15), 3))
    table = ledger(vae, (data(B) > 0).double(), num_particles=K)
    row = next(row for row in table.rows if row.kind == "kl_analytic")
    assert row.estimate is None and row.to_dict(per_example=True)["values"] is None
    assert table["kl_sampled", "z"].num_examples == B


def test_masks_scales_subsampled_plates_and_loops_leave_the_values_per_example():
    x = data(B)[:, :D]
    there = torch.tensor([True, False, True, True, False])
    plain, masked = (ledger(two_layers(mask=m), x, num_particles=K) for m in (None, there))
    expected = torch.where(there, plain["log_px", "x"].values, 0.0)
    torch.testing.assert_close(masked["log_px", "x"].values, expected, rtol=0, atol=1e-12)
    scaled = ledger(two_layers(scale=7.0), x, num_particles=K)
    for row, other in zip(plain.rows, scaled.rows, strict=True):
        torch.testing.assert_close(row.estimate.values, other.estimate.values, rtol=0, atol=1e-10)

    def model(x):
        with pyro.plate("data", len(x), subsample_size=2, dim=-1) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(D), 1e-9).to_event(1))

    for vectorize in (True, False):
        table = ledger((model, guide), x, num_particles=K, vectorize_particles=vectorize)
        exact = dist.Normal(torch.zeros(D), 1.0).to_event(1).log_prob(x)
        assert table.num_examples == 2  # and no value is scaled by 5 / 2
        assert all(bool(torch.isclose(exact, v, atol=1e-6).any()) for v in table["log_px", "x"].values)


def test_a_kl_under_annealing_by_poutine_has_no_formula():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    table = ledger((model, guide), data(B)[:, :D], num_particles=K)
    assert next(row for row in table.rows if row.kind == "kl_analytic").estimate is None


# -------------------------------------------------------------------------------------------- nothing changes


class Counting(nn.Module):
    """Batch normalisation and dropout: in training mode both would show, and the first would move."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(E, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2 * D))

    def forward(self, x):
        return self.net(x)


def test_nothing_is_trained_moved_or_drawn_from_outside():
    net = Counting().train()
    decoder = nn.Linear(D, E)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), pyro.param("scale", torch.tensor(0.7))).to_event(1), obs=x)

    def guide(x):
        loc, log_scale = net(x).chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    first, second = (ledger((model, guide), data(B), num_particles=K) for _ in range(2))
    assert str(first) == str(second)
    assert torch.equal(state, torch.get_rng_state()) and net.training and net.net[1].training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not list(pyro.get_param_store().keys())
    assert not first["elbo"].values.requires_grad


def test_a_bound_program_brings_its_module():
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, 8, E), Bernoulli()), DiagonalNormal(Counting())).train()
    x = (data(B) > 0).double()
    tables = [ledger(owner, x, num_particles=K) for owner in (vae, (vae.model, vae.guide))]
    torch.testing.assert_close(tables[0]["elbo"].values, tables[1]["elbo"].values)
    assert all(part.training for part in vae.modules())


# ---------------------------------------------------------------------------------------- reading and refusals


def test_it_reads_and_writes():
    vae, x = loose_vae(), data(B)
    table = ledger(vae, x, num_particles=K, policy="grey")
    text = str(table)
    assert repr(table) == text and isinstance(table, Ledger) and top_level is ledger
    assert text.splitlines()[0].split() == [
        "nats",
        "per",
        "example",
        "mean",
        "±",
        "standard",
        "error",
        "Monte-Carlo",
        "data",
    ]
    assert text.splitlines()[-1] == "K=3 draws of z for each of n=5 examples"
    assert {len(line) for line in text.splitlines()[:-1]} == {len(text.splitlines()[0])}
    dictionary = json.loads(json.dumps(table.to_dict(per_example=True), allow_nan=False))
    by_kind = {(row["kind"], row["site"]): row for row in dictionary["rows"]}
    assert by_kind["elbo", ""]["values"] == table["elbo"].values.tolist()
    assert by_kind["elbo", ""]["monte_carlo_error"] == table["elbo"].monte_carlo_error
    assert isinstance(table["elbo"], Estimate) and table["elbo"].policy == "grey"
    one = table.example(-1)
    assert one.num_examples == 1 and one["elbo"].mean == table["elbo"].values[-1].item()
    assert one.to_dict()["rows"][0]["data_error"] in (None, 0.0)
    with pytest.raises(IndexError, match="expected an index below 5, found 5"):
        table.example(B)
    with pytest.raises(KeyError, match="no term 'elbow': choose one of"):
        table["elbow"]
    json.dumps(ledger(vae, x[:1], num_particles=1).to_dict(), allow_nan=False)


def test_a_point_mass_is_called_so():
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, 8, E), Bernoulli()), encoders.Delta(Mlp(E, 8, D)))
    table = ledger(vae, (data(B) > 0).double(), num_particles=K)
    assert "no bound" in str(table)
    assert next(row for row in table.rows if row.kind == "kl_analytic").estimate is None


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ledger(linear_gaussian(), data(B)), TypeError, "expected a VAE or a pair"),
        (lambda: ledger((loose_vae().model,), data(B)), TypeError, "expected a VAE or a pair"),
        (lambda: ledger(loose_vae(), data(B), num_particles=0), ValueError, "num_particles to be an integer >= 1"),
        (lambda: ledger(loose_vae(), data(0)), ValueError, "expected at least one example"),
        (lambda: ledger((two_layers()[0], loose_vae().guide), data(B)), ValueError, "guide site for each latent site"),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
