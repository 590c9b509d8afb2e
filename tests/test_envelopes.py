"""Both envelopes and the greedy order under them, against a plain reference."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harp_hf.envelopes import VARIANTS, greedy, predict
from harp_hf.errors import HarpError

EPS = 1e-9


def clip(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def reference_scores(phi: list[list[float]], null: list[float], leaves: list[int], variant: str) -> list[float]:
    scores = []
    for d, b in enumerate(null):
        effects = [phi[g][d] for g in leaves]
        if variant == "harp-e":
            scores.append(clip(b + sum(effects)))
        else:
            gain = max([max(e, 0) for e in effects], default=0)
            scores.append(clip(b + gain - sum(max(-e, 0) for e in effects)))
    return scores


def reference_greedy(
    phi: list[list[float]], null: list[float], weights: list[float], variant: str
) -> tuple[list[int], list[float], int]:
    def objective(leaves: list[int]) -> float:
        return sum(w * y for w, y in zip(weights, reference_scores(phi, null, leaves, variant), strict=True))

    means = [sum(w * e for w, e in zip(weights, row, strict=True)) for row in phi]
    order: list[int] = []
    values = [objective([])]
    while len(order) < len(phi):
        reached = {g: objective([*order, g]) for g in range(len(phi)) if g not in order}
        best = [g for g, value in reached.items() if value > max(reached.values()) - EPS]
        best = [g for g in best if means[g] > max(means[h] for h in best) - EPS]
        order.append(min(best))
        values.append(reached[order[-1]])
    gains = [after - before for before, after in pairwise(values)]
    return order, gains, next(k for k, value in enumerate(values) if value > max(values) - EPS)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers on a coarse grid, so that ties and clipping are common and well apart from rounding."""
    n_leaves, n_tasks = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    step = draw(st.sampled_from([8, 10]))
    effect = st.integers(-step, step).map(lambda k: k / step)
    phi = draw(st.lists(st.lists(effect, min_size=n_tasks, max_size=n_tasks), min_size=n_leaves, max_size=n_leaves))
    null = draw(st.lists(st.integers(0, step).map(lambda k: k / step), min_size=n_tasks, max_size=n_tasks))
    weights = draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=n_tasks, max_size=n_tasks))
    return np.array(phi), np.array(null), np.array(weights)


def test_both_envelopes_on_an_example_by_hand() -> None:
    phi = np.array([[0.3, -0.1, 0.4], [0.2, -0.2, 0.4], [-0.1, 0.1, 0.0]])
    null = np.array([0.5, 0.2, 0.4])
    assert predict(phi, null, [0, 1, 2], "harp-c") == pytest.approx([0.5 + 0.3 - 0.1, 0.0, 0.8])
    assert predict(phi, null, [0, 1, 2], "harp-e") == pytest.approx([0.9, 0.0, 1.0])
    assert predict(phi, null, [2], "harp-c") == pytest.approx([0.4, 0.3, 0.4])
    for variant in VARIANTS:
        assert predict(phi, null, [], variant) == pytest.approx(null)


def test_greedy_on_an_example_by_hand() -> None:
    phi = np.array([[0.2, 0.0], [0.0, 0.2], [0.1, 0.1], [-0.3, 0.1]])
    null = np.array([0.5, 0.5])
    order = greedy(phi, null, np.ones(2), variant="harp-c")
    assert order.leaves.tolist() == [0, 1, 2, 3]
    assert order.gains == pytest.approx([0.2, 0.2, 0, -0.3])
    assert order.best_prefix == 2
    assert greedy(phi, null, np.ones(2), variant="harp-e").best_prefix == 3


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=200)
@given(problem=problems())
def test_greedy_equals_the_reference(variant: str, problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    phi, null, weights = problem
    order = greedy(phi, null, weights, variant=variant)
    leaves, gains, best_prefix = reference_greedy(phi.tolist(), null.tolist(), weights.tolist(), variant)
    assert order.leaves.tolist() == leaves
    assert order.gains == pytest.approx(gains, abs=1e-9)
    assert order.best_prefix == best_prefix
    for size in range(len(leaves) + 1):
        expected = reference_scores(phi.tolist(), null.tolist(), leaves[:size], variant)
        assert predict(phi, null, order.leaves[:size], variant) == pytest.approx(expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 0.05), (0.02, 0.1), (-0.03, 0.3)])
def test_greedy_equals_the_reference_while_tasks_fill_up_and_run_empty(
    variant: str, shift: float, scale: float
) -> None:
    rng = np.random.default_rng(0)
    phi, null, weights = rng.normal(shift, scale, (40, 5)), rng.random(5), rng.uniform(0.2, 2, 5)
    order = greedy(phi, null, weights, variant=variant)
    leaves, gains, best_prefix = reference_greedy(phi.tolist(), null.tolist(), weights.tolist(), variant)
    assert order.leaves.tolist() == leaves
    assert order.gains == pytest.approx(gains, abs=1e-9)
    assert order.best_prefix == best_prefix


@pytest.mark.parametrize("variant", VARIANTS)
def test_ties_go_to_the_larger_mean_then_to_the_smaller_id(variant: str) -> None:
    # All of the last three fill the task up to 1.
    phi = np.array([[0.0], [0.6], [0.7], [0.7]])
    order = greedy(phi, np.array([0.5]), np.ones(1), variant=variant)
    assert order.leaves.tolist() == [2, 3, 1, 0]
    assert order.best_prefix == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_where_no_leaf_helps_nothing_is_selected(variant: str) -> None:
    order = greedy(np.array([[-0.1], [0.0]]), np.array([0.5]), np.ones(1), variant=variant)
    assert order.best_prefix == 0


def test_bad_input_is_refused() -> None:
    phi, null = np.zeros((3, 2)), np.zeros(2)
    with pytest.raises(HarpError, match="variant"):
        predict(phi, null, [0], "harp-x")
    with pytest.raises(HarpError, match="do not fit"):
        predict(phi, np.zeros(3), [0], "harp-c")
    with pytest.raises(HarpError, match="finite"):
        predict(np.full((3, 2), np.nan), null, [0], "harp-c")
    with pytest.raises(HarpError, match="weights"):
        greedy(phi, null, np.array([1.0, -1.0]), variant="harp-c")
