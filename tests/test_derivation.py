"""The derivation: every line right in exact worlds and on VAEs, wrong where something is wrong, and fit to be shown."""

import copy
import dataclasses
import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vae import (
    VAE,
    Bernoulli,
    Decoder,
    DiagonalNormal,
    FullNormal,
    MixtureOfNormals,
    Mlp,
    StandardNormal,
    derivation,
    discrete,
    encoders,
    likelihoods,
    priors,
)
from pyro_vae.cli import main
from pyro_vae.derivation_report import formula, page, picture, write_derivation
from pyro_vae.derivation_steps import STEPS, Line, kl_of_log_variance
from pyro_vae.exact import LinearGaussian, log_evidence_by_quadrature
from pyro_vae.plot_style import GREEN, VERMILION
from pyro_vae.trained_worlds import of_vae
from pyro_vae.worlds import World, finite, linear_gaussian

K, B, D, E = 3, 5, 2, 7
KEYS = [f"D{i}" for i in range(1, 10)] + ["D9b"] + [f"D{i}" for i in range(10, 16)]


@pytest.fixture(autouse=True)
def double_precision(float64):
    """Numbers are compared, so they are doubles."""


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(latent_dim=D, scale=0.7):
    return LinearGaussian(noise(E, latent_dim, seed=3), noise(E, seed=4), scale)


def small_vae(latent_dim=D, prior=None, likelihood=None, **parts):
    """A VAE whose decoder is curved and whose guide is off."""
    likelihood = likelihood or Bernoulli()
    net = Mlp(latent_dim, 8, E * likelihood.num_outputs, activation=nn.Tanh)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    encoder = parts.get("encoder") or DiagonalNormal(Mlp(E, 8, 2 * latent_dim))
    return VAE(prior or StandardNormal(latent_dim), Decoder(net, likelihood), encoder)


def bits(rows=B, seed=2):
    return (noise(rows, E, seed=seed) > 0).double()


# ------------------------------------------------------------------------------------------------ exact worlds


@pytest.mark.parametrize("seed", range(5))
def test_every_line_holds_to_rounding_where_everything_is_exact(seed):
    for world in derivation.exact_worlds(seed):
        result = derivation.evaluate_in(world)
        assert [line.step.key for line in result.lines] == KEYS
        judged = [line for line in result.lines if line.agrees is not None]
        assert len(judged) == (10 if world.z is None else 16)
        assert all(line.agrees for line in judged) and result.agrees
        for line in judged:
            if line.step.relation == "=":
                assert abs(line.difference) < 1e-9, line.step.key
        assert (world.random_gaps >= 0).all() and len(world.random_gaps) == 1000
        assert world.random_gaps.min() > 1e-4  # 1000 random q, none is the posterior ...
        assert world.gap_at_posterior.abs().max() < 1e-12  # ... and there the gap is 0
        gap, error = result.jensen_gap
        assert gap == pytest.approx(world.kl_to_posterior.mean().item(), abs=1e-9) and error == 0


def test_a_full_covariance_has_the_matrix_form_only():
    lg, x = model(), noise(B, E)
    factor = torch.linalg.cholesky(torch.tensor([[0.5, 0.3], [0.3, 0.4]])).expand(B, D, D)
    q = MultivariateNormal(noise(B, D, seed=5), scale_tril=factor)
    result = derivation.evaluate_in(linear_gaussian(lg, x, q))
    verdicts = {line.step.key: line.verdict for line in result.lines}
    assert verdicts["D10"] == verdicts["D15"] == verdicts["D9"] == "agrees"
    assert verdicts["D11"] == verdicts["D12"] == verdicts["D13"] == "does not apply"
    expected = kl_divergence(q, MultivariateNormal(torch.zeros(D), torch.eye(D)).expand([B])).mean()
    assert result.lines[KEYS.index("D10")].right == pytest.approx(expected.item(), abs=1e-12)


