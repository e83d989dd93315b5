"""Sampling: the masks against a plain loop, the draws against their distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dsv4_jax.errors import RequestError
from dsv4_jax.sampling import SamplingArrays, SamplingParams, sample, truncated_logits

sample = jax.jit(sample)
truncated_logits = jax.jit(truncated_logits)


def rows(*params: SamplingParams) -> SamplingArrays:
    return SamplingArrays.stack(params)


def steps(count: int) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)


def random_logits(count: int, vocab: int, seed: int = 0) -> jax.Array:
    return 3 * jax.random.normal(jax.random.key(seed), (count, vocab))


def kept_tokens(logits, params: SamplingParams) -> set[int]:
    """The definition, one token at a time in float64."""
    scaled = np.float64(logits) / params.temperature
    best_first = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    relative = np.exp(scaled - scaled.max())
    kept = [token for token in best_first if relative[token] >= params.min_p]
    if params.top_k:
        kept = kept[: params.top_k]
    mass, wanted, smallest_set = 0.0, params.top_p * relative[kept].sum(), []
    for token in kept:
        if mass < wanted or params.top_p == 1:
            smallest_set.append(token)
        mass += relative[token]
    return set(smallest_set)


def assert_masks_match(logits, params: list[SamplingParams]):
    allowed = np.isfinite(truncated_logits(logits, rows(*params)))
    for row, mask, each in zip(np.asarray(logits), allowed, params, strict=True):
        assert set(np.flatnonzero(mask)) == kept_tokens(row, each), each


@pytest.mark.parametrize("vocab", [1, 7, 64, 1000], ids="vocab={}".format)
def test_masks_match_the_definition_on_random_rows(vocab):
    rng = np.random.default_rng(vocab)
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.3, 1.0, 2.5])),
            top_k=int(rng.choice([0, 1, 5, vocab, 2 * vocab, 2**31 - 1])),
            top_p=float(rng.choice([1.0, 1e-9, 0.5, 0.93, rng.uniform(0.01, 1)])),
            min_p=float(rng.choice([0.0, 0.0, 0.013, rng.uniform(0, 1)])),
        )
        for _ in range(200)
    ]

    assert_masks_match(random_logits(200, vocab, seed=vocab), params)


def test_masks_match_the_definition_on_rows_full_of_ties():
    rng = np.random.default_rng(0)
    # Two values only, and top_p away from any sum of their probabilities.
    logits = jnp.asarray(rng.integers(0, 2, (200, 12)), jnp.float32)
    params = [SamplingParams(top_k=int(rng.integers(0, 13)), top_p=float(rng.uniform())) for _ in range(200)]

    assert_masks_match(logits, params)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(top_k=2), [0, 1]),
        (SamplingParams(top_p=0.5), [0, 1]),
        (SamplingParams(top_p=0.51), [0, 1, 2]),
        (SamplingParams(top_k=2, top_p=0.5), [0]),
        (SamplingParams(min_p=1.0), [0, 1, 2, 3]),
        (SamplingParams(temperature=0.0), [0]),
    ],
    ids=["top-k", "top-p reached", "top-p not yet reached", "top-p after top-k", "min-p", "greedy"],
)
def test_the_smaller_ids_of_four_equal_tokens_stay(params, kept):
    allowed = np.isfinite(truncated_logits(jnp.zeros((1, 4)), rows(params)))

    np.testing.assert_array_equal(np.flatnonzero(allowed), kept)


def test_min_p_is_measured_after_the_temperature():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))  # squared by temperature 0.5: 0.25, 0.09, 0.04

    allowed = np.isfinite(truncated_logits(logits, rows(SamplingParams(temperature=0.5, min_p=0.3))))

    np.testing.assert_array_equal(allowed, [[True, True, False]])


def test_a_row_without_truncation_keeps_every_token_beside_one_with():
    logits = random_logits(2, 50_000)

    both = truncated_logits(logits, rows(SamplingParams(), SamplingParams(top_k=3)))

    alone = truncated_logits(logits[:1], rows(SamplingParams()))
    np.testing.assert_array_equal(both[:1], alone)
    assert np.isfinite(alone).all()


def test_greedy_takes_the_most_likely_token_and_the_smaller_id_of_a_tie():
    logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 1.0, 3.0]])
    greedy = SamplingParams(temperature=0.0, top_k=2, top_p=0.3, min_p=0.9)

    tokens, _ = sample(logits, rows(greedy, greedy), steps(2))

    np.testing.assert_array_equal(tokens, [1, 0])


@pytest.mark.parametrize(
    "narrow",
    [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-60}, {"temperature": 1e-30}, {"temperature": 1e-42}],
    ids=str,
)
def test_the_narrowest_sampling_equals_greedy(narrow):
    logits = random_logits(64, 100)

    narrowed, _ = sample(logits, rows(*[SamplingParams(**narrow)] * 64), steps(64))

    np.testing.assert_array_equal(narrowed, jnp.argmax(logits, axis=-1))


def test_logprobs_are_those_of_the_untempered_model():
    logits = random_logits(3, 40) + 1000
    params = rows(
        SamplingParams(temperature=0.0), SamplingParams(temperature=0.2), SamplingParams(top_k=2, top_p=0.1)
    )

    tokens, logprobs = sample(logits, params, steps(3))

    raw = np.asarray(logits, np.float64)
    expected = [
        row[token] - np.log(np.exp(row - 1000).sum()) - 1000 for row, token in zip(raw, tokens, strict=True)
    ]
    assert tokens.dtype == jnp.int32
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5)


@pytest.mark.parametrize("varied", ["step", "seed"])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=2.0, top_k=5, top_p=0.9, min_p=0.05)],
    ids=["plain", "truncated"],
)
def test_draws_follow_the_distribution(params, varied):
    draws = 20_000
    row = jnp.log(jnp.array([0.05, 0.4, 0.02, 0.25, 0.15, 0.13]))
    sampling = rows(*[params] * draws)
    step = jnp.zeros(draws, jnp.int32)
    if varied == "step":
        step = steps(draws)
    else:
        sampling = dataclasses.replace(sampling, seed=jnp.arange(draws, dtype=jnp.uint32))

    tokens, _ = sample(jnp.tile(row, (draws, 1)), sampling, step)

    kept = sorted(kept_tokens(row, params))
    weights = np.exp(np.float64(row)[kept] / params.temperature)
    counts = np.bincount(tokens, minlength=len(row))
    assert counts[kept].sum() == draws
    assert scipy.stats.chisquare(counts[kept], draws * weights / weights.sum()).pvalue > 0.001


def test_the_draw_is_independent_of_neighbours_and_of_the_batch_size():
    count = 16
    logits = random_logits(count, 257)
    params = [
        SamplingParams(
            temperature=[1.0, 0.0, 0.7, 1.3][row % 4],
            top_k=[0, 0, 20][row % 3],
            top_p=[1.0, 0.8][row % 2],
            seed=2**32 - 1 - row,
        )
        for row in range(count)
    ]

    together = sample(logits, rows(*params), steps(count))

    for row in range(count):
        alone = sample(logits[row : row + 1], rows(params[row]), steps(count)[row : row + 1])
        assert alone[0][0] == together[0][row]
        # XLA sums a lone row in another order than a row of many: the last bits of a logprob may differ.
        np.testing.assert_allclose(alone[1][0], together[1][row], rtol=2**-20)


def test_other_neighbours_leave_every_bit_of_a_row_alone():
    params = SamplingParams(top_p=0.8, seed=5)
    logits = random_logits(8, 257)
    greedy = rows(params, *[SamplingParams(temperature=0.0)] * 7)
    mixed = rows(params, *[SamplingParams(top_k=3, min_p=0.1, seed=seed) for seed in range(7)])

    quiet = sample(logits, greedy, steps(8))
    loud = sample(logits.at[1:].multiply(-2), mixed, steps(8).at[1:].add(100))

    for one, other in zip(quiet, loud, strict=True):
        assert one[0] == other[0]


def test_a_seed_repeats_and_steps_differ():
    flat = jnp.zeros((1, 1000))
    sampling = rows(SamplingParams(seed=7))

    first, again = (sample(flat, sampling, steps(1))[0].item() for _ in range(2))
    drawn = {sample(flat, sampling, jnp.array([step], jnp.int32))[0].item() for step in range(20)}

    assert first == again
    assert len(drawn) > 15


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_logits_that_are_not_numbers_do_not_crash_or_reach_other_rows(temperature):
    logits = random_logits(2, 16)
    sampling = rows(*[SamplingParams(temperature=temperature, top_k=4)] * 2)

    healthy, _ = sample(logits, sampling, steps(2))
    broken, logprobs = sample(logits.at[0].set(jnp.nan), sampling, steps(2))

    assert 0 <= broken[0] < 16
    assert np.isnan(logprobs[0])
    assert broken[1] == healthy[1]


def test_a_token_with_no_probability_is_never_drawn():
    logits = jnp.tile(jnp.array([-jnp.inf, 0.0, -jnp.inf, 1.0]), (500, 1))

    tokens, logprobs = sample(logits, rows(*[SamplingParams(temperature=50.0)] * 500), steps(500))

    assert set(tokens.tolist()) == {1, 3}
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", -1.0, "a finite number >= 0"),
        ("temperature", float("nan"), "a finite number >= 0"),
        ("temperature", float("inf"), "a finite number >= 0"),
        ("temperature", 1e39, "a finite number >= 0"),
        ("temperature", "1", "a finite number >= 0"),
        ("temperature", None, "a finite number >= 0"),
        ("temperature", True, "a finite number >= 0"),
        ("top_p", 0.0, "in (0, 1]"),
        ("top_p", 1.5, "in (0, 1]"),
        ("top_p", float("nan"), "in (0, 1]"),
        ("min_p", -0.1, "in [0, 1]"),
        ("min_p", 1.01, "in [0, 1]"),
        ("top_k", -2, "an integer >= 0 (0 turns it off)"),
        ("top_k", -1, "an integer >= 0 (0 turns it off)"),
        ("top_k", 2**31, "an integer >= 0 (0 turns it off)"),
        ("top_k", 2.0, "an integer >= 0 (0 turns it off)"),
        ("top_k", True, "an integer >= 0 (0 turns it off)"),
        ("max_tokens", 0, "an integer >= 1"),
        ("max_tokens", True, "an integer >= 1"),
        ("max_tokens", 1.5, "an integer >= 1"),
        ("seed", -1, "an integer in [0, 2**32)"),
        ("seed", 2**32, "an integer in [0, 2**32)"),
        ("seed", False, "an integer in [0, 2**32)"),
        ("ignore_eos", 1, "True or False"),
        ("logprobs", 5, "True or False"),
    ],
)
def test_a_value_out_of_range_is_named(name, value, wanted):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})

    assert str(caught.value) == f"{name} must be {wanted}, got {value!r}."
    assert caught.value.exit_code == 2


def test_values_at_the_ends_of_their_ranges_are_taken():
    low = SamplingParams(max_tokens=1, temperature=0, top_k=0, top_p=1e-9, min_p=0, seed=0)
    high = SamplingParams(
        max_tokens=10**9, temperature=3e38, top_k=2**31 - 1, top_p=1, min_p=1, seed=np.uint32(2**32 - 1)
    )

    stacked = rows(low, high)

    assert stacked.seed.tolist() == [0, 2**32 - 1]
    assert stacked.top_k.tolist() == [0, 2**31 - 1]
    assert stacked.temperature.dtype == jnp.float32


def test_cutting_and_drawing_are_behind_conditions():
    jaxpr = jax.make_jaxpr(sample.__wrapped__)(jnp.zeros((2, 8)), rows(*[SamplingParams()] * 2), steps(2))

    always = " ".join(str(equation) for equation in jaxpr.eqns if equation.primitive.name != "cond")
    for expensive in ("reduce[", "random_bits["):
        assert expensive not in always
        assert expensive in str(jaxpr)
    assert "sort[" not in str(jaxpr)  # which on a GPU would keep the step from being one graph
