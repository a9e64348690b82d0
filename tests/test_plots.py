"""The modules of plots, checked by the data of their artists."""

import io
import math
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyro_vae import curve_plots, evaluation_plots, image_plots, latent_plots, sweep_plots, table_plots
from pyro_vae.latent_plots import PRIOR_RADIUS
from pyro_vae.plot_style import CLASS_COLOURS

NAN = float("nan")
HISTORY = {
    "epoch": [1, 2, 3, 4],
    "objective": [-80.0, -70.0, -60.0, -50.0],
    "elbo": [-90.0, -80.0, -70.0, -60.0],
    "valid_elbo": [NAN, -85.0, None, -65.0],
    "log_px": [-85.0, -74.0, -63.0, -52.0],
    "kl": [5.0, 6.0, 7.0, 8.0],
    "valid_log_px": [NAN, -80.0, NAN, -56.0],
    "valid_kl": [NAN, 5.0, NAN, 9.0],
}


@pytest.fixture(autouse=True)
def no_global_state(monkeypatch):
    """Drawing needs no pyplot, changes no style and draws no random number."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    style, state = matplotlib.rcParams.copy(), torch.get_rng_state()
    yield
    assert matplotlib.rcParams.copy() == style
    assert torch.equal(torch.get_rng_state(), state)


def images(n=7, h=4, w=3, c=1):
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(n))


def tile(ax, row, column, h, w):
    """The tile at (row, column) without its enlargement."""
    canvas = ax.images[0].get_array()
    k = max(1, round(28 / max(h, w)))
    top, left = round(row * (k * h + 2)), round(column * (k * w + 2))
    enlarged = canvas[top : top + k * h, left : left + k * w]
    assert np.array_equal(enlarged, enlarged[::k, ::k].repeat(k, axis=0).repeat(k, axis=1))
    return np.asarray(enlarged[::k, ::k])


def lines(ax):
    return {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.lines}


def tick_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def draw(ax):
    ax.figure.savefig(io.BytesIO(), format="png", dpi=30)


def test_curves_draw_the_history():
    ax = curve_plots.curves(HISTORY)
    assert lines(ax) == {
        "training ELBO": ([1, 2, 3, 4], HISTORY["elbo"]),
        "training objective": ([1, 2, 3, 4], HISTORY["objective"]),
        "held-out ELBO": ([2, 4], [-85, -65]),
    }
    styles = {line.get_linestyle() + str(line.get_marker()) for line in ax.lines}
    colours = {line.get_color() for line in ax.lines}
    assert len(styles) == len(colours) == 3
    assert ax.get_xlabel() == "epoch" and "nats per example" in ax.get_ylabel()
    draw(ax)


def test_what_is_no_elbo_has_another_name():
    ax = curve_plots.curves({**HISTORY, "valid_elbo_se": [1.0] * 4}, name="score − KL")
    expected = ["training score − KL", "training objective", "held-out score − KL ± standard error"]
    assert list(lines(ax)) == expected
    upper, lower = curve_plots.terms(HISTORY, names=("score", "KL")).child_axes
    assert upper.get_ylabel() == "score\nnats per example" and lower.get_ylabel() == "KL\nnats per example"


def test_objective_is_drawn_only_where_it_is_not_the_elbo():
    assert list(lines(curve_plots.curves({**HISTORY, "objective": HISTORY["elbo"]}))) == [
        "training ELBO",
        "held-out ELBO",
    ]
    del (history := dict(HISTORY))["elbo"]
    assert list(lines(curve_plots.curves(history))) == ["training objective", "held-out ELBO"]


def test_held_out_band_is_one_standard_error():
    ax = curve_plots.curves({**HISTORY, "valid_elbo": [-9.0, -8.0, -7.0, -6.0], "valid_elbo_se": [0.5, NAN, 0.5, 0.5]})
    assert "held-out ELBO ± standard error" in lines(ax)
    y = ax.collections[0].get_datalim(ax.transData).intervaly
    assert y.tolist() == [-9.5, -5.5]


def test_a_terrible_first_epoch_does_not_flatten_the_rest():
    elbo = [-1e6] + [-100 + 0.1 * i for i in range(49)]
    ax = curve_plots.curves({"elbo": elbo})
    bottom, top = ax.get_ylim()
    assert -110 < bottom < -100 and -96 < top < -90
    assert "axis cut: of 50 values, 1 below (lowest −1e+06)" in ax.get_title(loc="right")
    assert lines(ax)["training ELBO"] == (list(range(1, 51)), elbo)
    assert curve_plots.curves({"elbo": elbo[1:]}).get_title(loc="right") == ""


def test_terms_have_a_scale_each():
    ax = curve_plots.terms(HISTORY)
    upper, lower = ax.child_axes
    assert lines(upper) == {"training": ([1, 2, 3, 4], HISTORY["log_px"]), "held-out": ([2, 4], [-80, -56])}
    assert lines(lower) == {"training": ([1, 2, 3, 4], HISTORY["kl"]), "held-out": ([2, 4], [5, 9])}
    assert upper.get_ylim()[1] < 0 < lower.get_ylim()[0]
    assert upper.get_ylabel() == "log p(x | z)\nnats per example"
    assert lower.get_ylabel() == "KL(q(z | x) || p(z))\nnats per example"
    assert lower.get_xlabel() == "epoch"
    draw(ax)


@pytest.mark.parametrize("history", [{}, {"epoch": [1], "elbo": [NAN]}, {"epoch": [1], "elbo": [-3.0], "kl": [0.0]}])
def test_short_and_empty_histories(history):
    draw(curve_plots.curves(history))
    draw(curve_plots.terms(history))


def test_the_objective_is_called_by_its_name():
    assert "training objective, IWAE" in lines(curve_plots.curves(HISTORY, objective_name="IWAE"))


def test_curves_into_given_axes():
    ax = Figure().subplots()
    assert curve_plots.curves(HISTORY, ax) is ax


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"history\['elbo'\] has 1 values, expected 2"):
        curve_plots.curves({"epoch": [1, 2], "elbo": [-3.0]})


def test_image_grid_places_every_tile():
    x = images(7)
    ax = image_plots.image_grid(2 * x - 1, columns=3, value_range=(-1, 1), title="seven")
    for n in range(7):
        assert np.allclose(tile(ax, *divmod(n, 3), 4, 3), x[n, 0], atol=1e-6)
    assert (tile(ax, 2, 2, 4, 3) == 0).all()  # white paper
    assert ax.images[0].cmap.name == "Greys" and ax.images[0].get_clim() == (0, 1)
    assert ax.get_title() == "seven" and not ax.get_xticks().size and not ax.get_yticks().size
    draw(ax)


def test_image_grid_in_colour_and_without_channels():
    x = images(5, c=3)
    ax = image_plots.image_grid(x, columns=2)
    assert np.allclose(tile(ax, 1, 1, 4, 3), x[3].permute(1, 2, 0))
    x = images(2)
    assert np.allclose(tile(image_plots.image_grid(x[:, 0]), 0, 1, 4, 3), x[1, 0])


def test_large_pictures_are_not_enlarged():
    assert image_plots.image_grid(images(2, 30, 29)).images[0].get_array().shape == (30, 2 * 29 + 2)


def test_values_outside_the_range_are_clipped():
    ax = image_plots.image_grid(torch.tensor([[[-5.0, 8.0], [16.0, 99.0]]]), value_range=(0, 16))
    assert tile(ax, 0, 0, 2, 2).tolist() == [[0, 0.5], [1, 1]]


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match=r"images have shape \(5, 2, 4, 3\), expected \[N, H, W\]"):
        image_plots.image_grid(images(5, c=2))
    with pytest.raises(ValueError, match="expected columns >= 1, found 0"):
        image_plots.image_grid(images(), columns=0)
    with pytest.raises(ValueError, match=r"value_range is \(1, 0\)"):
        image_plots.image_grid(images(), value_range=(1, 0))


def test_reconstructions_stand_below_their_originals():
    x, x_hat = images(5), images(5).flip(0)
    ax = image_plots.reconstructions(x, x_hat, columns=3)
    for n in range(5):
        pair, column = divmod(n, 3)
        assert np.allclose(tile(ax, 2.25 * pair, column, 4, 3), x[n, 0])
        assert np.allclose(tile(ax, 2.25 * pair + 1, column, 4, 3), x_hat[n, 0])
    ticks = dict(zip(ax.get_yticks(), tick_labels(ax.yaxis), strict=True))
    assert [ticks[y] for y in sorted(ticks)] == ["original x", "mean of p(x | z)"] * 2
    with pytest.raises(ValueError, match="expected that of x"):
        image_plots.reconstructions(x, x_hat[:3])
    draw(ax)


def test_two_dimensional_codes_are_drawn_as_they_are():
    z, labels = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    ax = latent_plots.latent_scatter(z, labels, ["a", "$b$", "c"])
    assert len(ax.collections) == 3
    for k, points in enumerate(ax.collections):
        assert np.allclose(points.get_offsets(), z[labels == k])
        extent = np.ptp(z.numpy(), axis=0).max()
        middle = np.median(z[labels == k], axis=0)
        assert np.hypot(*(np.asarray(ax.texts[k].get_position()) - middle)) < 0.13 * extent
    assert [text.get_text() for text in ax.texts] == ["a", r"\$b\$", "c"]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["a", r"\$b\$", "c", "99 % of N(0, I)"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_aspect()) == ("$z_1$", "$z_2$", 1)
    draw(ax)


def test_names_of_classes_keep_off_each_other_and_off_points():
    generator = torch.Generator().manual_seed(0)
    z = torch.cat([torch.randn(40, 2, generator=generator) + offset for offset in (0.0, 0.1, 3.0)])
    ax = latent_plots.latent_scatter(z, torch.arange(3).repeat_interleave(40))
    figure = ax.get_figure(root=True)
    figure.savefig(io.BytesIO(), format="png")
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    pixels = ax.transData.transform(z.numpy())
    covered = [sum(box.contains(*pixel) for pixel in pixels) for box in boxes]
    assert len(boxes) == 3 and sum(covered) <= 2
    for codes in (torch.zeros(4, 2), torch.tensor([[0.0, 0.0], [2.0, 2.0]]).repeat(2, 1)):  # two classes in one place
        ax = latent_plots.latent_scatter(codes, torch.tensor([0, 0, 1, 1]))
        ax.get_figure(root=True).savefig(io.BytesIO(), format="png")
        first, second = (text.get_window_extent() for text in ax.texts)
        assert not first.overlaps(second)


def test_circle_holds_99_percent_of_a_standard_normal():
    (circle,) = latent_plots.latent_scatter(torch.zeros(1, 2)).lines
    radius = np.hypot(*circle.get_data())
    assert np.allclose(radius, PRIOR_RADIUS) and math.isclose(PRIOR_RADIUS, 3.0349, abs_tol=1e-4)
    draws = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
    inside = (draws.norm(dim=1) < PRIOR_RADIUS).double().mean().item()
    assert abs(inside - 0.99) < 4 * math.sqrt(0.99 * 0.01 / 100_000)
    assert not latent_plots.latent_scatter(torch.zeros(1, 2), prior_circle=False).lines
    assert not latent_plots.latent_scatter(torch.eye(3)).lines


def test_more_dimensions_are_projected_on_principal_components():
    z = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 3.0]) + 2
    ax = latent_plots.latent_scatter(z)
    u, s, _ = torch.linalg.svd(z.double() - z.double().mean(0), full_matrices=False)
    found = torch.as_tensor(np.asarray(ax.collections[0].get_offsets()))
    assert torch.allclose(found.abs(), (u * s)[:, :2].abs(), atol=1e-5)
    shares = 100 * s**2 / (s**2).sum()
    assert f"({shares[0]:.0f} % of the variance, D = 3)" in ax.get_xlabel()
    assert f"({shares[1]:.0f} % of the variance, D = 3)" in ax.get_ylabel()


def test_one_dimension_is_drawn_against_the_class():
    z, labels = torch.linspace(-1, 1, 6)[:, None], torch.tensor([0, 1, 2, 0, 1, 2])
    ax = latent_plots.latent_scatter(z, labels, ["a", "b", "c"])
    for k, points in enumerate(ax.collections):
        x, y = np.asarray(points.get_offsets()).T
        assert np.allclose(x, z[labels == k, 0]) and (abs(y - k) < 0.5).all()
    assert tick_labels(ax.yaxis) == ["a", "b", "c"]
    draw(ax)
    draw(latent_plots.latent_scatter(z))


def test_many_classes_differ_in_colour_or_marker():
    ax = latent_plots.latent_scatter(torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.arange(30))
    looks = {(tuple(p.get_facecolor()[0]), p.get_paths()[0].vertices.tobytes()) for p in ax.collections}
    assert len(looks) == 30 and ax.get_legend() is not None
    assert len(set(CLASS_COLOURS)) == 10
    draw(ax)


def test_bad_codes_are_refused():
    with pytest.raises(ValueError, match=r"z has shape \(3,\), expected \[N, D\]"):
        latent_plots.latent_scatter(torch.zeros(3))
    with pytest.raises(ValueError, match="z has infinite values or NaN"):
        latent_plots.latent_scatter(torch.full((3, 2), NAN))
    with pytest.raises(ValueError, match=r"labels are \(2,\) of torch.int64, expected \(3,\) integers"):
        latent_plots.latent_scatter(torch.zeros(3, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="class_names has 2 entries, expected over 2"):
        latent_plots.latent_scatter(torch.zeros(3, 2), torch.tensor([0, 1, 2]), ["a", "b"])


@pytest.mark.parametrize("num", [1, 4, 15, 20])
@pytest.mark.parametrize("quantiles", [True, False])
def test_manifold_shows_each_picture_at_its_own_coordinate(num, quantiles):
    limits = ((-1.0, 2.0), (0.0, 5.0))
    low, high = (-3.0, 3.0) if quantiles else (-1.0, 5.0)
    seen = []

    def decode(z):
        seen.append(z)
        return z[:, None, :].expand(-1, 3, 2)  # a picture of 3 rows: z1 in the left column, z2 in the right

    ax = image_plots.manifold(decode, num, value_range=(low, high), quantiles=quantiles, limits=limits)
    assert seen[0].shape == (num * num, 2)
    canvas = ax.images[0].get_array()
    quarter = 0.25 * 9 * 2  # a quarter of the width of a tile, pixels being enlarged 9 times
    for x, z1 in zip(ax.get_xticks(), tick_labels(ax.xaxis), strict=True):
        for y, z2 in zip(ax.get_yticks(), tick_labels(ax.yaxis), strict=True):
            shown = [canvas[round(y), round(x + side)] * (high - low) + low for side in (-quarter, quarter)]
            assert shown == pytest.approx([float(z.replace("−", "-")) for z in (z1, z2)], abs=0.0051)
    rows = seen[0].reshape(num, num, 2)
    if num > 1:
        assert (rows[0, :, 0].diff() > 0).all() and (rows[:, 0, 1].diff() < 0).all()  # z2 upwards
    if quantiles:
        mass = torch.distributions.Normal(0, 1).cdf(rows[0, :, 0])
        assert torch.allclose(mass, (torch.arange(num) + 0.5) / num, atol=1e-6)
    assert "$z_1$" in ax.get_xlabel() and "$z_2$" in ax.get_ylabel()
    assert 1 <= len(ax.get_xticks()) <= 10


def test_manifold_refuses_too_few_pictures():
    with pytest.raises(ValueError, match=r"decode\(z\) gave 3 pictures, expected 4"):
        image_plots.manifold(lambda z: images(3), num=2)


def test_kl_bars_are_sorted_and_named():
    ax = latent_plots.kl_per_dimension(torch.tensor([0.5, 0.001, 2.0, 0.02]))
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([2.0, 0.5, 0.02, 0.001])
    assert tick_labels(ax.xaxis) == ["3", "1", "4", "2"]
    assert ax.texts[0].get_text() == "3 of 4 dimensions above 0.01 nats"
    assert "nats per example" in ax.get_ylabel()
    draw(ax)
    with pytest.raises(ValueError, match=r"kl has shape \(5, 2\), expected \[D\]"):
        latent_plots.kl_per_dimension(torch.zeros(5, 2))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_few_kl_bars_stand_in_the_middle_of_a_narrow_picture(dim):
    ax = latent_plots.kl_per_dimension(torch.ones(dim))
    left, right = ax.get_xlim()
    assert left + right == pytest.approx(dim - 1) and right - left <= max(dim + 0.5, 2.5)
    assert ax.get_figure().get_figwidth() < 5
    draw(ax)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_what_is_written_beside_few_bars_stays_in_the_picture(dim):
    ax = latent_plots.kl_per_dimension(torch.ones(dim))
    ax.get_figure(root=True).savefig(io.BytesIO(), format="png")
    text, panel = ax.texts[0].get_window_extent(), ax.get_window_extent()
    assert panel.x0 <= text.x0 and text.x1 <= panel.x1
    bars = [bar.get_window_extent() for bar in ax.patches]
    assert not any(text.overlaps(bar) for bar in bars)
    assert sum(bar.width for bar in bars) > 0.4 * panel.width


@pytest.mark.parametrize(("num", "same"), [(10, True), (20, True), (10, False)])
def test_the_names_of_classes_never_overlap(num, same):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(50 * num) % num
    z = torch.randn(50 * num, 2, generator=generator) + (0 if same else 1) * labels.unsqueeze(1) / num
    ax = latent_plots.latent_scatter(z, labels, [f"no {k}" for k in range(num)])
    ax.get_figure(root=True).savefig(io.BytesIO(), format="png")
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == num
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_many_kl_bars_are_named_in_part():
    kl = torch.linspace(0, 1, 70)
    ax = latent_plots.kl_per_dimension(kl)
    assert len(ax.patches) == 70 and len(ax.get_xticks()) <= 30
    assert tick_labels(ax.xaxis)[:2] == ["70", "67"]
    ax = latent_plots.kl_per_dimension(torch.linspace(0, 1, 196))
    ax.get_figure(root=True).savefig(io.BytesIO(), format="png")
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert len(boxes) > 10 and not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_table_marginals_are_medians_and_ranges():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator) * torch.tensor([1.0, 100.0, 0.0]) + 7
    made = x[:300] * 2
    ax = table_plots.table_marginals(x, made, ["a", "b", "$c$"])
    assert tick_labels(ax.yaxis) == ["a", "b", r"\$c\$"]
    scale = torch.tensor([*x[:, :2].std(0, correction=0), 1.0])
    for container, values in zip(ax.containers, (x, made), strict=True):
        expected = ((values - x.mean(0)) / scale).double().quantile(torch.tensor([0.05, 0.5, 0.95]).double(), dim=0)
        median, _, (bars,) = container.lines
        assert np.allclose(median.get_xdata(), expected[1], atol=1e-4)
        ends = np.array([segment[:, 0] for segment in bars.get_segments()])
        assert np.allclose(ends.T, expected[[0, 2]], atol=1e-4)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["data", "model"]
    assert "standard deviations" in ax.get_xlabel()
    draw(ax)
    with pytest.raises(ValueError, match="names has 2 entries, expected 3"):
        table_plots.table_marginals(x, made, ["a", "b"])
    with pytest.raises(ValueError, match="give both E columns"):
        table_plots.table_marginals(x, made[:, :2])


# ------------------------------------------------------------------------------------------- estimates, diagnostics


def drawn(ax):
    draw(ax)
    return ax


def test_log_weights():
    log_w = torch.stack([torch.zeros(1000), torch.randn(1000, generator=torch.Generator().manual_seed(0))], 1) - 80
    ax = drawn(evaluation_plots.log_weights(log_w, torch.tensor([0.0, 0.43]), ["easy", "hard"]))
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[0] == "easy: Pareto k = 0.00, ESS = 1000 of 1000"
    assert texts[1].startswith("hard: Pareto k = 0.43, ESS = 216 of")
    largest = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "v"]
    centred = log_w[:, 1] - log_w[:, 1].logsumexp(0) + math.log(1000)
    np.testing.assert_allclose(largest, [0, centred.max()], atol=1e-4)
    heights = ax.patches[1].get_xy()[:, 1]
    assert heights.max() < 1000 and ax.get_yscale() == "log"
    for bad in (torch.zeros(5), torch.zeros(5, 4), torch.zeros(0, 1)):
        with pytest.raises(ValueError, match="choose a few"):
            evaluation_plots.log_weights(bad)


def test_gap_bars():
    ax = drawn(evaluation_plots.gap_bars({"approximation": (1.5, 0.1), "amortisation": (2.5, 0.2), "odd": (-0.5, NAN)}))
    assert [bar.get_width() for bar in ax.patches] == [1.5, 2.5, -0.5]
    assert tick_labels(ax.yaxis) == ["approximation", "amortisation", "odd"]
    assert [text.get_text() for text in ax.texts][:2] == ["1.50 ± 0.10", "2.50 ± 0.20"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first at the top"
    with pytest.raises(ValueError, match="gaps is empty"):
        evaluation_plots.gap_bars({})


def normal_on(axis, mean, scale):
    z = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    return torch.exp(-0.5 * (((z - torch.tensor(mean)) / torch.tensor(scale)) ** 2).sum(-1)) / (
        2 * math.pi * math.prod(scale)
    )


def test_aggregate_posterior():
    axis = torch.linspace(-4, 4, 81)
    q = normal_on(axis, (1.0, -2.0), (0.3, 0.5))
    ax = drawn(evaluation_plots.aggregate_posterior(axis, q, normal_on(axis, (0.0, 0.0), (1.0, 1.0))))
    shown = np.asarray(ax.images[0].get_array())
    row, column = np.unravel_index(shown.argmax(), shown.shape)
    assert (axis[column], axis[row]) == pytest.approx((1.0, -2.0), abs=0.06), "z1 to the right, z2 upwards"
    radii = sorted(np.abs(path.vertices).max() for path in ax.collections[0].get_paths() if len(path.vertices))
    np.testing.assert_allclose(radii, np.sqrt(-2 * np.log([0.5, 0.05, 0.01])), atol=0.1)


def test_posteriors():
    axis = torch.linspace(-4, 4, 161)
    true = torch.stack([normal_on(axis, (1.0, -2.0), (0.2, 0.4)), normal_on(axis, (0.0, 0.0), (0.3, 0.3))])
    q = torch.stack([normal_on(axis, (1.2, -2.0), (0.2, 0.2)), normal_on(axis, (0.0, 0.0), (0.3, 0.3))])
    ax = drawn(evaluation_plots.posteriors(axis, true, q, images(2), torch.tensor([1.25, 0.0])))
    first, second, picture, _ = ax.child_axes
    assert [panel.get_title() for panel in (first, second)] == ["KL = 1.25 nats", "KL = 0.00 nats"]
    assert first.get_xlim()[0] < 0.5 and first.get_xlim()[1] > 1.7 and first.get_ylim()[1] < 0, "near the mass"
    np.testing.assert_array_equal(first.images[0].get_array(), true[0].T.double().numpy())
    outline = np.concatenate([path.vertices for path in first.collections[0].get_paths()])
    np.testing.assert_allclose((outline.max(0) + outline.min(0)) / 2, [1.2, -2.0], atol=0.03)
    assert picture.images[0].get_array().shape == (4, 3)
    assert len(drawn(evaluation_plots.posteriors(axis, true, q)).child_axes) == 2


def test_a_sweep_draws_means_errors_and_seeds():
    numbers = {"ELBO": [[-3.0, -1.0], [-8.0], []], "KL": [[4.0, 6.0], [3.0, 3.0], [1.0, 2.0]]}
    ax = sweep_plots.sweep(["0.1", "1", "10"], numbers, "beta")
    first, second = ax.child_axes
    bars = first.containers[0]
    assert bars[0].get_xydata().tolist() == [[0.1, -2.0], [1.0, -8.0]]  # the value without a run is left out
    ends = [path.vertices[:, 1].tolist() for path in bars[2][0].get_paths()]
    assert ends == [[-3.0, -1.0], [-8.0, -8.0]]  # one standard error: sd sqrt(2), of two seeds
    dots = [line.get_ydata().tolist() for line in second.lines if line.get_markersize() == 3]
    assert dots == numbers["KL"] and second.get_xscale() == "log" and second.get_xlabel() == "beta"
    assert tick_labels(second.xaxis) == ["0.1", "1", "10"] and first.get_title() == "ELBO"
    draw(ax)
    words = sweep_plots.sweep(["Normal", "$Vamp$"], {"KL": [[1.0], [2.0]]}).child_axes[0]
    assert words.containers[0][0].get_linestyle() == "None" and tick_labels(words.xaxis) == ["Normal", r"\$Vamp\$"]
    with pytest.raises(ValueError, match="KL has 1 entries, expected 2"):
        sweep_plots.sweep(["1", "2"], {"KL": [[1.0]]})
    with pytest.raises(ValueError, match="at least one metric"):
        sweep_plots.sweep(["1"], {})


def test_rate_distortion_joins_the_means_and_draws_lines_of_equal_elbo():
    points = [[(2.0, 30.0)], [(8.0, 19.0), (10.0, 21.0)], [(4.0, 24.0)]]
    ax = sweep_plots.rate_distortion(points, ["4", "0.5", "1"], "beta")
    curve = ax.lines[-1].get_xydata().tolist()
    assert curve == [[9.0, 20.0], [4.0, 24.0], [2.0, 30.0]]  # in the order of beta
    grey = [line for line in ax.lines if line.get_color() == "0.8"]
    assert len(grey) > 2
    for line in grey:
        x, y = line.get_data()
        assert x[0] + y[0] == pytest.approx(x[1] + y[1])  # rate + distortion = -ELBO
    assert {text.get_text() for text in ax.texts} >= {"4", "0.5", "1"} and "beta" in ax.get_title()
    draw(ax)
    with pytest.raises(ValueError, match="expected 2 with one point or more"):
        sweep_plots.rate_distortion([[(1.0, 1.0)]], ["1", "2"])