def test_elbo_plus_kl_to_the_posterior_does_not_depend_on_q():
    """So for a fixed model, raising the ELBO and lowering that KL are one thing."""
    lg, x, values = model(), noise(B, E), []
    for scale in (0.1, 0.5, 2.0):
        q = dist.Normal(noise(B, D, seed=int(10 * scale)), scale).to_event(1)
        world = linear_gaussian(lg, x, q)
        elbo = (world.weight * (world.log_px + world.log_pz - world.log_qz)).sum(0)
        torch.testing.assert_close(elbo, lg.elbo(x, q.mean, torch.eye(D) * scale**2), rtol=0, atol=1e-10)
        values.append(elbo + world.kl_to_posterior)
    for value in values:
        torch.testing.assert_close(value, lg.log_evidence(x), rtol=0, atol=1e-10)


def test_kl_is_no_distance():
    """Swapped, it is another number; and the detour over a third distribution can be shorter."""
    p, q, r = (torch.tensor(t) for t in ([0.5, 0.5], [0.9, 0.1], [0.99, 0.01]))

    def kl(a, b):
        return (a * (a / b).log()).sum()

    assert abs(kl(p, q) - kl(q, p)) > 0.1
    assert kl(p, r) > kl(p, q) + kl(q, r) + 0.5


def test_the_log_variance_form_is_the_kl_and_does_not_underflow():
    loc = noise(B, D).float()
    for low in (-50.0, -20.0, 0.0, 20.0, 50.0):
        value = kl_of_log_variance(loc, torch.full((B, D), low, dtype=torch.float32))
        exact = kl_divergence(dist.Normal(loc.double(), math.exp(low / 2)), dist.Normal(0.0, 1.0)).sum(-1)
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    tiny = torch.full((B, D), -110.0, dtype=torch.float32)
    assert torch.isinf(0.5 * (tiny.exp() + loc**2 - 1 - tiny.exp().log()).sum(-1)).all()  # as line D12 has it
    assert torch.isfinite(kl_of_log_variance(loc, tiny)).all()


BREAKS = {
    "log_evidence": {"D1", "D4", "D5", "D6", "D7", "D8", "D9"},
    "log_integral": {"D1"},
    "kl_to_posterior": {"D2", "D7", "D8", "D9"},
    "kl_integral": {"D2", "D3"},
    "log_posterior": {"D3", "D4", "D5", "D6"},
    "log_px": {"D4", "D5", "D6", "D7", "D8", "D9"},
    "log_pz": {"D4", "D5", "D6", "D7", "D8"},
    "log_qz": {"D3", "D7", "D8", "D15"},
    "kl_to_prior": {"D9", "D10", "D11"},
    "z": {"D15"},
    "standard": {"D10"},
    "normal": {"D15"},
}


@pytest.mark.parametrize("name", BREAKS)
def test_whatever_is_wrong_is_seen(name):
    """A shift of 1e-6 nats in any one quantity makes exactly the lines disagree that use it."""
    world = linear_gaussian(seed=1)
    value = getattr(world, name)
    wrong = (value[0], value[1] * (1 + 1e-6)) if isinstance(value, tuple) else value + 1e-6
    result = derivation.evaluate_in(dataclasses.replace(world, **{name: wrong}))
    assert {line.step.key for line in result.lines if line.agrees is False} == BREAKS[name]
    assert not result.agrees and "disagree" in result.verdict


@pytest.mark.parametrize(("name", "line"), [("diagonal", "D11"), ("log_evidence", "D9b")])
def test_a_wrong_diagonal_and_a_broken_bound_are_seen(name, line):
    world = linear_gaussian(seed=1)
    loc, scale = world.diagonal
    wrong = {"diagonal": (loc, scale * 1.01), "log_evidence": world.log_evidence - world.kl_to_posterior - 1e-3}[name]
    result = derivation.evaluate_in(dataclasses.replace(world, **{name: wrong}))
    assert line in {each.step.key for each in result.lines if each.agrees is False}


