"""The cost model of steps and the choice of a layout by it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csps.core.plan import Lane, Layout, StepPlan, Work
from csps.core.shards import Slice
from csps.sched.cost import CostModel, Sample, StepShape, fit, shape_of
from csps.sched.layout import CheapestLayout, FixedLayout, TokenThreshold

TRUE = CostModel(0.03, 2e-4, 1e-3, 3e-9, 4e-7)


def work(seq_id: int, start: int, num_tokens: int) -> Work:
    slices = (Slice(0, start, start + num_tokens),)
    return Work(seq_id, start, (7,) * num_tokens, slices)


def plan(*items: tuple[int, int]) -> StepPlan:
    return StepPlan(Lane.MIXED, 0, tuple(work(i, *item) for i, item in enumerate(items)))


def samples(noise: float, seed: int = 0) -> list[Sample]:
    generator = np.random.default_rng(seed)
    shapes = [
        StepShape(n, m, n * c, m * c)
        for n, m in ((1, 1), (8, 8), (64, 64), (256, 256), (512, 1), (520, 9), (128, 2))
        for c in (64, 1000, 4000)
    ]
    return [
        Sample(shape, TRUE.predict(shape) * (1 + noise * generator.standard_normal()))
        for shape in shapes
    ]


def test_shape_counts_pairs_of_chunks_and_keys_of_single_tokens():
    shape = shape_of(plan((10, 1), (0, 1), (5, 3)))
    assert shape == StepShape(5, 3, (6 + 7 + 8), (11 + 1))


def test_fit_finds_the_model_that_made_the_samples():
    model = fit(samples(0.0))
    for sample in samples(0.0):
        assert model.predict(sample.shape) == pytest.approx(sample.seconds, rel=1e-3)


def test_fit_is_close_under_noise_on_shapes_it_has_not_seen():
    model = fit(samples(0.1))
    for shape in (StepShape(32, 32, 0, 32 * 500), StepShape(300, 40, 261 * 2000, 39 * 900)):
        assert model.predict(shape) == pytest.approx(TRUE.predict(shape), rel=0.15)


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            Sample,
            st.builds(
                StepShape,
                st.integers(1, 4096),
                st.integers(1, 256),
                st.integers(0, 10**8),
                st.integers(0, 10**6),
            ),
            st.floats(1e-4, 100.0),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_no_coefficient_is_negative(some):
    assert all(cost >= 0.0 for cost in fit(some))


def test_a_noisy_machine_is_predicted_right_on_average():
    """Steps of one shape, of which some take twice as long: the mean, not the usual."""
    shape = StepShape(8, 8, 0, 500)
    seconds = [0.1] * 6 + [0.2] * 3
    model = fit([Sample(shape, value) for value in seconds])
    assert model.predict(shape) == pytest.approx(sum(seconds) / len(seconds), rel=1e-6)


def test_one_sample_is_enough():
    shape = StepShape(10, 2, 0, 100)
    assert fit([Sample(shape, 0.5)]).predict(shape) == pytest.approx(0.5)


def test_the_cheaper_layout_is_taken():
    low_fixed = CostModel(0.01, 1e-3, 0.0, 0.0, 0.0)
    low_slope = CostModel(0.10, 1e-4, 0.0, 0.0, 0.0)
    policy = CheapestLayout({Layout.TP: low_fixed, Layout.SP: low_slope})
    few, many = policy.decide(shape_of(plan((0, 99)))), policy.decide(shape_of(plan((0, 101))))
    assert (few.layout, many.layout) == (Layout.TP, Layout.SP)
    assert few.predicted_s[Layout.TP] == pytest.approx(0.109)


def test_every_few_steps_one_probes_the_other_layout():
    policy = CheapestLayout({Layout.TP: TRUE, Layout.SP: TRUE._replace(fixed_s=9.0)}, probe_every=3)
    layouts = [policy.decide(shape_of(plan((9, 1)))).layout for _ in range(6)]
    assert layouts == [Layout.TP, Layout.TP, Layout.SP] * 2


def test_first_tokens_may_cost_more_than_later_ones():
    true = CostModel(0.02, 5e-4, 8e-3, 0.0, 0.0, first_4_s=0.04, first_64_s=1e-3)
    shapes = [StepShape(n, n, 0, 64 * n) for n in (1, 2, 4, 16, 64, 256)]
    model = fit([Sample(shape, true.predict(shape)) for shape in shapes])
    for n in (3, 8, 32, 128):
        shape = StepShape(n, n, 0, 64 * n)
        assert model.predict(shape) == pytest.approx(true.predict(shape), rel=0.02)


def test_predictions_follow_a_machine_that_slows_down_and_choices_stay():
    policy = CheapestLayout({Layout.TP: TRUE, Layout.SP: TRUE._replace(fixed_s=1.0)})
    step = shape_of(plan((0, 99)))
    first = policy.decide(step)
    policy.observe(first, 100 * first.predicted_s[first.layout])  # one odd step
    assert policy.decide(step).predicted_s[first.layout] < 2 * first.predicted_s[first.layout]
    slow = 3 * first.predicted_s[first.layout]
    for _ in range(60):
        policy.observe(policy.decide(step), slow)
    later = policy.decide(step)
    assert later.layout is first.layout
    assert later.predicted_s[later.layout] == pytest.approx(slow, rel=0.02)
    ratios = [later.predicted_s[layout] / first.predicted_s[layout] for layout in first.predicted_s]
    assert ratios[0] == pytest.approx(ratios[1])


def test_a_threshold_and_a_fixed_layout():
    policy = TokenThreshold(100)
    assert policy.decide(shape_of(plan((0, 100)))).layout is Layout.TP
    assert policy.decide(shape_of(plan((0, 101)))).layout is Layout.SP
    assert FixedLayout(Layout.TP).decide(shape_of(plan((0, 500)))).layout is Layout.TP
