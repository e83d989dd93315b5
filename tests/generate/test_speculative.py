"""Drafts change how fast tokens come and nothing else: the rule by itself, and whole generations under it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dsv4_jax import decode
from dsv4_jax.cache import Cache, LayerCache, make_cache
from dsv4_jax.checkpoint.load import LoadedModel
from dsv4_jax.decode import Caches, Models, Requests, first_step, read_out, step
from dsv4_jax.generate import NO_TOKEN, Generation, generate, read_prompt
from dsv4_jax.model import bind
from dsv4_jax.mtp import MTPHead, bind_mtp, make_mtp_cache
from dsv4_jax.numerics import PLAIN
from dsv4_jax.sampling import SamplingArrays, SamplingParams, sample, truncated_logits
from dsv4_jax.speculative import propose, verify

GREEDY = SamplingParams(temperature=0.0)


# --- the rule


def rows(params: SamplingParams, count: int) -> SamplingArrays:
    """The same parameters for every row, with a seed of its own."""
    one = SamplingArrays.stack([params])
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, count), one)
    return dataclasses.replace(repeated, seed=jnp.arange(count, dtype=jnp.uint32))


@functools.partial(jax.jit, static_argnames="count")
def speculate(model_logits, head_logits, sampling, count):
    """Drafts for `count` rows at fixed logits of each place, and what becomes of them."""
    steps = jnp.zeros(count, jnp.int32)
    drafts, drawn_from = [], []
    for place, logits in enumerate(head_logits):
        draft, source = propose(jnp.tile(logits, (count, 1)), sampling, steps + place)
        drafts.append(draft)
        drawn_from.append(source)
    drafts, drawn_from = jnp.stack(drafts, 1), jnp.stack(drawn_from, 1)
    standing, token = verify(jnp.tile(model_logits, (count, 1, 1)), drafts, drawn_from, sampling, steps)
    return drafts, standing, token


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.6, top_k=4), SamplingParams(temperature=1.5, top_p=0.8)],
    ids=["plain", "top-k", "top-p"],
)
@pytest.mark.parametrize(
    "alike", [0.3, pytest.param(0.7, marks=pytest.mark.slow), 1.0], ids=["unlike", "more alike", "the same"]
)
def test_tokens_are_distributed_as_the_model_says_whatever_the_drafts(params, alike):
    draws, vocab, places = 100_000, 6, 3
    model = 2 * jax.random.normal(jax.random.key(0), (places, vocab))
    head = alike * model[:-1] + (1 - alike) * 2 * jax.random.normal(jax.random.key(1), (places - 1, vocab))
    sampling = rows(params, draws)

    drafts, standing, token = map(np.asarray, speculate(model, head, sampling, draws))

    wide = SamplingArrays.stack([params] * places)
    expected = np.asarray(jax.nn.softmax(truncated_logits(model, wide)), np.float64)
    for place in range(places):
        reached = standing >= place  # rows that have a token here; which they have says nothing about it
        here = np.where(standing > place, drafts[:, min(place, places - 2)], token)[reached]
        found = np.bincount(here, minlength=vocab)
        possible = expected[place] > 0
        assert not found[~possible].any()
        share = expected[place][possible] / expected[place][possible].sum()
        if len(share) > 1:
            assert scipy.stats.chisquare(found[possible], share * reached.sum()).pvalue > 0.01
    if alike == 1.0:
        assert (standing == places - 1).all()
    else:
        assert len(set(standing.tolist())) == places  # every count occurs


def test_no_drafts_give_the_token_of_plain_sampling():
    logits, sampling = 3 * jax.random.normal(jax.random.key(2), (40, 50)), rows(SamplingParams(), 40)
    steps = jnp.arange(40, dtype=jnp.int32)
    none = jnp.zeros((40, 0), jnp.int32), jnp.zeros((40, 0, 50))

    standing, token = verify(logits[:, None], *none, sampling, steps)

    assert not standing.any()
    np.testing.assert_array_equal(token, sample(logits, sampling, steps)[0])


def test_a_greedy_row_among_others_keeps_the_drafts_it_agrees_with():
    sampling = SamplingArrays.stack([GREEDY, GREEDY, SamplingParams(seed=3)])
    logits = jax.random.normal(jax.random.key(3), (3, 3, 20))
    best = jnp.argmax(logits, -1).astype(jnp.int32)
    drafts = best[:, :2].at[1, 1].add(1)
    anything = jax.random.normal(jax.random.key(4), (3, 2, 20))

    standing, token = verify(logits, drafts % 20, anything, sampling, jnp.zeros(3, jnp.int32))

    assert standing[:2].tolist() == [2, 1]
    assert token[:2].tolist() == [int(best[0, 2]), int(best[1, 1])]


# --- whole generations


def prompts(vocab: int, lengths: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).integers(2, vocab, (len(lengths), lengths.max()), dtype=np.int32)


def head_of(loaded: LoadedModel) -> MTPHead:
    assert loaded.mtp_params is not None
    return bind_mtp(loaded.config, PLAIN, loaded.mtp_params)


def asked(count: int, max_tokens: int, params: SamplingParams = GREEDY) -> Requests:
    limits = jnp.full(count, max_tokens, jnp.int32), jnp.ones(count, bool)
    return Requests(rows(params, count), *limits)


def written(loaded: LoadedModel, lengths: np.ndarray, requests: Requests, k: int, max_new: int) -> Generation:
    ids = prompts(loaded.config.vocab_size, lengths)
    result = generate(
        loaded.config,
        PLAIN,
        loaded.params,
        ids,
        lengths,
        requests,
        max_new=max_new,
        max_len=int(lengths.max()) + max_new,
        mtp_params=loaded.mtp_params if k else None,
        draft_tokens=k,
    )
    return jax.tree.map(np.asarray, result)


LENGTHS = np.array([1, 3, 126, 131], np.int32)


@pytest.fixture(scope="module")
def plain(tiny_fp4, shallow) -> Generation:
    return written(shallow(tiny_fp4.loaded), LENGTHS, asked(4, 20), 0, 20)


@pytest.mark.parametrize(
    "k",
    [
        4,
        *[pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 3)],
        *[pytest.param(k, marks=pytest.mark.gpu, id=f"{k} on a GPU") for k in (1, 2, 3, 4)],
    ],
)
def test_the_heads_own_drafts_leave_greedy_tokens_as_they_are(tiny_fp4, shallow, plain, k):
    found = written(shallow(tiny_fp4.loaded), LENGTHS, asked(4, 20), k, 20)

    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(found.count, plain.count)
    # More tokens at once round otherwise: by up to 1.4e-5 in a logit of this model in float32.
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-4)
    assert (found.drafted >= k).all()
    assert (found.drafted % k == 0).all()
    assert (found.accepted <= found.drafted).all()


def oracle(plain_tokens: jax.Array, shift: jax.Array):
    """In place of the head: drafts of which a known number are right, another for each row and step."""

    def draft(models, requests, sequences, streams, tokens, reads, count, draft_tokens):
        place = count[:, None] + jnp.arange(draft_tokens)
        right = jnp.take_along_axis(plain_tokens, jnp.minimum(place, plain_tokens.shape[1] - 1), axis=1)
        stand = (jnp.arange(len(count)) + count + shift) % (draft_tokens + 1)
        wrong = (right + 1) % models.main.head.weight.shape[0]
        drafts = jnp.where(jnp.arange(draft_tokens) < stand[:, None], right, wrong)
        logits = jnp.zeros((*drafts.shape, models.main.head.weight.shape[0]))
        return drafts.astype(jnp.int32), logits, sequences.caches.head

    return draft


@pytest.mark.parametrize(
    ("name", "first", "k"),
    [
        ("tiny-fp4", 130, 4),  # past the window's end, so its ring has come round
        *[pytest.param("tiny-fp4", 1, k, marks=pytest.mark.slow) for k in (1, 2, 3, 4)],
        *[pytest.param("tiny-fp8", 130, k, marks=pytest.mark.slow) for k in (1, 2, 3, 4)],
        *[pytest.param("tiny-fp8", 1, k, marks=pytest.mark.slow) for k in (1, 4)],
        *[pytest.param("tiny-fp4", 130, k, marks=pytest.mark.gpu, id=f"{k} on a GPU") for k in (2, 4)],
    ],
)
def test_drafts_that_fall_leave_no_trace_wherever_they_stood(
    load_golden, shallow, monkeypatch, name, first, k
):
    """Every offset within a window and an entry of either ratio, by every number of drafts that stand."""
    new, loaded = 9, shallow(load_golden(name).loaded)
    lengths = np.arange(first, first + 128, dtype=np.int32)
    requests, ids = asked(len(lengths), new), prompts(loaded.config.vocab_size, lengths)
    config, max_len = loaded.config, int(lengths.max()) + new

    @jax.jit
    def begin(params):
        models = Models(bind(config, PLAIN, params))
        cache = make_cache(config, PLAIN, batch=len(lengths), max_len=max_len, max_draft=k)
        nothing = jnp.zeros_like(lengths)
        return read_prompt(models, jnp.asarray(ids), nothing, jnp.asarray(lengths), Caches(cache), 2048)

    @functools.partial(jax.jit, static_argnums=0)
    def run(k, params, streams, caches, tokens, shift):
        monkeypatch.setattr(decode, "_draft", oracle(tokens, shift) if k else real_draft)
        models = Models(bind(config, PLAIN, params))
        last = read_out(models.main, streams[:, None])
        added, sequences = first_step(models, requests, last, lengths, caches, k, config.eos_token_id)
        out = Generation.nothing(len(lengths), new).extended(added, added.count * 0)

        def one(carry):
            out, sequences, standing = carry
            added, sequences = step(models, requests, sequences, config.eos_token_id)
            return out.extended(added, added.count * 0), sequences, standing.at[added.accepted].add(1)

        start = out, sequences, jnp.zeros(k + 1, jnp.int32)
        out, _, standing = jax.lax.while_loop(lambda carry: ~carry[1].done.all(), one, start)
        return out, standing

    real_draft = decode._draft
    streams, caches = begin(loaded.params)
    expected, _ = run(0, loaded.params, streams, caches, jnp.zeros((len(lengths), new), jnp.int32), 0)
    for shift in range(k + 1):
        found, standing = run(k, loaded.params, streams, caches, expected.tokens, jnp.int32(shift))

        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.count, expected.count)
        assert (np.asarray(standing) > 0).all()  # each number did stand somewhere


def test_an_answer_ends_in_the_middle_of_drafts(tiny_fp4, shallow, ending_with, plain):
    loaded, maximum = shallow(tiny_fp4.loaded), np.array([0, 1, 3, 7], np.int32)
    tokens = plain.tokens[0].tolist()
    last = next(token for place, token in enumerate(tokens) if place > 3 and token not in tokens[:place])
    ending, eos = ending_with(loaded, last), loaded.config.eos_token_id
    limited = dataclasses.replace(
        asked(4, 7), max_tokens=jnp.asarray(maximum), stop_at_eos=jnp.zeros(4, bool)
    )

    short, stopped = written(loaded, LENGTHS, limited, 4, 20), written(ending, LENGTHS, asked(4, 20), 4, 20)

    assert short.count.tolist() == maximum.tolist()
    for row, count in enumerate(maximum):
        assert short.tokens[row, :count].tolist() == plain.tokens[row, :count].tolist()
        assert (short.tokens[row, count:] == NO_TOKEN).all()
    for row, whole in enumerate(plain.tokens.tolist()):
        expected = [*whole[: whole.index(last)], eos] if last in whole else whole
        assert stopped.tokens[row, : stopped.count[row]].tolist() == expected
        assert (stopped.tokens[row, stopped.count[row] :] == NO_TOKEN).all()
        assert stopped.stopped[row] == (last in whole)


def test_drafts_are_what_the_head_says_of_the_text_read_at_once(tiny_fp4, shallow):
    loaded, k, new = shallow(tiny_fp4.loaded, 1), 2, 12
    config, sizes = loaded.config, {"batch": 4, "max_len": int(LENGTHS.max()) + new, "max_draft": k}
    requests, ids = asked(4, new), prompts(config.vocab_size, LENGTHS)
    main = bind(config, PLAIN, loaded.params)
    head = head_of(loaded)
    models = Models(main, head)

    def empty() -> tuple[Cache, LayerCache]:
        return make_cache(config, PLAIN, **sizes), make_mtp_cache(config, PLAIN, **sizes)

    @jax.jit
    def after_steps():
        zero = jnp.zeros_like(LENGTHS)
        streams, caches = read_prompt(
            models, jnp.asarray(ids), zero, jnp.asarray(LENGTHS), Caches(*empty()), 2048
        )
        last = read_out(models.main, streams[:, None])
        added, sequences = first_step(models, requests, last, LENGTHS, caches, k, config.eos_token_id)
        out = Generation.nothing(4, new).extended(added, added.count * 0)

        def one(_, carry):
            out, sequences = carry
            added, sequences = step(models, requests, sequences, config.eos_token_id)
            return out.extended(added, added.count * 0), sequences

        out, sequences = jax.lax.fori_loop(0, 3, one, (out, sequences))
        return out.tokens, sequences

    @jax.jit
    def at_once(text, length):
        cache, head_cache = empty()
        streams, _ = main(text, jnp.zeros_like(length), length - 1, cache)
        following = jnp.pad(text[:, 1:], ((0, 0), (0, 1)))
        own, _ = head(main, streams, following, jnp.zeros_like(length), length - 1, head_cache)
        last = jnp.take_along_axis(own, (length - 2)[:, None, None, None], axis=1)[:, 0]
        return head.logits(main, last)

    tokens, sequences = jax.tree.map(np.asarray, after_steps())
    length = LENGTHS + sequences.count
    text = np.zeros((4, length.max()), np.int32)
    for row, (prompt, answer) in enumerate(zip(LENGTHS, tokens, strict=True)):
        text[row, : length[row]] = [*ids[row, :prompt], *answer[: sequences.count[row]]]

    expected = at_once(jnp.asarray(text), jnp.asarray(length))
    # As above, and once more through the head.
    np.testing.assert_allclose(
        sequences.drawn_from[:, 0], expected, atol=2e-4 * float(jnp.abs(expected).max())
    )
    assert not sequences.done.any()