# ------------------------------------------------------------------------------------------------ a VAE of yours


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_the_world_of_a_vae_against_closed_forms(latent_dim):
    lg, x = model(latent_dim), noise(B, E)
    vae = lg.as_vae(diagonal=True)
    vae.encoder.net.bias.data[:latent_dim] += 0.3
    world = of_vae(vae, x, 500)
    with torch.no_grad():
        q = vae.encoder(x)
    posterior = lg.posterior(x)
    torch.testing.assert_close(world.log_evidence, lg.log_evidence(x), rtol=0, atol=1e-8)
    torch.testing.assert_close(world.log_posterior, posterior.log_prob(world.z), rtol=0, atol=1e-8)
    exact = kl_divergence(MultivariateNormal(q.mean, torch.diag_embed(q.variance)), posterior)
    torch.testing.assert_close(world.kl_to_posterior, exact, rtol=0, atol=1e-4)
    error = world.log_integral.std(0) / math.sqrt(len(world.log_integral))
    assert ((world.log_integral.mean(0) - lg.log_evidence(x)).abs() < 4 * error).all() and error.max() < 0.05
    assert world.log_px.shape == (500, B) and world.z.shape == (500, B, latent_dim)
    result = derivation.evaluate_in(world)
    assert all(line.agrees for line in result.lines)


def test_its_standard_errors_are_what_they_say():
    """Over seeds, the differences of the lines that compare two routes scatter as their errors claim, around 0."""
    vae, x = small_vae(), bits()
    scores = {key: [] for key in ("D1", "D3", "D7", "D9")}
    for seed in range(16):
        result = derivation.evaluate(vae, x, 100, seed=seed)
        for line in result.lines:
            if line.step.key in scores:
                scores[line.step.key].append(line.difference / line.difference_error)
    for key, values in scores.items():
        values = torch.tensor(values)
        assert abs(values.mean()) < 1, key
        assert 0.4 < values.std() < 1.7, key


def test_narrow_and_double_peaked_posteriors_are_resolved():
    """Scale 0.02 in x and a decoder even in z: two narrow peaks, which a fixed grid of 401 points misses by nats."""

    class Square(nn.Module):
        def forward(self, z):
            return torch.cat([z**2, z.abs(), 1 - z**2, z**2 / 2, z.abs(), z**2, z**2], -1)

    vae = VAE(
        StandardNormal(1),
        Decoder(Square(), likelihoods.Normal(0.02)),
        DiagonalNormal(nn.Linear(E, 2).requires_grad_(False)),
    )
    x = Square()(torch.tensor([[1.1], [0.4], [1.7]])) + 0.02 * noise(3, E)
    vae.encoder.net.weight.zero_()
    vae.encoder.net.bias.copy_(torch.tensor([1.0, -1.0]))
    world = of_vae(vae, x, 200)
    fine = log_evidence_by_quadrature(vae.prior, vae.decoder, x, limit=3.0, num_points=100_001)
    torch.testing.assert_close(world.log_evidence, fine, rtol=0, atol=1e-4)
    coarse = log_evidence_by_quadrature(vae.prior, vae.decoder, x)
    assert (coarse - fine).abs().max() > 0.02
    assert derivation.evaluate_in(world).agrees


@pytest.mark.parametrize(
    "parts",
    [
        lambda: {"prior": MixtureOfNormals(D, num_components=3)},
        lambda: {"prior": priors.StudentT(D)},
        lambda: {"encoder": FullNormal(Mlp(E, 8, 5))},
        lambda: {"encoder": encoders.MixtureOfNormals(Mlp(E, 8, 15), 3)},
        lambda: {"likelihood": likelihoods.ContinuousBernoulli()},
    ],
    ids=["mixture prior", "heavy tails", "full normal", "mixture posterior", "continuous Bernoulli"],
)
def test_it_holds_for_other_members(parts):
    parts = parts()
    result = derivation.evaluate(small_vae(**parts), bits(), 400)
    assert result.agrees and result.world.log_evidence is not None, str(result)
    verdicts = {line.step.key: line.verdict for line in result.lines}
    assert verdicts["D9"] == "agrees"
    plain = "prior" not in parts and "encoder" not in parts
    assert (verdicts["D13"] == "agrees") == plain
    assert (verdicts["D10"] == "agrees") == (plain or isinstance(parts.get("encoder"), FullNormal))
    assert (verdicts["D15"] == "agrees") == (not isinstance(parts.get("encoder"), encoders.MixtureOfNormals))


