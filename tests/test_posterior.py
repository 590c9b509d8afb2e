"""Measured effects and their inference: closed forms, honest intervals, less error than extremes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harp_hf.effects import PRIOR_ROWS, active_tasks, measured_effects
from harp_hf.errors import HarpError
from harp_hf.hierarchy import Hierarchy
from harp_hf.kriging import Trend, average, grid_weights, likelihoods, solve
from harp_hf.posterior import SLOPE_SD, SLOPE_SPREADS, infer, pooled_slope, slope

PRIORS = ("smooth", "nested")


def family(n_parents: int = 36, leaves: int = 8, n_large: int = 6, seed: int = 0) -> Hierarchy:
    """Equal families of leaves around their parents, which lie around their large regions."""
    rng = np.random.default_rng(seed)
    parent = np.repeat(np.arange(n_parents), leaves)
    large = np.arange(n_parents) * n_large // n_parents
    parents = rng.normal(size=(n_large, 16))[large] + 0.7 * rng.normal(size=(n_parents, 16))
    centroids = parents[parent] + 0.7 * rng.normal(size=(len(parent), 16))
    return Hierarchy(
        leaf=np.arange(len(parent), dtype=np.int32),
        parent=parent.astype(np.int32),
        large=large.astype(np.int32),
        centroids=(centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).astype(np.float32),
        parent_centroids=(parents / np.linalg.norm(parents, axis=1, keepdims=True)).astype(np.float32),
        distance=np.zeros(len(parent), np.float32),
    )


def nested_effects(hierarchy: Hierarchy, n_tasks: int, rng: np.random.Generator) -> np.ndarray:
    shape = (len(hierarchy.large), n_tasks)
    by_large = rng.normal(size=shape)[hierarchy.large[hierarchy.parent]]
    return 0.02 + 0.05 * (by_large + rng.normal(size=shape)[hierarchy.parent] + rng.normal(size=(288, n_tasks)))


def smooth_effects(hierarchy: Hierarchy, n_tasks: int, rng: np.random.Generator) -> np.ndarray:
    c = hierarchy.centroids.astype(np.float64)
    kernel = np.exp(-((c[:, None] - c) ** 2).sum(axis=2)) + 0.2 * np.eye(len(c))
    return 0.02 + 0.06 * np.linalg.cholesky(kernel) @ rng.normal(size=(len(c), n_tasks))


def one_in_each_parent_first(hierarchy: Hierarchy, m: int, rng: np.random.Generator) -> np.ndarray:
    first = np.arange(36) * 8 + rng.integers(0, 8, 36)
    return np.concatenate([first, rng.permutation(np.setdiff1d(np.arange(288), first))])[:m]


# Measured effects


def test_effects_are_mean_paired_differences() -> None:
    null = np.array([0.0, 1.0, 0.5, 0.0])
    scores = np.array([[1.0, 1.0, 0.5, 0.25], [0.0, 0.0, 1.0, 0.0]])
    effects, variances = measured_effects(scores, null, np.array([0, 0, 1, 1]), 2)
    assert effects == pytest.approx(np.array([[0.5, 0.125], [-0.5, 0.25]]))
    # Task 0: squares around the effect sum to 1/2 in both leaves; pooled (1 + 1/2) / (2 + 1).
    assert variances[:, 0] == pytest.approx([0.5 * (1 + PRIOR_ROWS) / (1 + PRIOR_ROWS) / 2] * 2)


def test_variances_agree_with_the_sample_where_rows_are_many_and_are_pooled_where_they_are_few() -> None:
    rng = np.random.default_rng(0)
    change = rng.choice([-1, 0, 1], size=(2, 5000), p=[0.1, 0.6, 0.3])
    change[1] *= rng.random(5000) < 0.2
    _, variances = measured_effects(change.astype(float), np.zeros(5000), np.zeros(5000, int), 1)
    assert variances[:, 0] == pytest.approx(change.var(axis=1) / 5000, rel=0.1)
    _, few = measured_effects(change[:, :12].astype(float), np.zeros(12), np.zeros(12, int), 1)
    assert few[0] / few[1] < change[0, :12].var() / max(change[1, :12].var(), 1e-9)


def test_a_leaf_that_changed_nothing_is_not_known_exactly() -> None:
    quiet = np.zeros((6, 25))
    _, alone = measured_effects(quiet[:1], np.zeros(25), np.zeros(25, int), 1)
    assert alone == pytest.approx(PRIOR_ROWS * 0.5 / 25 / (24 + PRIOR_ROWS) / 25)
    _, none = measured_effects(quiet, np.zeros(25), np.zeros(25, int), 1)
    assert np.all((none > 0) & (none < alone))
    busy = quiet.copy()
    busy[1:, ::3] = 1
    _, beside = measured_effects(busy, np.zeros(25), np.zeros(25, int), 1)
    assert 0.03**2 < beside[0, 0] < beside[1, 0]


def test_one_clear_effect_among_quiet_leaves_is_not_taken_for_noise() -> None:
    rng = np.random.default_rng(0)
    scores = 0.04 + 0.03 * rng.standard_normal((24, 24))
    scores[5] = rng.beta(1, 1, 24)
    hierarchy = family(n_parents=8, leaves=3, n_large=2)
    effects, variances = measured_effects(scores, np.zeros(24), np.zeros(24, int), 1)
    for prior in PRIORS:
        mean = infer(effects, variances, np.arange(24), hierarchy, prior=prior).mean
        assert mean[5, 0] > 0.7 * effects[5, 0] > 0.25


def test_intervals_of_measured_effects_hold_their_truth() -> None:
    rng = np.random.default_rng(1)
    rates = rng.dirichlet([8, 1, 2], size=400)
    change = np.array([rng.choice([0, -1, 1], size=25, p=p) for p in rates], float)
    effects, variances = measured_effects(change, np.zeros(25), np.zeros(25, int), 1)
    within = np.abs(effects[:, 0] - (rates[:, 2] - rates[:, 1])) < 1.645 * np.sqrt(variances[:, 0])
    assert 0.86 < within.mean() < 0.96


def test_repeated_runs_add_their_variance() -> None:
    scores, null, task = np.zeros((3, 8)), np.zeros(8), np.repeat([0, 1], 4)
    _, without = measured_effects(scores, null, task, 2)
    replicates = np.full((3, 2, 8), np.nan)
    replicates[:, 0] = np.repeat([[0.1, 0.5], [0.2, 0.5], [0.3, 0.5]], 4, axis=1)
    _, once = measured_effects(scores, null, task, 2, replicates=replicates)
    assert np.array_equal(once, without)
    replicates[:2, 1] = np.repeat([[0.3, 0.5], [0.2, 0.5]], 4, axis=1)
    _, repeated = measured_effects(scores, null, task, 2, replicates=replicates)
    # Two leaves were repeated: squares 2 * 0.1^2 and 0, one degree of freedom each.
    assert (repeated - without)[:, 0] == pytest.approx([0.005, 0.005, 0.01])
    assert (repeated - without)[:, 1] == pytest.approx(0)
    replicates[:2, 1] += np.tile([0.1, -0.1], 4)
    _, noisy = measured_effects(scores, null, task, 2, replicates=replicates)
    # Row by run: squares 4 * 2 * 0.05^2 for each of the two leaves, 3 degrees of freedom each, over 4 rows.
    assert (repeated - noisy)[:, 0] == pytest.approx(np.array([1 / 2, 1 / 2, 1]) * 0.02 / 3 / 4)
    assert (noisy - without)[:, 1] == pytest.approx(0)


@pytest.mark.parametrize("common", [0.0, 0.1])
@pytest.mark.parametrize("n_runs", [2, 3, 5])
def test_variances_of_repeated_runs_are_those_of_the_errors(n_runs: int, common: float) -> None:
    rng = np.random.default_rng(n_runs)
    errors, variances = [], []
    for _ in range(100):
        runs = 0.1 * rng.normal(size=(20, 1, 25)) + common * rng.normal(size=(20, n_runs, 1))
        runs = runs + 0.4 * rng.normal(size=(20, n_runs, 25))
        found = measured_effects(runs.mean(axis=1), np.zeros(25), np.zeros(25, int), 1, replicates=runs)
        errors.append(found[0])
        variances.append(found[1])
    assert 0.85 < np.mean(variances) / np.mean(np.square(errors)) < 1.2


def test_scores_that_do_not_fit_are_refused() -> None:
    scores, null, task = np.zeros((2, 3)), np.zeros(3), np.array([0, 1, 1])
    with pytest.raises(HarpError, match="do not fit"):
        measured_effects(scores, np.zeros(4), task, 2)
    with pytest.raises(HarpError, match="needs proxy rows"):
        measured_effects(scores, null, task, 3)
    with pytest.raises(HarpError, match="finite"):
        measured_effects(np.full((2, 3), np.nan), null, task, 2)


# Closed forms, with fixed variances


def no_trend(m, u):
    return Trend(np.zeros(m), np.zeros(u), 0.0, 0.0)


def fixed(y, noise, among, across, signal, leaf):
    return averaged(
        np.array(y, float), np.array(noise, float), np.array([among], float), np.array([across], float),
        np.array([signal]), np.array([leaf]), np.zeros(1), no_trend(len(y), len(across)),
    )  # fmt: skip


def averaged(y, noise, among, across, signal, leaf, log_prior, trend):
    known = likelihoods(y, trend.measured, noise, among, signal, leaf)
    return average(y, noise, among, across, signal, leaf, log_prior, trend, known)


def test_one_measurement_of_two_related_leaves_by_hand() -> None:
    parts = fixed([0.3], [0.04], [[1]], [[0.5]], signal=0.2, leaf=0.1)
    assert parts.measured_mean == pytest.approx([0.3])
    assert parts.measured_variance == pytest.approx([0.04])
    # phi_2 - y = (phi_2 - phi_1) - noise, and the flat mean cancels in phi_2 - phi_1.
    assert parts.other_mean == pytest.approx([0.3])
    assert parts.other_variance == pytest.approx([2 * 0.3 - 2 * 0.5 * 0.2 + 0.04])


def test_two_unrelated_leaves_shrink_to_their_mean_by_hand() -> None:
    v, n = 0.3, 0.1
    parts = fixed([0.0, 0.8], [n, n], np.eye(2), [[0, 0]], signal=0.2, leaf=0.1)
    assert parts.measured_mean == pytest.approx([0.4 - 0.4 * v / (v + n), 0.4 + 0.4 * v / (v + n)])
    assert parts.measured_variance == pytest.approx([n - n**2 / (v + n) / 2] * 2)
    assert parts.other_mean == pytest.approx([0.4])
    assert parts.other_variance == pytest.approx([v + (v + n) / 2])


def random_case(seed: int, m: int = 5, u: int = 4) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(m + u, 2))
    correlation = np.exp(-((points[:, None] - points) ** 2).sum(axis=2) / 2)
    return rng.normal(size=m), rng.uniform(0.05, 0.3, m), correlation


def test_fixed_variances_give_the_gaussian_conditional() -> None:
    y, noise, correlation = random_case(0)
    # A flat mean is the limit of a very wide one.
    joint = 0.7 * correlation + 0.2 * np.eye(9) + 1e5
    gain = joint[:, :5] @ np.linalg.inv(joint[:5, :5] + np.diag(noise))
    mean, variance = gain @ y, np.diag(joint - gain @ joint[:5])
    parts = fixed(y, noise, correlation[:5, :5], correlation[5:, :5], signal=0.7, leaf=0.2)
    assert np.concatenate([parts.measured_mean, parts.other_mean]) == pytest.approx(mean, abs=1e-5)
    assert np.concatenate([parts.measured_variance, parts.other_variance]) == pytest.approx(variance, abs=3e-5)


def test_a_trend_gives_the_gaussian_conditional_of_effects_with_a_random_slope() -> None:
    rng = np.random.default_rng(5)
    y, noise, correlation = random_case(5)
    z, others = rng.normal(size=5), rng.normal(size=4)
    found = averaged(
        y, noise, correlation[None, :5, :5], correlation[None, 5:, :5], np.array([0.7]), np.array([0.2]), np.zeros(1),
        Trend(z, others, 0.4, 0.3),
    )  # fmt: skip
    everyone = np.concatenate([z, others])
    joint = 0.7 * correlation + 0.2 * np.eye(9) + 0.3 * np.outer(everyone, everyone) + 1e5
    gain = joint[:, :5] @ np.linalg.inv(joint[:5, :5] + np.diag(noise))
    mean = 0.4 * everyone + gain @ (y - 0.4 * z)
    variance = np.diag(joint - gain @ joint[:5])
    assert np.concatenate([found.measured_mean, found.other_mean]) == pytest.approx(mean, abs=3e-5)
    assert np.concatenate([found.measured_variance, found.other_variance]) == pytest.approx(variance, abs=1e-4)


def test_a_slope_is_that_of_generalised_least_squares() -> None:
    rng = np.random.default_rng(6)
    y, noise, correlation = random_case(6)
    among = correlation[None, :5, :5]
    z = rng.normal(size=5)
    covariance = 0.7 * among[0] + np.diag(noise + 0.2)
    design = np.stack([np.ones(5), z], axis=1)
    information = design.T @ np.linalg.solve(covariance, design)
    expected = np.linalg.solve(information, design.T @ np.linalg.solve(covariance, y))
    known = likelihoods(y, z, noise, among, np.array([0.7]), np.array([0.2]))
    estimate, variance = slope(known, np.zeros(1), z)
    assert estimate == pytest.approx(expected[1], abs=1e-5)
    assert variance == pytest.approx(np.linalg.inv(information)[1, 1], abs=1e-5)
    assert slope(known, np.zeros(1), np.full(5, 0.1)) == (0.0, np.inf)


def test_tasks_tell_each_other_how_far_similarity_can_be_believed() -> None:
    vague = SLOPE_SD**2 + np.square(SLOPE_SPREADS).mean()
    assert pooled_slope(np.empty((0, 2))) == pytest.approx((0, vague)), "nothing known but the prior"
    assert pooled_slope(np.array([[0.0, np.inf]])) == pytest.approx((0, vague)), "a task that says nothing"
    agreed, spread = pooled_slope(np.tile([0.8, 1e-4], (30, 1)))
    assert agreed == pytest.approx(0.8, abs=0.01)
    assert spread < 0.02
    wide = pooled_slope(np.stack([np.tile([-1.0, 1.0], 15), np.full(30, 1e-4)], axis=1))
    assert wide[0] == pytest.approx(0, abs=0.02)
    assert wide[1] > 0.9, "tasks that disagree leave the next one free"


def test_the_average_weighs_by_restricted_likelihood_and_adds_the_spread_of_means() -> None:
    y, noise, first = random_case(1)
    correlations = np.stack([first, first**3])
    signal, leaf, log_prior = np.array([0.1, 0.9]), np.array([0.4, 0.05]), np.array([0.0, -0.3])
    contrasts = np.linalg.svd(np.ones((1, 5)))[2][1:]
    weights, means, variances = [], [], []
    for correlation in correlations:
        for s, g, prior in zip(signal, leaf, log_prior, strict=True):
            # The restricted likelihood is the likelihood of the contrasts, in which the mean plays no part.
            covariance = contrasts @ (s * correlation[:5, :5] + np.diag(g + noise)) @ contrasts.T
            z = contrasts @ y
            density = np.exp(-0.5 * z @ np.linalg.solve(covariance, z)) / np.sqrt(np.linalg.det(covariance))
            weights.append(density * np.exp(prior))
            one = fixed(y, noise, correlation[:5, :5], correlation[5:, :5], s, g)
            means.append(np.concatenate([one.measured_mean, one.other_mean]))
            variances.append(np.concatenate([one.measured_variance, one.other_variance]))
    weights = np.array(weights) / np.sum(weights)
    mean = weights @ np.array(means)
    variance = weights @ (np.array(variances) + (np.array(means) - mean) ** 2)
    parts = averaged(
        y, noise, correlations[:, :5, :5], correlations[:, 5:, :5], signal, leaf, log_prior, no_trend(5, 4)
    )  # fmt: skip
    assert np.concatenate([parts.measured_mean, parts.other_mean]) == pytest.approx(mean, abs=1e-6)
    assert np.concatenate([parts.measured_variance, parts.other_variance]) == pytest.approx(variance, abs=1e-6)


def test_likelihoods_without_a_slope_tell_the_weights_with_one() -> None:
    y, noise, correlation = random_case(7)
    z = np.random.default_rng(7).normal(size=5)
    among = np.stack([correlation, correlation**3])[:, :5, :5]
    signal, leaf, log_prior = np.array([0.0, 0.7]), np.array([0.3, 0.2]), np.array([0.2, 0.0])
    contrasts = np.linalg.svd(np.ones((1, 5)))[2][1:]

    def restricted(y, covariance):
        """Log-likelihood of the contrasts, in which the mean plays no part."""
        inner = contrasts @ covariance @ contrasts.T
        seen = contrasts @ y
        return -0.5 * (np.linalg.slogdet(inner)[1] + seen @ np.linalg.solve(inner, seen))

    known = likelihoods(y, z, noise, among, signal, leaf)
    with_slope = np.empty((2, 2))
    for k, matrix in enumerate(among):
        precision = solve(noise, matrix, signal, leaf)[0]
        assert known[1, k] == pytest.approx(precision @ y @ z)
        assert known[2, k] == pytest.approx(precision @ z @ z)
        for j in range(2):
            covariance = signal[j] * matrix + np.diag(noise + leaf[j])
            assert known[0, k, j] == pytest.approx(restricted(y, covariance))
            with_slope[k, j] = restricted(y - 0.4 * z, covariance + 0.3 * np.outer(z, z)) + log_prior[j]
    expected = np.exp(with_slope) / np.exp(with_slope).sum()
    assert grid_weights(known, log_prior, 0.4, 0.3) == pytest.approx(expected)


def family_of_points(spread: float) -> tuple[np.ndarray, ...]:
    """Effects, noise and correlations of 12 measured leaves, two of them `spread` apart, and 9 others."""
    rng = np.random.default_rng(8)
    points = rng.normal(size=(21, 3))
    points[1] = points[0] + spread
    correlation = np.exp(-((points[:, None] - points) ** 2).sum(axis=2) / 2)
    return rng.normal(size=12), rng.uniform(0.05, 0.3, 12), correlation[None, :12, :12], correlation[None, 12:, :12]


@pytest.mark.parametrize(
    ("spread", "noise", "own", "single"), [(1.0, 1.0, 0.2, True), (1.0, 0.0, 0.2, True), (1e-5, 0.0, 0.0, False)]
)
def test_single_precision_serves_where_it_changes_next_to_nothing(spread, noise, own, single, monkeypatch) -> None:
    monkeypatch.setattr("harp_hf.kriging._BLOCK", 4)
    y, variances, among, across = family_of_points(spread)
    rng = np.random.default_rng(9)
    grid = np.array([0.7, 1.4]), np.full(2, own), np.zeros(2)
    trend = Trend(np.arange(12) // 2 - 2.5, rng.normal(size=9), 0.4, 0.3)
    found = averaged(y, noise * variances + 1e-8, among, across, *grid, trend)
    monkeypatch.setattr("harp_hf.kriging._SINGLE", 0)
    exact = averaged(y, noise * variances + 1e-8, among, across, *grid, trend)
    assert np.array_equal(found.other_mean, exact.other_mean)
    assert found.other_variance == pytest.approx(exact.other_variance, rel=0, abs=1e-5)
    assert np.array_equal(found.other_variance, exact.other_variance) != single


# The whole inference


@pytest.mark.parametrize("m", [36, 54])
@pytest.mark.parametrize(
    ("prior", "simulate"), [("nested", nested_effects), ("smooth", smooth_effects), ("smooth", nested_effects)]
)
def test_intervals_are_honest_and_errors_smaller_than_with_no_or_complete_pooling(prior, simulate, m: int) -> None:
    rng = np.random.default_rng(2)
    hierarchy = family()
    phi = simulate(hierarchy, 60, rng)
    measured = one_in_each_parent_first(hierarchy, m, rng)
    variances = 0.03**2 * rng.uniform(0.5, 2, size=(m, 60))
    effects = phi[measured] + np.sqrt(variances) * rng.normal(size=(m, 60))
    posterior = infer(effects, variances, measured, hierarchy, prior=prior)
    assert len(posterior.notes) == (1 if m == 36 and prior == "nested" else 0)

    others = np.setdiff1d(np.arange(288), measured)
    within = np.abs(phi - posterior.mean) < 1.645 * posterior.sd
    assert 0.85 < within[others].mean() < 0.95
    assert 0.85 < within[measured].mean() < 0.95

    precise = 1 / variances
    grand_mean = (effects * precise).sum(axis=0) / precise.sum(axis=0)
    unpooled = np.zeros_like(phi)
    unpooled[measured] = effects
    error = ((posterior.mean - phi) ** 2).mean()
    assert error < 0.9 * ((unpooled - phi) ** 2).mean()
    assert error < 0.9 * ((grand_mean - phi) ** 2).mean()
    assert ((posterior.mean - phi)[measured] ** 2).mean() < ((effects - phi[measured]) ** 2).mean()


def test_similarity_that_matters_lowers_the_error_and_similarity_that_does_not_costs_little() -> None:
    hierarchy = family()
    errors: dict[str, list[float]] = {"without": [], "told": [], "misled": []}
    inside = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        similarity = rng.gamma(0.5, size=(288, 4))
        truth = smooth_effects(hierarchy, 4, rng) + 0.1 * similarity
        measured = one_in_each_parent_first(hierarchy, 40, rng)
        noise = np.full((40, 4), 0.02**2)
        effects = truth[measured] + 0.02 * rng.normal(size=(40, 4))
        hidden = np.setdiff1d(np.arange(288), measured)
        for name, given_ in (("without", None), ("told", similarity), ("misled", rng.gamma(0.5, size=(288, 4)))):
            found = infer(effects, noise, measured, hierarchy, similarity=given_)
            errors[name].append(float(((found.mean - truth)[hidden] ** 2).mean()))
            if name == "told":
                inside.append(np.abs(found.mean - truth)[hidden] < 1.645 * found.sd[hidden])
    without, told, misled = (np.mean(errors[name]) for name in ("without", "told", "misled"))
    assert told < 0.6 * without
    assert misled < 1.05 * without
    assert 0.85 < np.mean(inside) < 0.95


def test_one_similar_leaf_that_explains_everything_does_not_make_the_others_known() -> None:
    rng = np.random.default_rng(4)
    hierarchy = family(6, 5, 2)
    similarity = rng.gamma(0.3, 0.3, size=(30, 4))
    measured = rng.permutation(30)[:12]
    similarity[measured[np.arange(4)], np.arange(4)] = 20
    effects = 0.005 * rng.normal(size=(12, 4)) + 0.025 * similarity[measured]
    posterior = infer(effects, np.full((12, 4), 0.005**2), measured, hierarchy, similarity=similarity)
    hidden = np.setdiff1d(np.arange(30), measured)
    assert (posterior.sd[hidden] > 0.1 * effects.std(axis=0)).all()


def test_similarity_that_is_rounding_alone_says_nothing() -> None:
    effects, variances, measured, hierarchy = small_case()
    similarity = 1 - 2e-16 * np.random.default_rng(0).integers(0, 2, (hierarchy.n_leaves, 3))
    found = infer(effects, variances, measured, hierarchy, similarity=similarity)
    flat = infer(effects, variances, measured, hierarchy, similarity=np.ones_like(similarity))
    assert np.array_equal(found.mean, flat.mean)
    assert np.array_equal(found.sd, flat.sd)


@pytest.fixture(params=PRIORS)
def prior(request: pytest.FixtureRequest) -> str:
    return request.param


def small_case(m: int = 10, n_tasks: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray, Hierarchy]:
    rng = np.random.default_rng(m)
    hierarchy = family(6, 5, 2)
    variances = 0.02**2 * rng.uniform(0.5, 2, size=(m, n_tasks))
    return 0.1 * rng.normal(size=(m, n_tasks)), variances, rng.permutation(30)[:m], hierarchy


def test_a_measurement_with_hardly_any_noise_is_reproduced(prior: str) -> None:
    effects, variances, measured, hierarchy = small_case()
    variances[4] = 1e-10
    posterior = infer(effects, variances, measured, hierarchy, prior=prior)
    assert posterior.mean[measured[4]] == pytest.approx(effects[4], abs=1e-4)
    assert np.all(posterior.sd[measured[4]] < 1e-4)
    exact = infer(effects, np.zeros_like(variances), measured, hierarchy, prior=prior)
    assert exact.mean[measured] == pytest.approx(effects, abs=1e-4)


def test_the_answer_moves_with_the_effects(prior: str) -> None:
    effects, variances, measured, hierarchy = small_case()
    posterior = infer(effects, variances, measured, hierarchy, prior=prior)
    shifted = infer(effects + 5, variances, measured, hierarchy, prior=prior)
    assert shifted.mean == pytest.approx(posterior.mean + 5, abs=1e-8)
    assert shifted.sd == pytest.approx(posterior.sd, rel=1e-6)


@pytest.mark.parametrize("m", [1, 10])
def test_the_answer_scales_with_the_effects(prior: str, m: int) -> None:
    effects, variances, measured, hierarchy = small_case(m)
    posterior = infer(effects, variances, measured, hierarchy, prior=prior)
    scaled = infer(-40 * effects, 1600 * variances, measured, hierarchy, prior=prior)
    assert scaled.mean == pytest.approx(-40 * posterior.mean, abs=1e-8)
    assert scaled.sd == pytest.approx(40 * posterior.sd, rel=1e-6)


def test_the_answer_does_not_depend_on_the_order_of_leaves_measurements_or_tasks(prior: str) -> None:
    effects, variances, measured, hierarchy = small_case()
    posterior = infer(effects, variances, measured, hierarchy, prior=prior)
    rng = np.random.default_rng(9)
    new, order, tasks = rng.permutation(30), rng.permutation(10), rng.permutation(3)
    old = np.argsort(new)
    renamed = Hierarchy(
        leaf=new[hierarchy.leaf].astype(np.int32),
        parent=hierarchy.parent[old],
        large=hierarchy.large,
        centroids=hierarchy.centroids[old],
        parent_centroids=hierarchy.parent_centroids,
        distance=hierarchy.distance,
    )
    permuted = infer(effects[order][:, tasks], variances[order][:, tasks], new[measured[order]], renamed, prior=prior)
    assert permuted.mean[new] == pytest.approx(posterior.mean[:, tasks], abs=1e-9)
    assert permuted.sd[new] == pytest.approx(posterior.sd[:, tasks], rel=1e-6)


def test_related_leaves_learn_most_from_a_measurement() -> None:
    hierarchy = family(6, 5, 2)
    measured = np.arange(0, 30, 2)
    effects = np.where(hierarchy.parent[measured] == 2, 0.5, 0.0)[:, None] + 0.01 * (np.arange(15) % 2)[:, None]
    mean = infer(effects, np.full_like(effects, 1e-4), measured, hierarchy, prior="nested").mean[:, 0]
    assert mean[[11, 13]].min() > 0.35
    # All that is known of an unmeasured leaf is its family.
    assert mean[11] == pytest.approx(mean[13])
    assert np.abs(np.delete(mean, np.arange(10, 15))).max() < 0.1


@pytest.mark.parametrize("m", [1, 2, 3, 7])
def test_few_measurements_still_give_a_wide_answer_and_a_note(prior: str, m: int) -> None:
    rng = np.random.default_rng(4)
    hierarchy = family()
    phi = nested_effects(hierarchy, 150, rng)
    measured = one_in_each_parent_first(hierarchy, 36, rng)[rng.permutation(36)[:m]]
    effects = phi[measured] + 0.02 * rng.normal(size=(m, 150))
    posterior = infer(effects, np.full_like(effects, 0.02**2), measured, hierarchy, prior=prior)
    assert len(posterior.notes) == 1
    assert str(m) in posterior.notes[0]
    assert np.isfinite(posterior.mean).all()
    assert np.all(posterior.sd > 0)
    others = np.setdiff1d(np.arange(288), measured)
    assert np.all(posterior.sd[others].min(axis=0) >= posterior.sd[measured].max(axis=0) * 0.99)
    assert (np.abs(phi - posterior.mean) < 1.645 * posterior.sd)[others].mean() > (0.6 if m == 1 else 0.8)


@settings(max_examples=25)
@given(
    st.integers(1, 6),
    st.sampled_from([0.0, 1e-12, 1e-3, 1.0]),
    st.sampled_from([0.0, 1e-6, 0.1]),
    st.sampled_from(PRIORS),
)
def test_degenerate_effects_give_finite_answers(m: int, noise: float, spread: float, prior: str) -> None:
    hierarchy = family(3, 2, 1)
    hierarchy.centroids[:] = hierarchy.centroids[0]
    effects = spread * np.random.default_rng(m).normal(size=(m, 2))
    posterior = infer(effects, np.full_like(effects, noise), np.arange(m), hierarchy, prior=prior)
    assert np.isfinite(posterior.mean).all()
    assert np.isfinite(posterior.sd).all()
    assert np.abs(posterior.mean).max() <= np.abs(effects).max() * 1.5 + 1e-9


def test_similarities_that_do_not_fit_are_refused() -> None:
    effects, variances, measured, hierarchy = small_case()
    for wrong in (np.ones((3, 3)), np.full((hierarchy.n_leaves, 3), np.nan)):
        with pytest.raises(HarpError, match="Similarities"):
            infer(effects, variances, measured, hierarchy, similarity=wrong)


def test_input_that_does_not_fit_is_refused() -> None:
    effects, variances, measured, hierarchy = small_case()
    for message, arguments in (
        ("prior", (effects, variances, measured, hierarchy, "flat")),
        ("single measured leaf", (effects[:0], variances[:0], measured[:0], hierarchy, "nested")),
        ("do not fit", (effects[:5], variances, measured, hierarchy, "nested")),
        ("distinct", (effects, variances, np.zeros(10, int), hierarchy, "nested")),
        ("distinct", (effects, variances, measured + 25, hierarchy, "nested")),
        ("finite", (effects * np.nan, variances, measured, hierarchy, "nested")),
        ("at least 0", (effects, -variances, measured, hierarchy, "nested")),
    ):
        with pytest.raises(HarpError, match=message):
            infer(*arguments[:4], prior=arguments[4])


# Active tasks


def test_tasks_without_effects_are_rarely_active_and_tasks_with_effects_are() -> None:
    rng = np.random.default_rng(5)
    variances = np.full((40, 100), 0.03**2)
    noise = 0.03 * rng.normal(size=(40, 100))
    assert active_tasks(noise, variances).sum() <= 1
    moved = noise.copy()
    moved[:, :20] += 0.06 * rng.normal(size=(40, 20))
    active = active_tasks(moved, variances)
    assert active[:20].all()
    assert active[20:].sum() <= 7


def test_more_false_discoveries_allowed_make_more_tasks_active() -> None:
    rng = np.random.default_rng(6)
    effects, variances = rng.normal(size=(5, 60)) * 1.3, np.ones((5, 60))
    few, many = (active_tasks(effects, variances, fdr=fdr) for fdr in (0.01, 0.5))
    assert np.all(many | ~few)
    assert many.sum() > few.sum()
