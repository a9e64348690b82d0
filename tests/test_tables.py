"""Tables: each column its own likelihood, scored against the columns one by one; what the encoder reads."""

import math

import pytest
import torch
from torch import nn

from pyro_vae import VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, counts, fit, likelihoods
from pyro_vae.supports import check_support
from pyro_vae.tables import Categories, ColumnInputs, Columns, MixedColumns, Nominal
from pyro_vae.testing import check_likelihood

K, B, C = 3, 5, 6


def columns():
    return [
        likelihoods.HeteroscedasticNormal(),
        Nominal(4),
        likelihoods.Bernoulli(),
        likelihoods.HeteroscedasticNormal(),
        counts.NegativeBinomial(),
        likelihoods.Normal(0.5),
    ]


WIDTHS = [2, 4, 1, 2, 2, 1]
# The network's output holds the columns kind by kind, and within a kind parameter by parameter.
PLACES = [[0, 2], [4, 5, 6, 7], [8], [1, 3], [9, 10], [11]]


@pytest.mark.parametrize("masked", [False, True])
def test_contract(masked):
    likelihood = MixedColumns([likelihoods.Normal(0.5), Nominal(3), likelihoods.Bernoulli(), counts.Poisson()])
    check_likelihood(likelihoods.Masked(likelihood) if masked else likelihood, 0.7 * torch.randn(B, 6))


def test_contract_finds_columns_that_are_exchanged():
    class Exchanged(MixedColumns):
        def forward(self, h):
            p = super().forward(h)
            inner = p.base_dist
            inner._back = inner._back.flip(0)
            return p

    with pytest.raises(AssertionError):
        check_likelihood(Exchanged([likelihoods.Normal(0.5), Nominal(3)]), torch.randn(B, 4))


def test_every_column_is_scored_by_its_own_likelihood(float64):
    each = columns()
    likelihood = MixedColumns(each).double()
    assert likelihood.output_shape((C,)) == (sum(WIDTHS),)
    h = torch.randn(K, B, sum(WIDTHS))
    p = likelihood(h)
    x = p.sample()
    assert (p.batch_shape, p.event_shape, x.shape) == ((K, B), (C,), (K, B, C))
    one_by_one = [each[i](h[..., PLACES[i]]).log_prob(x[..., i : i + 1]) for i in range(C)]
    torch.testing.assert_close(p.base_dist.log_prob(x), torch.stack(one_by_one, -1))
    torch.testing.assert_close(p.log_prob(x), sum(one_by_one))
    for i in range(C):
        torch.testing.assert_close(p.mean[..., i], each[i](h[..., PLACES[i]]).mean[..., 0])
    assert p.expand((2, K, B)).log_prob(x).shape == (2, K, B)


def test_columns_of_one_kind_share_a_likelihood_and_those_with_a_scale_keep_it():
    likelihood = MixedColumns([likelihoods.Normal(0.5), likelihoods.Normal(0.5), *columns()])
    assert likelihood.groups == [[0], [1], [2, 5], [3], [4], [6], [7]]
    assert len(list(likelihood.parameters())) == 3
    assert [type(one) for one in likelihood.columns()[2:]] == [type(one) for one in columns()]


def test_a_start_at_the_data_is_that_of_each_column(float64):
    likelihood = MixedColumns(columns())
    with torch.no_grad():
        x = likelihood(torch.randn(1, sum(WIDTHS)).expand(4000, -1)).sample()
    x[torch.rand_like(x) < 0.2] = math.nan
    p = likelihood(likelihood.bias_at(x).unsqueeze(0))
    for i in (0, 2, 3, 4, 5):
        torch.testing.assert_close(p.mean[0, i], x[:, i].nanmean(), rtol=1e-3, atol=1e-3)
    frequencies = torch.stack([(x[:, 1] == level).sum() + 1 for level in range(4)]).double()
    torch.testing.assert_close(p.base_dist.parts[1].probs[0, 0], frequencies / frequencies.sum())


@pytest.mark.parametrize("likelihood", [MixedColumns(columns()), Nominal(4)], ids=["MixedColumns", "Nominal"])
def test_missing_numbers_count_for_nothing_exactly(float64, likelihood):
    likelihood = likelihood.double()
    h = torch.randn(B, likelihood.output_shape((C,))[0], requires_grad=True)
    full = likelihood(h).sample()
    x = full.clone()
    x[1, 2], x[2], x[3, 1], x[4, 0] = math.nan, math.nan, math.nan, math.nan
    log_p = likelihoods.Masked(likelihood)(h).log_prob(x)
    single = likelihood(h).base_dist.log_prob(full)
    torch.testing.assert_close(log_p, torch.where(x.isnan(), 0.0, single).sum(-1))
    assert log_p[2] == 0
    (gradient,) = torch.autograd.grad(log_p.sum(), h)
    assert gradient.isfinite().all() and bool((gradient[2] == 0).all())
    if isinstance(likelihood, MixedColumns):
        for row, column in ((1, 2), (3, 1), (4, 0)):
            assert bool((gradient[row, PLACES[column]] == 0).all()), column
        assert bool((gradient[0] != 0).all())