def test_a_discrete_z_is_summed():
    vae = VAE(priors.OneHotCategorical(4), Decoder(Mlp(4, 8, E), Bernoulli()), discrete.OneHotCategorical(Mlp(E, 8, 4)))
    x = bits()
    result = derivation.evaluate(vae, x, 20)
    assert result.agrees and "sums over all 4 values" in result.world.note
    states = torch.eye(4)
    with torch.no_grad():
        joint = vae.decoder(states.unsqueeze(1)).log_prob(x).exp() / 4
    torch.testing.assert_close(result.world.log_evidence, joint.sum(0).log(), rtol=0, atol=1e-10)
    assert all(abs(line.difference) < 1e-10 for line in result.lines if line.agrees and line.step.relation == "=")


def test_more_dimensions_are_bracketed_from_below_and_said_so():
    lg, x = model(latent_dim=4), noise(B, E)
    vae = lg.as_vae(diagonal=True)
    result = derivation.evaluate(vae, x, 200)
    verdicts = {line.step.key: line.verdict for line in result.lines}
    assert [key for key in KEYS if verdicts[key] == "open"] == [f"D{i}" for i in range(1, 10)]
    assert "known from below only" in result.world.note and "4 dimensions" in result.world.note
    line = result.lines[KEYS.index("D9")]
    assert line.left is None and line.right == pytest.approx(
        (lg.log_evidence(x).mean() - lg.diagonal_gap()).item(), abs=0.5
    )
    gap, error = result.jensen_gap
    assert gap < lg.diagonal_gap() + 4 * error and gap > 0.3 * lg.diagonal_gap() and error > 0
    assert "at least" in result.summary and result.to_dict()["jensen_gap_is_lower_bound"]
    assert result.agrees  # nothing that can be judged disagrees


def test_a_peak_that_only_the_draws_find_is_resolved():
    """On a plateau 50 nats lower, 0.02 wide: between the points of any first grid, but the guide knows where it is."""
    centre = torch.tensor([0.513, -0.871])

    class Well(nn.Module):
        def forward(self, z):
            depth = 1 - (-((z - centre) ** 2).sum(-1, keepdim=True) / (2 * 0.02**2)).exp()
            return 5 * depth.expand(*z.shape[:-1], E)

    vae = VAE(StandardNormal(D), Decoder(Well(), likelihoods.Normal(1.32)), DiagonalNormal(nn.Linear(E, 2 * D)))
    with torch.no_grad():
        vae.encoder.net.weight.zero_()
        vae.encoder.net.bias.copy_(torch.cat([centre, torch.full((D,), math.log(0.01))]))
    world = of_vae(vae, torch.zeros(1, E), 200)
    line = torch.linspace(-0.2, 0.2, 601)
    with torch.no_grad():
        z = centre + torch.cartesian_prod(line, line)
        joint = vae.decoder(z).log_prob(torch.zeros(E)) + vae.prior().log_prob(z)
    near = joint.logsumexp(0) + 2 * (line[1] - line[0]).log()
    torch.testing.assert_close(world.log_evidence, near.reshape(1), rtol=0, atol=1e-3)


def test_a_posterior_that_is_too_thin_for_a_grid_is_not_trusted_to_one():
    """A ring of width 0.002: the grid and every second line of it disagree, so log p(x) is bracketed instead."""

    class Ring(nn.Module):
        def forward(self, z):
            return z.norm(dim=-1, keepdim=True).expand(*z.shape[:-1], E)

    vae = VAE(StandardNormal(D), Decoder(Ring(), likelihoods.Normal(0.005)), DiagonalNormal(Mlp(E, 8, 2 * D)))
    world = of_vae(vae, torch.full((K, E), 1.2) + 0.005 * noise(K, E), 50)
    assert world.log_evidence is None and "quadrature is off by up to" in world.note


def test_a_model_that_is_not_made_of_its_parts_is_seen():
    """The terms come from the programs, the posterior from prior and decoder: D4 tells if they are not one model."""

    class Other(VAE):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.1).to_event(1))
                pyro.sample("x", self.decoder(z), obs=x)

    vae = small_vae()
    vae.__class__ = Other
    result = derivation.evaluate(vae, bits(), 200)
    assert {"D4", "D5", "D6"} <= {line.step.key for line in result.lines if line.agrees is False}
    assert result.verdict.endswith("of Other disagree")


