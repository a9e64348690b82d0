"""Pictures of representations, checked by the data of their artists."""

import io
import math

import numpy as np
import pytest
import torch

from pyro_vae import clouds, representation_plots


def draw(ax):
    ax.figure.savefig(io.BytesIO(), format="png", dpi=30)


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_the_cloud_has_its_circle_and_its_sites():
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double() + 5
    ball = clouds.ball(z, 0.9)
    labels = torch.arange(200) % 3
    ax = representation_plots.cloud(z, ball, labels, sites=ball.lattice(4))
    circle = ax.patches[0]
    assert circle.center == pytest.approx(ball.centre[:2].tolist()) and circle.radius == ball.radius
    assert np.allclose(ax.lines[0].get_xydata(), ball.lattice(4)[:, :2])
    assert sum(len(points.get_offsets()) for points in ax.collections) == 200
    assert "90 % inside, counted in all 3 dimensions" in ax.get_title()
    low, high = ax.get_xlim()
    assert low < ball.centre[0] - ball.radius and high > ball.centre[0] + ball.radius
    draw(ax)
    flat = representation_plots.cloud(z[:, :2], clouds.ball(z[:, :2]))
    assert "dimensions" not in flat.get_title()
    with pytest.raises(ValueError, match="a ball of D dimensions"):
        representation_plots.cloud(z[:, :2], ball)


@pytest.mark.parametrize("num", [8, 24])
def test_pictures_stand_around_the_circle_where_they_were_decoded(num):
    seen = []

    def decode(z):
        seen.append(z)
        return images(len(z), 4, 3)

    ax = representation_plots.circle(decode, num=num)
    assert torch.allclose(seen[0].norm(dim=1), torch.ones(num))
    assert torch.allclose(seen[0][num // 4], torch.tensor([0.0, 1.0]), atol=1e-6)
    extents = [image.get_extent() for image in ax.images]
    for (left, right, bottom, top), place in zip(extents, seen[0].numpy(), strict=True):
        middle = np.array([left + right, bottom + top]) / 2
        assert middle @ place == pytest.approx(np.hypot(*middle)) and np.hypot(*middle) > 1
        assert (right - left) / (top - bottom) == pytest.approx(3 / 4)
        assert not (left < place[0] < right and bottom < place[1] < top)  # beside its point
    low, high = ax.get_xlim()
    assert all(low < left < right < high and low < bottom < top < high for left, right, bottom, top in extents)
    for i, a in enumerate(extents):
        assert not any(a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3] for b in extents[:i])
    assert np.allclose(ax.images[3].get_array(), images(num, 4, 3)[3])
    draw(ax)
    with pytest.raises(ValueError, match="gave 7 pictures, expected 8"):
        representation_plots.circle(lambda z: images(7, 4, 3), num=8)


@pytest.mark.parametrize("num", [1, 3])
def test_neighbours_stand_beside_their_query_and_other_labels_are_red(num):
    queries, found = images(num, 1, 4, 4), {"means": images(num, 5, 1, 4, 4), "pixels": images(num, 5, 1, 4, 4) / 2}
    labels = {"means": [[q, 9, q, q, 9] for q in range(num)], "pixels": [[q] * 5 for q in range(num)]}
    ax = representation_plots.neighbours(queries, found, list(range(num)), labels)
    canvas = np.asarray(ax.images[0].get_array())
    assert np.isclose(canvas[:28:7, :28:7], queries[0, 0]).all()
    for way, name in enumerate(found):
        top, left = round(1.45 * way * 30), round(2.6 * 30)
        assert np.isclose(canvas[top : top + 28 : 7, left : left + 28 : 7], found[name][0, 1, 0]).all()
    red = [text.get_text() for text in ax.texts if text.get_color() == "#D00000"]
    assert red == ["9"] * (2 * num) and len(ax.texts) == num * 11
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == ["means", "pixels"] * math.ceil(num / 2)
    ax.figure.savefig(io.BytesIO(), format="png")
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    with pytest.raises(ValueError, match="one set a way"):
        representation_plots.neighbours(queries, {"means": images(num + 1, 5, 1, 4, 4)})


def test_confusions_leave_the_right_answers_out():
    shares = torch.tensor([[0.9, 0.1, 0.0], [0.004, 0.0, 0.996], [0.0, 0.2, 0.8]])
    ax = representation_plots.confusion(shares, ["a", "b", "$c$"])
    shown = np.asarray(ax.images[0].get_array().filled(np.nan))
    assert np.isnan(shown.diagonal()).all() and shown[0, 1] == pytest.approx(0.1)
    assert {(t.get_position(), t.get_text()) for t in ax.texts} == {((1, 0), "10"), ((2, 1), "100"), ((1, 2), "20")}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", r"\$c\$"]
    draw(ax)
    with pytest.raises(ValueError, match="C names"):
        representation_plots.confusion(shares, ["a"])


def test_scores_are_two_histograms_of_area_one():
    ordinary, odd = torch.arange(100.0), torch.arange(50.0) + 60
    ax = representation_plots.odd_scores(ordinary, odd, "score", ("seen", "unseen"))
    areas = [sum(p.get_height() * p.get_width() for p in c) for c in ax.containers if len(c) > 1]
    assert areas == pytest.approx([1.0, 1.0])
    assert ax.get_xlabel() == "score" and [t.get_text() for t in ax.get_legend().get_texts()] == ["seen", "unseen"]
    draw(ax)