def test_training_on_gaps_moves_everything_and_reads_the_gaps():
    likelihood = MixedColumns(columns())
    with torch.no_grad():
        x = likelihood(torch.randn(60, sum(WIDTHS))).sample()
    x[torch.rand_like(x) < 0.3] = math.nan
    masked = likelihoods.Masked(likelihood)
    inputs = ColumnInputs(masked, x, append_gaps=True)
    encoder = DiagonalNormal(nn.Sequential(inputs, Mlp(inputs.num_inputs, 8, 4)))
    vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, sum(WIDTHS)), masked), encoder)
    vae.decoder.start_at_data(x)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    history = fit(vae, x, x_valid=x, epochs=2, batch_size=16, lr=0.01)
    assert all(math.isfinite(value) for value in [*history["elbo"], *history["valid_elbo"]])
    assert not [name for name, value in vae.named_parameters() if torch.equal(value, before[name])]


def test_column_inputs_by_hand(float64):
    likelihood = MixedColumns([likelihoods.Normal(), Nominal(3), counts.Poisson()])
    x = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, math.e - 1], [math.nan, math.nan, math.nan]])
    read = ColumnInputs(likelihoods.Masked(likelihood), x, append_gaps=True)
    s, t = math.sqrt(2), math.sqrt(0.5)
    expected = [
        [-1 / s, -0.5 / t, 0, 0, 0, 0, 1],
        [1 / s, 0.5 / t, 0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
    ]
    torch.testing.assert_close(read(x), torch.tensor(expected))
    assert read(x.expand(K, 3, 3)).shape == (K, 3, read.num_inputs)
    raw = ColumnInputs(likelihood, x, standardize=False)
    torch.testing.assert_close(raw(x)[1], torch.tensor([3.0, 1.0, 1.0, 0.0, 0.0]))
    assert "levels={1: 3}" in repr(raw)


def test_a_category_has_a_mode_and_no_variance():
    p = Nominal(3)(torch.tensor([[0.0, 2.0, 1.0]]))
    assert p.mean.item() == 1 and isinstance(p.base_dist, Categories)
    with pytest.raises(NotImplementedError):
        _ = p.variance


def test_support_names_the_column():
    p = MixedColumns(columns())(torch.zeros(B, sum(WIDTHS)))
    x = p.sample()
    check_support(p, x)
    wrong = x.clone()
    wrong[2, 1] = 4.0
    with pytest.raises(
        ValueError, match=r"x has values outside the integers 0..3 in column 1 \(found 4\): give counts"
    ):
        check_support(p, wrong)
    wrong = x.clone()
    wrong[2, 2] = 0.37
    masked = likelihoods.Masked(MixedColumns(columns()))(torch.zeros(B, sum(WIDTHS)))
    with pytest.raises(ValueError, match=r"outside \{0, 1\} or NaN in column 2 \(found 0.37\)"):
        check_support(masked, wrong)
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixedColumns([]), "expected a likelihood for each column, found none"),
        (lambda: MixedColumns([likelihoods.Normal(event_dim=3)]), "expected for column 0 a likelihood of one number"),
        (lambda: MixedColumns([likelihoods.Masked(likelihoods.Normal())]), r"Masked\(MixedColumns\(\[...\]\)\)"),
        (lambda: MixedColumns(columns())(torch.zeros(B, 7)), "expected 12 outputs of the network, found 7"),
        (lambda: MixedColumns(columns()).output_shape((4,)), "expected rows of 6 columns, found examples of shape"),
        (lambda: MixedColumns([counts.Multinomial(3)])(torch.zeros(B, 1)), "found Multinomial, which is joint"),
        (lambda: Nominal(1), "expected num_levels >= 2, found 1"),
        (lambda: Nominal(3)(torch.zeros(B, 4)), "Nominal expected 3 E outputs of the network, found 4 on axis -1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_columns_alone():
    p = Columns([torch.distributions.Normal(torch.zeros(B, 2), 1.0)], [[1, 0]])
    assert p.log_prob(torch.zeros(K, B, 2)).shape == (K, B, 2)