def test_evaluating_changes_nothing():
    vae, x = small_vae().float().train(), bits().float()
    before, state = copy.deepcopy(vae.state_dict()), torch.get_rng_state()
    first, second = (str(derivation.evaluate(vae, x, 20)) for _ in range(2))
    assert first == second != str(derivation.evaluate(vae, x, 20, seed=1))
    assert torch.equal(state, torch.get_rng_state()) and all(part.training for part in vae.modules())
    for name, value in vae.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name]), name
    assert not list(pyro.get_param_store().keys())


class Score(dist.Normal):
    """Half the squared error: no density."""

    def log_prob(self, value):
        return -0.5 * (value - self.loc) ** 2


def unnormalised(h):
    return Score(h, 0.3).to_event(1)


class Says(likelihoods.Normal):
    is_normalised = False


class Confesses(dist.Normal):
    is_normalised = False


def confessing(h):
    return Confesses(h, 0.3).to_event(1)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: derivation.evaluate(small_vae(), bits(), 1), ValueError, "num_particles >= 2, found 1"),
        (lambda: derivation.evaluate(small_vae(), bits(), 0), ValueError, "num_particles to be an integer >= 1"),
        (lambda: derivation.evaluate(small_vae(), bits(3)[:, :5]), ValueError, "encoder"),
        (lambda: derivation.evaluate(small_vae(), 0.5 * bits()), ValueError, "outside {0, 1}"),
        (lambda: derivation.evaluate(nn.Linear(2, 3), bits()), TypeError, "expected a VAE with model, guide, prior"),
        (
            lambda: derivation.evaluate(small_vae(encoder=encoders.Delta(Mlp(E, 8, D))), bits()),
            ValueError,
            "point mass",
        ),
        (
            lambda: derivation.evaluate(
                VAE(StandardNormal(D), Decoder(Mlp(D, 8, E), unnormalised), DiagonalNormal(Mlp(E, 8, 4))), bits()
            ),
            ValueError,
            r"expected a normalised likelihood, found function \(its total mass is 2.507",
        ),
        (
            lambda: derivation.evaluate(small_vae(likelihood=Says(0.5)), bits()),
            ValueError,
            r"expected a normalised likelihood, found Says \(it says is_normalised = False\)",
        ),
        (
            lambda: derivation.evaluate(
                VAE(StandardNormal(D), Decoder(Mlp(D, 8, E), confessing), DiagonalNormal(Mlp(E, 8, 4))), bits()
            ),
            ValueError,
            r"found function \(it says is_normalised = False\)",
        ),
        (lambda: linear_gaussian(model(3)), ValueError, "at most 2 latent dimensions"),
        (
            lambda: linear_gaussian(q=dist.Laplace(torch.zeros(5, 2), 1.0).to_event(1)),
            ValueError,
            "expected a normal q",
        ),
        (lambda: finite(0), ValueError, "expected num_states >= 1"),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ------------------------------------------------------------------------------------------------ to be shown


def test_the_lines_can_be_read_and_evaluated_one_by_one():
    steps = derivation.lines()
    assert [step.key for step in steps] == KEYS and steps is STEPS
    for step in steps:
        assert step.formula and step.reason.endswith(".") and step.relation in ("=", ">=")
        assert ("≥" in step.formula) == (step.relation == ">=") == (r"\geq" in step.latex)
        assert not step.formula.isascii() or "\\" not in step.formula
    line = steps[0].evaluate(linear_gaussian())
    assert line.agrees and line.verdict == "agrees" and abs(line.left - line.right) < 1e-9
    with pytest.raises(dataclasses.FrozenInstanceError):
        line.left = 0.0


