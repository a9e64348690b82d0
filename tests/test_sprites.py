"""Sprites: every combination once, and each factor does what its name says."""

import pytest
import torch

from pyro_vae.sprites import Sprites


def everything(data):
    factors = torch.cat([data.train_factors, data.test_factors])
    pictures = torch.cat([data.train.float(), data.test])
    order = (factors * torch.tensor([10**k for k in (8, 6, 4, 2, 0)])).sum(1).argsort()
    return pictures[order].reshape(*data.factor_sizes, *data.event_shape)


def test_every_combination_is_there_once():
    data = Sprites(16, num_scales=2, num_rotations=8, num_positions=3)
    factors = torch.cat([data.train_factors, data.test_factors])
    assert len(factors) == len(factors.unique(dim=0)) == 3 * 2 * 8 * 9
    assert len(data.test) == round(0.1 * len(factors)) and data.train.dtype == torch.uint8
    assert torch.equal(data.train_labels, data.train_factors[:, 0]) and data.natural_likelihood == ("Bernoulli", {})
    assert set(data.train.unique().tolist()) == {0, 1} == set(data.test.unique().tolist())
    again, other = (Sprites(16, 2, 8, 3, seed=seed) for seed in (0, 1))
    assert torch.equal(data.train, again.train) and not torch.equal(data.train_factors, other.train_factors)


def test_factors_move_scale_and_turn():
    x = everything(Sprites(32, num_scales=3, num_rotations=8, num_positions=8))[:, :, :, :, :, 0]
    ink = x.sum((-1, -2))
    assert bool((ink[:, 1:] > ink[:, :-1]).all())  # a larger scale is more ink
    assert bool((ink == ink[..., :1, :1]).all())  # the place changes none of it
    assert bool((ink > 0).all())
    step = torch.arange(32.0)
    across, down = ((x * axis).sum((-1, -2)) / ink for axis in (step, step.unsqueeze(-1)))
    assert torch.allclose(across.diff(dim=-2), torch.full((), 2.0), atol=1e-4)  # a column is two pixels
    assert torch.allclose(across.diff(dim=-1), torch.zeros(()), atol=1e-4)
    assert torch.allclose(down.diff(dim=-1), torch.full((), 2.0), atol=1e-4)
    # A square repeats after a quarter turn, an ellipse after a half, a heart after a whole one.
    centre = x[:, 2, :, 0, 0]
    repeats = [[bool(torch.equal(shape[0], shape[r])) for r in (2, 4)] for shape in centre]
    assert repeats == [[True, True], [False, True], [False, False]]


def test_the_middle_of_the_places_is_the_middle_of_the_picture():
    x = everything(Sprites(17, num_scales=1, num_rotations=1, num_positions=3))[1, 0, 0, :, :, 0]  # ellipses
    assert torch.equal(x[1, 1], x[1, 1].flip(0)) and torch.equal(x[1, 1], x[1, 1].flip(1))
    assert torch.equal(x[0, 1], x[2, 1].flip(1)) and torch.equal(x[1, 0], x[1, 2].flip(0))


def test_constructing_leaves_the_random_state():
    state = torch.get_rng_state()
    Sprites(8, 1, 1, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"size": 4}, "size"), ({"num_scales": 0}, "num_scales"), ({"size": 8, "num_positions": 20}, "at most 4 places")],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        Sprites(**arguments)
