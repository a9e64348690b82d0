r"""Disentanglement: whether each dimension of z follows one known factor of variation, by four published scores.

.. math:: \text{codes } z \in \mathbb R^{N \times D}, \quad \text{factors } v \in \mathbb N^{N \times F}

Each score is a function (codes, factors) -> number, 1 at best: one dimension for each factor, in any order, sign and
monotone scale. They disagree with each other and between seeds of one model (Locatello et al. 2019, arXiv:1811.12359):
report more than one of them, over several seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.representation import posterior_means
from pyro_vae.uncertainty import Estimate, Score, jackknife_error


def mutual_information(codes: Tensor, factors: Tensor, num_bins: int = 20) -> Tensor:
    r"""The mutual information of each dimension of z, cut in bins of equal width, with each factor.

    .. math:: I(z_d; v_k) = \sum_{b, c} \hat p(b, c) \log \frac{\hat p(b, c)}{\hat p(b)\, \hat p(c)}

    The shares are those counted; few examples for many bins make it too large, by about
    (num_bins - 1)(values - 1) / 2N.

    Args:
        codes: [N, D].
        factors: [N, F], integers from 0.
        num_bins: between the smallest and the largest value of each dimension.

    Returns:
        [D, F] float64, nats.

    Raises:
        ValueError: shapes that do not fit, or codes that are not finite.
    """
    bins = _bins(codes, factors, num_bins)
    table = torch.zeros(codes.shape[1], factors.shape[1], dtype=torch.float64)
    for d in range(codes.shape[1]):
        for k, values in enumerate(factors.cpu().T):
            num = int(values.max()) + 1
            joint = torch.bincount(bins[:, d] * num + values, minlength=num_bins * num).double().reshape(-1, num)
            joint = joint / joint.sum()
            product = joint.sum(1, keepdim=True) * joint.sum(0)
            table[d, k] = torch.xlogy(joint, joint / product.clamp(min=1e-300)).sum()
    return table.clamp(min=0)


def mig(codes: Tensor, factors: Tensor, num_bins: int = 20) -> float:
    r"""Mutual information gap: by how much the best dimension of each factor is ahead of the second best.

    .. math:: \mathrm{MIG} = \frac 1 F \sum_k \frac{1}{H(v_k)} \left( I(z_{d(k)}; v_k) - \max_{d \ne d(k)} I(z_d; v_k)
        \right), \qquad d(k) = \arg\max_d I(z_d; v_k)

    Mean codes are cut in bins; the paper takes the mutual information under q(z|x) instead.

    Args:
        codes: [N, D].
        factors: [N, F], integers from 0; a factor with one value only is left out.
        num_bins: see :func:`mutual_information`.

    Returns:
        0 to 1, higher is better.

    Source: Chen, Li, Grosse, Duvenaud (2018), Isolating sources of disentanglement, arXiv:1802.04942; in bins
        Locatello et al. (2019), arXiv:1811.12359.

    Example:
        >>> v = torch.cartesian_prod(torch.arange(3), torch.arange(4))
        >>> round(mig(v.float(), v), 6), round(mig(v.float()[:, [0, 0, 1, 1]], v), 6)
        (1.0, 0.0)
    """
    _check(codes, factors)
    table = mutual_information(_with_constant(codes), factors, num_bins)
    kept = [k for k, values in enumerate(factors.cpu().T) if len(values.unique()) > 1]
    if not kept:
        raise ValueError("expected a factor that varies, found none: give the factors of several examples.")
    entropies = torch.stack([_entropy(factors.cpu()[:, k]) for k in kept])
    best = table[:, kept].topk(2, dim=0).values
    return ((best[0] - best[1]) / entropies).mean().item()


def sap(codes: Tensor, factors: Tensor, categorical: Sequence[int] = ()) -> float:
    r"""Separated attribute predictability: by how much one dimension predicts a factor better than any other does.

    .. math:: \mathrm{SAP} = \frac 1 F \sum_k \left( S_{(1) k} - S_{(2) k} \right), \qquad
        S_{dk} = \frac{\mathrm{Cov}(z_d, v_k)^2}{\mathrm{Var}(z_d)\, \mathrm{Var}(v_k)}

    For a factor without order S is the balanced accuracy of the best cut of the line into intervals, one for each of
    its C values at most, fitted exactly on these examples: of a dimension that says nothing 1/C, so the gap is
    1 - 1/C at best.

    Args:
        codes: [N, D].
        factors: [N, F], integers from 0.
        categorical: which factors have no order.

    Returns:
        0 to 1, higher is better.

    Source: Kumar, Sattigeri, Balakrishnan (2018), Variational inference of disentangled latent concepts from unlabeled
        observations, arXiv:1711.00848.

    Example:
        >>> v = torch.cartesian_prod(torch.arange(3), torch.arange(4))
        >>> round(sap(v.float(), v), 6), round(sap(v.float()[:, [0, 0, 1, 1]], v), 6)
        (1.0, 0.0)
    """
    _check(codes, factors)
    z, v = _with_constant(codes), factors.cpu()
    centred = [part - part.mean(0) for part in (z, v.double())]
    spread = [part.square().mean(0) for part in centred]
    square = (centred[0].T @ centred[1] / len(z)).square()
    table = square / (spread[0].unsqueeze(1) * spread[1]).clamp(min=1e-300)
    table = torch.where(_moves(z).unsqueeze(1), table, torch.zeros_like(table))
    for k in categorical:
        table[:, k] = torch.tensor([_interval_accuracy(z[:, d], v[:, k]) for d in range(z.shape[1])])
    best = table.topk(2, dim=0).values
    return (best[0] - best[1]).mean().item()


@dataclass(frozen=True)
class Dci:
    """Disentanglement, completeness and informativeness.

    Args:
        disentanglement: 1 where each dimension of z matters for one factor only.
        completeness: 1 where each factor is carried by one dimension only.
        importance: how much each dimension matters for each factor, [D, F]; columns add up to 1.
        informativeness: accuracy of predicting each factor from all of z on held-out examples, one for each factor;
            empty where the importances were given.
    """

    disentanglement: float
    completeness: float
    importance: Tensor
    informativeness: tuple[Estimate, ...] = ()

    def __str__(self) -> str:
        text = f"disentanglement {self.disentanglement:.3f}, completeness {self.completeness:.3f}"
        if not self.informativeness:
            return text
        mean = sum(each.mean for each in self.informativeness) / len(self.informativeness)
        return f"{text}, informativeness {mean:.3f} (accuracy, n={len(self.informativeness[0].values)})"


def dci_of_importance(importance: Tensor) -> Dci:
    r"""Disentanglement and completeness of a table that says how much each dimension matters for each factor.

    .. math:: D = \sum_d \rho_d (1 - H_F(P_d)), \quad P_{dk} = \frac{R_{dk}}{\sum_k R_{dk}}, \quad
        \rho_d = \frac{\sum_k R_{dk}}{\sum_{dk} R_{dk}}, \qquad C = \frac 1 F \sum_k (1 - H_D(\tilde P_k)), \quad
        \tilde P_{dk} = \frac{R_{dk}}{\sum_d R_{dk}}

    Entropies H_F, H_D have base F and D: 1 is a uniform row. A table of zeros scores 0.

    Args:
        importance: R, [D, F], >= 0.

    Raises:
        ValueError: a negative entry, or one that is NaN.

    Source: Eastwood, Williams (2018), A framework for the quantitative evaluation of disentangled representations.

    Example:
        >>> print(dci_of_importance(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])))
        disentanglement 1.000, completeness 1.000
    """
    table = importance.detach().cpu().double()
    if table.ndim != 2 or not bool((table >= 0).all()):
        raise ValueError(f"expected importances [D, F] >= 0, found {tuple(table.shape)}: take absolute values.")
    total = table.sum().clamp(min=1e-300)

    def order(rows: Tensor) -> Tensor:  # 1 - entropy of each row, in base of its length
        shares = rows / rows.sum(1, keepdim=True).clamp(min=1e-300)
        there = (rows.sum(1) > 0).double()
        return there * (1 + torch.xlogy(shares, shares).sum(1) / np.log(max(rows.shape[1], 2)))

    disentanglement = (table.sum(1) / total * order(table)).sum().item()
    return Dci(disentanglement, order(table.T).mean().item(), table)


def dci(codes: Tensor, factors: Tensor, num_trees: int = 20, test_share: float = 0.25, seed: int = 0) -> Dci:
    r"""Disentanglement, completeness, informativeness, from random forests that predict each factor from all of z.

    The importance of a dimension is the share of the impurity that its splits remove; the informativeness is the
    accuracy on examples that the forest has not seen. See :func:`dci_of_importance` for the formulas.

    Args:
        codes: [N, D].
        factors: [N, F], integers from 0.
        num_trees: of each forest.
        test_share: of the examples, held out for the informativeness.
        seed: seed of the split and of the forests.

    Source: Eastwood, Williams (2018), A framework for the quantitative evaluation of disentangled representations.
    """
    from sklearn.ensemble import RandomForestClassifier  # here: slow to import

    _check(codes, factors)
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    held_out, train = order.split([held := max(1, round(test_share * len(codes))), len(codes) - held])
    z, v = codes.detach().cpu().double().numpy(), factors.cpu().numpy()
    columns, informativeness = [], []
    for k in range(v.shape[1]):
        # All dimensions compete at each split: a forest that may not look at the right one spreads the importance.
        forest = RandomForestClassifier(num_trees, max_features=None, random_state=seed).fit(z[train], v[train, k])
        columns.append(torch.from_numpy(forest.feature_importances_))
        right = torch.from_numpy((forest.predict(z[held_out]) == v[held_out, k]).astype(np.float64))
        informativeness.append(
            Estimate(
                f"factor {k}", right, 0, "", torch.zeros_like(right), method="random forest", units="of the values"
            )
        )
    scores = dci_of_importance(torch.stack(columns, dim=1))
    return Dci(scores.disentanglement, scores.completeness, scores.importance, tuple(informativeness))


def factor_vae_score(
    codes: Tensor,
    factors: Tensor,
    num_votes: int = 800,
    batch_size: int = 64,
    threshold: float = 0.01,
    seed: int = 0,
    *,
    policy: str = "",
) -> Estimate:
    r"""Whether the dimension that stays still tells which factor was held still.

    .. math:: d^* = \arg\min_d \frac{\mathrm{Var}_{\,n:\, v_k = c}(z_d)}{\mathrm{Var}(z_d)}

    A vote draws a factor k, a value c and ``batch_size`` examples that have it. A table from d* to the factor it stood
    for most often is made of ``num_votes`` votes and judged on as many others. Dimensions that are not active (see
    :func:`pyro_vae.diagnostics.active_units`) have no vote; where none is, each vote is for the first, and the score is
    what guessing reaches, 1/F.

    Args:
        codes: [N, D].
        factors: [N, F], integers from 0; factors with one value only are left out.
        num_votes: to make the table; as many again to judge it.
        batch_size: examples behind each vote.
        threshold: the variance above which a dimension counts as active; z in units of a standard normal prior.
        seed: seed of the draws.
        policy: the data policy to carry.

    Returns:
        An estimate with values 0 and 1, one for each judged vote: the error is that of the votes, not of the model.

    Source: Kim, Mnih (2018), Disentangling by factorising, arXiv:1802.05983.
    """
    _check(codes, factors)
    if num_votes < 2 or batch_size < 2:
        raise ValueError(f"expected num_votes and batch_size >= 2, found {num_votes} and {batch_size}: give more.")
    z, v = codes.detach().cpu().double(), factors.cpu()
    scale = z.std(0)
    active = torch.where(scale.square() > threshold)[0]
    kept = [k for k in range(v.shape[1]) if len(v[:, k].unique()) > 1]
    if not kept:
        raise ValueError("expected a factor that varies, found none: give the factors of several examples.")
    generator = torch.Generator().manual_seed(seed)
    rows = {k: [torch.where(v[:, k] == c)[0] for c in v[:, k].unique()] for k in kept}

    def pick(num: int) -> int:
        return int(torch.randint(num, (1,), generator=generator))

    votes = []
    for _ in range(2 * num_votes):
        place = pick(len(kept))
        having = rows[kept[place]][pick(len(rows[kept[place]]))]
        chosen = having[torch.randint(len(having), (batch_size,), generator=generator)]
        still = int((z[chosen][:, active].std(0) / scale[active]).argmin()) if len(active) else 0
        votes.append((still, place))
    still, place = torch.tensor(votes).T
    num = max(len(active), 1)
    counts = torch.bincount(still[:num_votes] * len(kept) + place[:num_votes], minlength=num * len(kept))
    table = counts.reshape(num, len(kept)).argmax(1)
    right = (table[still[num_votes:]] == place[num_votes:]).double()
    method = f"majority of {num_votes} votes"
    return Estimate("FactorVAE score", right, 0, policy, torch.zeros_like(right), method=method, units="of the votes")


def disentangle(vae: Any, data: Any, seed: int = 0, num_groups: int = 10) -> dict[str, Score]:
    """All four scores of a model on the held-out pictures of a set whose factors are known.

    Args:
        vae: a model whose posterior has a mean.
        data: a set with ``test``, ``test_factors``, ``categorical`` and ``policy``, such as :class:`Sprites`.
        seed: seed of the votes, forests and groups.
        num_groups: of the jackknife; the forests are grown anew for each, and their own chance widens the error of DCI
            (1.8 times the spread over fresh draws, in a trial with known codes).

    Returns:
        Name -> score: MIG, SAP, DCI disentanglement, completeness and informativeness, FactorVAE score.

    Raises:
        ValueError: the set has no factors.
    """
    factors = getattr(data, "test_factors", None)
    if factors is None:
        raise ValueError(f"expected a data set with known factors, found {data.name}: use sprites.Sprites.")
    codes, num, policy = posterior_means(vae, data.test), len(data.test), data.policy
    forests = dci(codes, factors, seed=seed)
    whole = forests.disentanglement, forests.completeness

    def gaps(z: Tensor, v: Tensor) -> tuple[float, float]:
        return mig(z, v), sap(z, v, data.categorical)

    def of_forests(z: Tensor, v: Tensor) -> tuple[float, float]:
        again = dci(z, v, seed=seed)
        return again.disentanglement, again.completeness

    found = {}
    for names, values, score, method in (
        (("MIG", "SAP"), gaps(codes, factors), gaps, "mean codes"),
        (("DCI disentanglement", "DCI completeness"), whole, of_forests, "random forests"),
    ):
        errors = jackknife_error(score, codes, factors, num_groups=num_groups, seed=seed)
        for name, value, error in zip(names, values, errors, strict=True):
            found[name] = Score(name, value, error, num, method, policy)
    right = torch.stack([each.values for each in forests.informativeness]).mean(0)
    error = (right.std() / len(right) ** 0.5).item()
    name = "DCI informativeness"
    found[name] = Score(name, right.mean().item(), error, len(right), "accuracy of random forests", policy)
    votes = factor_vae_score(codes, factors, seed=seed, policy=policy)
    found[votes.name] = Score(votes.name, votes.mean, votes.standard_error, votes.num_examples, votes.method, policy)
    return found


def _check(codes: Tensor, factors: Tensor) -> None:
    fits = codes.ndim == factors.ndim == 2 and len(codes) == len(factors) > 1 and not factors.is_floating_point()
    if not fits or bool((factors < 0).any()):
        found = f"{tuple(codes.shape)} and {factors.dtype} {tuple(factors.shape)}"
        raise ValueError(
            f"expected codes [N, D] and factors [N, F], integers from 0, found {found}: number the values."
        )
    if not bool(codes.isfinite().all()):
        raise ValueError("expected finite codes, found infinite values or NaN: the model that made them diverged.")


def _moves(z: Tensor) -> Tensor:
    """Which dimensions are not constant but for rounding."""
    return z.amax(0) - z.amin(0) > 1e-9 * z.abs().amax(0).clamp(min=1e-300)


def _bins(codes: Tensor, factors: Tensor, num_bins: int) -> Tensor:
    _check(codes, factors)
    z = codes.detach().cpu().double()
    low, width = z.amin(0), z.amax(0) - z.amin(0)
    place = (z - low) / width.clamp(min=1e-300) * num_bins
    return torch.where(_moves(z), place.floor().clamp(0, num_bins - 1), torch.zeros_like(place)).long()


def _entropy(values: Tensor) -> Tensor:
    shares = torch.bincount(values).double() / len(values)
    return -torch.xlogy(shares, shares).sum()


def _with_constant(codes: Tensor) -> Tensor:
    """A dimension that says nothing is the second best of a code that has one only."""
    return torch.cat([codes.detach().cpu().double(), torch.zeros(len(codes), 1, dtype=torch.float64)], 1)


def _interval_accuracy(z: Tensor, values: Tensor) -> float:
    """The best balanced accuracy of classes that each get one interval or none, C - 1 cuts at most; by dynamic
    programming over the sorted examples.
    """
    classes, inverse = values.unique(return_inverse=True)
    weight = 1 / torch.bincount(inverse).double() / len(classes)
    places, group = z.unique(return_inverse=True)
    gain = torch.zeros(len(places), len(classes), dtype=torch.float64).index_put(
        (group, inverse), weight[inverse], accumulate=True
    )
    # best[t, c]: what is right so far, with t cuts made and class c in the present interval
    best = np.full((len(classes), len(classes)), -np.inf)
    best[0] = 0.0
    for row in gain.numpy():
        cut = np.full_like(best, -np.inf)
        cut[1:] = best[:-1].max(1, keepdims=True)
        best = np.maximum(best, cut) + row
    return float(best.max())