def test_a_side_without_an_error_is_printed_as_exactly_as_the_other_one():
    line = Line(STEPS[6], left=1.23456789, right=1.2, right_error=0.03, difference=0.03456, difference_error=0.03)
    assert derivation.texts(line) == ("1.235", "1.200 ± 0.030", "0.035 ± 0.030")
    exact = Line(STEPS[6], left=1.23456789, right=1.23456789, difference=1e-17, agrees=True)
    assert derivation.texts(exact) == ("1.234568", "1.234568", "1.0e-17")
    assert derivation.texts(Line(STEPS[6], right=2.0)) == ("unknown", "2.000000", "unknown")


def test_text_and_json():
    for world in (*derivation.exact_worlds(), of_vae(small_vae(4), bits(), 20)):
        result = derivation.evaluate_in(world)
        dictionary = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert [line["key"] for line in dictionary["lines"]] == KEYS
        assert dictionary["agrees"] and {line["verdict"] for line in dictionary["lines"]} <= {
            "agrees",
            "open",
            "does not apply",
        }
        text = str(result)
        for step in STEPS:
            assert step.formula in text and step.reason in text
        assert text.splitlines()[-1] == result.summary
        assert "Jensen gap" in result.summary and "KL(q(z|x) || p(z|x))" in result.summary
    assert "left side" not in text and "right side" in text  # unknown on the left only


def shown(ax):
    return [text.get_text() for text in ax.texts]


def test_the_picture_has_every_line_its_numbers_and_its_mark():
    results = [derivation.evaluate_in(world) for world in derivation.exact_worlds()]
    ax = picture(results)
    words = shown(ax)
    for step in STEPS:
        assert f"${step.latex}$" in words and step.reason in words and step.key in words
    assert words.count("✓") == 26 and words.count("does not apply") == 6
    for line in results[1].lines:
        left, right, _ = derivation.texts(line)
        assert left.replace("-", "−") in words and right.replace("-", "−") in words
    assert not ax.axison
    wrong = dataclasses.replace(results[1].world, log_integral=results[1].world.log_integral + 1)
    ax = picture([derivation.evaluate_in(wrong)])
    assert shown(ax).count("✗") == 1 and shown(ax).count("✓") == 15
    colours = {text.get_text(): to_hex(text.get_color()) for text in ax.texts if text.get_text() in "✓✗"}
    assert colours == {"✓": GREEN.lower(), "✗": VERMILION.lower()}


def test_no_two_texts_of_the_picture_overlap():
    results = [derivation.evaluate_in(world) for world in derivation.exact_worlds()]
    small = [derivation.evaluate(small_vae(latent_dim), bits(), 20) for latent_dim in (1, 4)]
    for which in (results, *([result] for result in small)):
        ax = picture(which)
        figure = ax.get_figure()
        figure.canvas.draw()
        boxes = [(text.get_text(), text.get_window_extent()) for text in ax.texts]
        width, height = figure.bbox.size
        for text, box in boxes:
            assert box.x0 > 0 and box.y0 > 0 and box.x1 < width and box.y1 < height, text
        for (a, box), (b, other) in itertools.combinations(boxes, 2):
            x = min(box.x1, other.x1) - max(box.x0, other.x0)
            y = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(x, y) < 3, (a, b)


def test_the_page_is_self_contained_and_reads_aloud(tmp_path):
    results = [derivation.evaluate_in(world) for world in derivation.exact_worlds()]
    text = page(results)
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text
    for step in STEPS:
        label = step.formula.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert f'aria-label="{label}"' in text
    assert text.count("<svg") == len(STEPS) and text.count("✓ agrees") == 26
    paths = write_derivation(results, tmp_path / "new")
    assert [path.name for path in paths] == ["derivation.html", "derivation.png"]
    assert paths[0].read_text(encoding="utf-8") == text
    with Image.open(paths[1]) as image:
        assert min(image.size) > 1500


