"""Penalties: as defined, alone and in a batch, with drafts and without, in the engine and in `generate`."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.checkpoint.load import load
from dsv4_jax.decode import Requests
from dsv4_jax.errors import RequestError
from dsv4_jax.generate import generate
from dsv4_jax.llm import LLM
from dsv4_jax.numerics import PLAIN
from dsv4_jax.penalties import Penalties, Said, penalised
from dsv4_jax.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
# A made-up model repeats nothing by itself: penalties that please make it.
PENALISED = dataclasses.replace(GREEDY, repetition_penalty=0.4, presence_penalty=-1.5, frequency_penalty=0.9)
PROMPT = [5, 6, 7, 8]


def by_hand(logits: np.ndarray, prompt: list[int], answer: list[int], params: SamplingParams) -> np.ndarray:
    changed = logits.astype(np.float64).copy()
    for token in {*prompt, *answer}:
        factor = params.repetition_penalty
        changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
    for token in set(answer):
        changed[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
    return changed


def test_logits_are_changed_as_defined_after_each_draft():
    logits = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    prompts, answers, drafts = [[1, 2], [3]], [[2, 4, 4], []], [[4, 5], [3, 3]]
    params = [PENALISED, dataclasses.replace(PENALISED, repetition_penalty=0.8, frequency_penalty=-0.5)]
    ids = jnp.array([[1, 2], [3, 9]])
    said = Said.prompts_of(ids, jnp.array([2, 1]), 16)
    said = said.and_then(jnp.array([[2, 4, 4], [7, 7, 7]]), jnp.array([3, 0]))

    found = penalised(jnp.asarray(logits), jnp.array(drafts), Penalties.stack(params), said)

    for row in range(2):
        for place in range(3):
            so_far = answers[row] + drafts[row][:place]
            expected = by_hand(logits[row, place], prompts[row], so_far, params[row])
            np.testing.assert_allclose(found[row, place], expected, rtol=1e-5, atol=1e-6)


def test_no_penalty_changes_no_bit():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 16)), jnp.float32)
    said = Said.nothing(1, 16).and_then(jnp.arange(16)[None], jnp.array([16]))

    found = penalised(logits, jnp.zeros((1, 0), jnp.int32), Penalties.stack([SamplingParams()]), said)

    np.testing.assert_array_equal(found, logits)


@pytest.fixture(scope="module")
def llm(text_checkpoint, as_numbers) -> LLM:
    """With the slots for all tests from the first one on: they share what is compiled."""
    model = as_numbers(load(text_checkpoint, mtp=True))
    llm = LLM(model, numerics=PLAIN, max_len=128, max_batch=4, draft_tokens=1)
    llm.generate([[1]] * 4, dataclasses.replace(GREEDY, max_tokens=1))
    return llm


def test_a_greedy_answer_is_the_best_by_penalised_logits(llm):
    answer = llm.generate(PROMPT, PENALISED)[0].token_ids
    plain = llm.generate(PROMPT, GREEDY)[0].token_ids

    assert answer != plain
    config, model = llm.model.config, llm.model
    from dsv4_jax.cache import make_cache
    from dsv4_jax.generate import prefill

    for step in range(len(answer)):
        ids = np.zeros((1, 32), np.int32)
        ids[0, : 4 + step] = PROMPT + answer[:step]
        cache = make_cache(config, PLAIN, batch=1, max_len=128)
        length = np.array([4 + step], np.int32)
        logits, _ = prefill(config, PLAIN, model.params, ids, np.zeros(1, np.int32), length, cache)
        best = by_hand(np.asarray(logits[0]), PROMPT, answer[:step], PENALISED)
        assert best[answer[step]] == pytest.approx(best.max(), abs=1e-4)


def test_neighbours_with_penalties_change_nothing(llm):
    sampled = dataclasses.replace(PENALISED, temperature=0.8, seed=3, top_p=0.9)
    prompts, asked = [PROMPT, [9, 9, 9], PROMPT, [1]], [GREEDY, PENALISED, sampled, GREEDY]

    together = [each.token_ids for each in llm.generate(prompts, asked)]

    pairs = zip(prompts, asked, strict=True)
    assert together == [llm.generate(prompt, params)[0].token_ids for prompt, params in pairs]


def test_a_slot_forgets_what_its_last_request_said(llm):
    first = llm.generate(PROMPT, PENALISED)[0].token_ids
    llm.generate([8, 7, 6], dataclasses.replace(PENALISED, frequency_penalty=-2.0))

    assert llm.generate(PROMPT, PENALISED)[0].token_ids == first


def test_an_engine_with_drafts_gives_what_the_pure_function_gives_without(llm):
    ids = np.array([PROMPT, [9, 9, 9, 0]], np.int32)

    rows = generate(
        llm.model.config, PLAIN, llm.model.params, ids, np.array([4, 3], np.int32),
        Requests.stack([PENALISED, GREEDY]), max_new=12, max_len=128,
    )  # fmt: skip

    expected = [llm.generate(PROMPT, PENALISED)[0].token_ids, llm.generate([9, 9, 9], GREEDY)[0].token_ids]
    assert rows.tokens.tolist() == expected


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("repetition_penalty", 0, r"in \(0, 2\]"),
        ("repetition_penalty", 2.5, r"in \(0, 2\]"),
        ("repetition_penalty", float("nan"), r"in \(0, 2\]"),
        ("presence_penalty", 3, r"in \[-2, 2\]"),
        ("frequency_penalty", -2.1, r"in \[-2, 2\]"),
        ("frequency_penalty", "1", r"in \[-2, 2\]"),
    ],
)
def test_a_penalty_out_of_its_range_is_refused(name, value, wanted):
    with pytest.raises(RequestError, match=f"{name} must be {wanted}, got"):
        SamplingParams(**{name: value})