def test_a_formula_is_a_drawing_within_its_frame():
    svg = ElementTree.fromstring(formula(r"\frac{1}{2} \sum_d s_d^2", "½ Σ s²"))
    assert svg.attrib["aria-label"] == "½ Σ s²"
    x, y, width, height = map(float, svg.attrib["viewBox"].split())
    commands = svg.findall("path")[0].attrib["d"]
    numbers = [float(n) for n in re.sub("[A-Z]", " ", commands).split()]
    xs, ys = numbers[::2], numbers[1::2]
    assert x <= min(xs) and max(xs) <= x + width and y <= min(ys) and max(ys) <= y + height
    assert commands.startswith("M") and commands.count("Z") >= 5
    upright = ElementTree.fromstring(formula("x^2", "x²"))  # all above the baseline, and up is less
    _, y, _, height = map(float, upright.attrib["viewBox"].split())
    numbers = [float(n) for n in re.sub("[A-Z]", " ", upright.findall("path")[0].attrib["d"]).split()]
    assert y <= min(numbers[1::2]) < -5 and max(numbers[1::2]) <= y + height < 3


def test_a_world_of_ones_own_needs_only_what_it_has():
    """Terms alone: the bound is the only line with two known sides if there is a bound on log p(x)."""
    z = torch.zeros(K, B)
    result = derivation.evaluate_in(World("mine", z - 2, z - 1, z - 1, evidence_bound=z[:2] - 1.5))
    assert [line.step.key for line in result.lines if line.agrees is not None] == ["D9b"]
    assert result.agrees and result.jensen_gap == (0.5, 0.0)
    broken = derivation.evaluate_in(World("mine", z - 2, z - 1, z - 1, evidence_bound=z[:2] - 2.5))
    assert not broken.agrees


# ------------------------------------------------------------------------------------------ on the command line


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and captured.err.startswith("pyro-vae: error: ")
    return captured.err


@pytest.fixture
def run(tmp_path):
    torch.set_default_dtype(torch.float32)
    quick = ["--epochs", "1", "--batch_size", "512", "--eval_particles", "3", "--figures", "false"]
    main(["train", "--out", str(tmp_path / "digits"), *quick, "--networks.hidden", "[8]"])
    return tmp_path / "digits"


def test_derive_alone_prints_every_line_and_a_verdict(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # as users have it
    main(["derive"])
    out = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("agrees") for line in out) == 26
    assert out[-1] == "verdict    10 lines of 10 states agree; 16 lines of linear-Gaussian, 2-D agree"
    assert not list(tmp_path.iterdir())
    main(["derive", "--json", "--seed", "3", "--out", "page"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["agrees"] and "wrote" in captured.err
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"derivation.html", "derivation.png"}


def test_derive_says_so_and_fails_if_a_line_disagrees(capsys, monkeypatch):
    world = finite()
    broken = dataclasses.replace(world, log_px=world.log_px + 1e-6)
    monkeypatch.setattr(derivation, "exact_worlds", lambda seed: (broken,))
    with pytest.raises(SystemExit) as stop:
        main(["derive"])
    assert stop.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1] == "verdict    D4, D5, D6, D7, D8, D9 of 10 states disagree"
    with pytest.raises(SystemExit) as stop:
        main(["derive", "--json"])
    assert stop.value.code == 1 and not json.loads(capsys.readouterr().out)["agrees"]


def test_derive_a_run_and_mistakes_about_it(run, capsys, tmp_path):
    model_file = (run / "model.safetensors").read_bytes()
    main(["derive", str(run), "--num_particles", "50", "--num_examples", "3"])
    out = capsys.readouterr().out
    assert "verdict    16 lines of digits agree" in out and "n=3 examples" in out and "±" in out
    assert "digits: Digits" in out  # the data policy
    assert (run / "derivation.html").exists() and (run / "derivation.png").exists()
    assert (run / "model.safetensors").read_bytes() == model_file
    assert "num_particles >= 2, found 1" in refused(capsys, "derive", run, "--num_particles", "1")
    assert "--num_examples: expected a number >= 1, found 0" in refused(capsys, "derive", run, "--num_examples", "0")
    (tmp_path / "file").write_text("x")
    assert "expected a run folder with a config.yaml, found none in nowhere" in refused(capsys, "derive", "nowhere")
    assert "--num_particles: expected int, found ten" in refused(capsys, "derive", run, "--num_particles", "ten")
    assert "--seed: expected a number from 0" in refused(capsys, "derive", "--seed", "-1")
    assert "found the file" in refused(capsys, "derive", "--out", tmp_path / "file")
    assert "--nonsense" in refused(capsys, "derive", "--nonsense")
