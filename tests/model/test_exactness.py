"""One model, many ways to run it: however a text is cut into calls and batches, the logits are the same.

All in float32, where only the order of sums differs between the ways.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache import Cache, make_cache
from dsv4_jax.config import Config
from dsv4_jax.generate import NO_TOKEN, Generation, decode_step, generate, prefill
from dsv4_jax.model import Params
from dsv4_jax.numerics import PLAIN
from dsv4_jax.sampling import SamplingArrays, SamplingParams
from pallas_kernels import QuantArray, dequantize

# Around every edge: the first window of 4, the sliding window of 16, the first and second window of 128, and
# where the 8 entries that the indexer may choose are long outnumbered.
LENGTHS = np.array([1, 3, 4, 5, 15, 16, 17, 127, 128, 129, 255, 256, 257, 301, 489], np.int32)
BATCH, LONGEST = len(LENGTHS), LENGTHS.max()
MAX_LEN, MAX_DRAFT = 512, 3
TOKENS = 8  # generated in a test

# Logits are of size 8; float32 and float64 runs of the official model differ by 5e-5 in them.
CLOSE = 1e-4


@dataclasses.dataclass(frozen=True)
class Tiny:
    """The golden model and the calls that most tests share, so that each compiles once."""

    config: Config
    params: Params

    def cache(self, batch: int = BATCH) -> Cache:
        # Placed where the calls leave it: a cache that is not would make each of them compile a second time.
        empty = make_cache(self.config, PLAIN, batch=batch, max_len=MAX_LEN, max_draft=MAX_DRAFT)
        return jax.device_put(empty, jax.devices()[0])

    def prefill(self, ids, position, length, cache: Cache, **chunk) -> tuple[np.ndarray, Cache]:
        logits, cache = prefill(self.config, PLAIN, self.params, ids, position, length, cache, **chunk)
        return np.asarray(logits), cache

    def step(self, token, position, cache: Cache) -> tuple[np.ndarray, Cache]:
        logits, cache = decode_step(self.config, PLAIN, self.params, token, position, cache)
        return np.asarray(logits), cache


@pytest.fixture(scope="module")
def tiny(tiny_fp4) -> Tiny:
    def plain(leaf):
        # bfloat16 holds every FP8 and FP4 weight exactly, and a step need not decode them again.
        return dequantize(leaf, leaf.exact_dtype) if isinstance(leaf, QuantArray) else leaf

    params = jax.tree.map(plain, tiny_fp4.loaded.params, is_leaf=lambda leaf: isinstance(leaf, QuantArray))
    return Tiny(tiny_fp4.loaded.config, params)


@pytest.fixture(scope="module")
def texts(tiny) -> np.ndarray:
    """A text for each length, longer than it: what comes after is padding to a prefill."""
    rng = np.random.default_rng(0)
    return rng.integers(2, tiny.config.vocab_size, (BATCH, LONGEST), dtype=np.int32)


@pytest.fixture(scope="module")
def stepwise(tiny, texts) -> np.ndarray:
    """Logits after every token of every text, read one by one: [position, row, vocab]."""
    cache, rows = tiny.cache(), []
    for position in range(LONGEST):
        logits, cache = tiny.step(texts[:, position], np.full(BATCH, position, np.int32), cache)
        rows.append(logits)
    return np.stack(rows)


@pytest.fixture(scope="module")
def at_once(tiny, texts) -> tuple[np.ndarray, Cache]:
    """Logits after each text's length, and the cache, of one prefill of all of them."""
    logits, cache = tiny.prefill(texts, np.zeros(BATCH, np.int32), LENGTHS, tiny.cache())
    return logits, jax.tree.map(np.asarray, cache)


def assert_close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


def assert_caches_close(found: Cache, expected: Cache) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(ours, theirs)


# Prefill.


def test_a_prefill_equals_token_by_token(stepwise, at_once):
    logits, _ = at_once

    assert_close(logits, stepwise[LENGTHS - 1, np.arange(BATCH)])


@pytest.mark.parametrize("chunk", [7, 64, 128], ids="chunks of {}".format)
def test_a_prefill_in_chunks_equals_one_at_once(tiny, texts, at_once, chunk):
    logits, cache = tiny.prefill(texts, np.zeros(BATCH, np.int32), LENGTHS, tiny.cache(), chunk=chunk)

    expected_logits, expected_cache = at_once
    assert_close(logits, expected_logits)
    assert_caches_close(cache, expected_cache)


def test_a_prefill_in_chunks_of_one_equals_one_at_once(tiny, texts, at_once):
    short = LENGTHS <= 129
    start = np.zeros(short.sum(), np.int32)

    logits, cache = tiny.prefill(texts[short, :129], start, LENGTHS[short], tiny.cache(short.sum()), chunk=1)

    expected_logits, expected_cache = at_once
    assert_close(logits, expected_logits[short])
    assert_caches_close(cache, jax.tree.map(lambda leaf: leaf[short], expected_cache))


def test_a_prompt_in_two_calls_equals_one_at_once(tiny, texts, at_once):
    first = np.maximum(LENGTHS * 3 // 5, 1)
    position = np.where(LENGTHS > 1, first, 0)  # the text of one token is read a second time
    columns = (position[:, None] + np.arange(LONGEST)) % LONGEST

    _, cache = tiny.prefill(texts, np.zeros(BATCH, np.int32), first, tiny.cache())
    rest = np.take_along_axis(texts, columns, axis=1)
    logits, cache = tiny.prefill(rest, position, LENGTHS - position, cache)

    expected_logits, expected_cache = at_once
    assert_close(logits, expected_logits)
    assert_caches_close(cache, expected_cache)


def test_a_row_of_a_batch_gets_what_it_gets_alone(tiny, texts, at_once):
    expected_logits, expected_cache = at_once

    for row, length in enumerate(LENGTHS):
        logits, cache = tiny.prefill(
            texts[row, None], np.zeros(1, np.int32), length[None], tiny.cache(batch=1)
        )

        assert_close(logits[0], expected_logits[row])
        assert_caches_close(cache, jax.tree.map(lambda leaf, row=row: leaf[row, None], expected_cache))


def test_what_pads_a_row_changes_nothing(tiny, texts, at_once):
    padding = np.arange(LONGEST) >= LENGTHS[:, None]
    others = np.where(padding, (texts + 7) % tiny.config.vocab_size, texts)

    logits, cache = tiny.prefill(others, np.zeros(BATCH, np.int32), LENGTHS, tiny.cache())

    expected_logits, expected_cache = at_once
    np.testing.assert_array_equal(logits, expected_logits)
    jax.tree.map(np.testing.assert_array_equal, cache, expected_cache)


def test_padding_leaves_no_trace_in_the_cache(tiny, at_once):
    _, cache = at_once

    for layer, ratio in zip(cache, tiny.config.main_ratios, strict=True):
        rows_of = [layer.window]
        for compressed in filter(None, (layer.compressed, layer.index)):
            rows_of += [compressed.kv, compressed.score]
            for row, length in enumerate(LENGTHS):
                closed = length // ratio
                assert compressed.entries[row, :closed].any(-1).all()
                assert not compressed.entries[row, closed:].any()
        for recent in rows_of:
            for row, length in enumerate(LENGTHS):
                assert recent.rows[row, :length].any(-1).all()
                assert not recent.rows[row, length:].any()


# Sequences that are set back.


@pytest.mark.parametrize("around", [14, 124], ids=["at the sliding window", "at the window of 128"])
def test_rejected_tokens_leave_no_trace(tiny, texts, stepwise, around):
    # Each round reads a token and three drafts, of which the last 1, 2 or 3 are wrong, and steps back. Five
    # starts by three such counts: every offset modulo 4, and all positions from 3 before to 3 after the edge.
    wrong = np.repeat(np.arange(1, 4, dtype=np.int32), 5)
    position = np.tile(around + np.arange(5, dtype=np.int32), 3)
    rows, drafted = np.arange(BATCH), np.arange(1 + MAX_DRAFT)
    _, cache = tiny.prefill(texts, np.zeros(BATCH, np.int32), position, tiny.cache())

    for _ in range(3):
        tokens = texts[rows[:, None], position[:, None] + drafted]
        rejected = drafted >= len(drafted) - wrong[:, None]
        tokens = np.where(rejected, (tokens + 101) % tiny.config.vocab_size, tokens)
        _, cache = tiny.prefill(tokens, position, np.full(BATCH, len(drafted), np.int32), cache)
        position = position + len(drafted) - wrong

        logits, cache = tiny.step(texts[rows, position], position, cache)
        assert_close(logits, stepwise[position, rows])

    for _ in range(4):
        position = position + 1
        logits, cache = tiny.step(texts[rows, position], position, cache)
        assert_close(logits, stepwise[position, rows])


# Whole generations.

PROMPTS = [1, 3, 5, 6]  # rows of `texts`: 3, 5, 16 and 17 tokens
ROOM = 24  # for a prompt


@dataclasses.dataclass(frozen=True)
class Request:
    """Arguments of `generate` for four prompts, all of the same shapes."""

    config: Config
    params: Params
    ids: np.ndarray
    length: np.ndarray
    sampling: tuple[SamplingParams, ...] = (SamplingParams(temperature=0.0),) * 4
    max_tokens: tuple[int, ...] = (TOKENS,) * 4
    stop_at_eos: tuple[bool, ...] = (True,) * 4

    def run(self, **changes) -> Generation:
        request = dataclasses.replace(self, **changes)
        generation = generate(
            request.config,
            PLAIN,
            request.params,
            request.ids,
            request.length,
            SamplingArrays.stack(request.sampling),
            np.array(request.max_tokens, np.int32),
            np.array(request.stop_at_eos),
            max_new=TOKENS,
            max_len=MAX_LEN,
        )
        return jax.tree.map(np.asarray, generation)

    def with_rows_of(self, path: tuple[str, ...], change) -> Params:
        """The parameters with one matrix changed, as `change` does to a float32 copy of it."""
        first, last = path
        matrix = np.float32(self.params[first][last])
        change(matrix)
        changed = jax.device_put(jnp.asarray(matrix, jnp.bfloat16), jax.devices()[0])
        return self.params | {first: {last: changed}}


@pytest.fixture(scope="module")
def request_(tiny, texts) -> Request:
    return Request(tiny.config, tiny.params, texts[PROMPTS, :ROOM], LENGTHS[PROMPTS])


@pytest.fixture(scope="module")
def greedy(request_) -> Generation:
    return request_.run()


def first_uses(tokens: np.ndarray) -> list[int]:
    """Where a token stands that is not in the row before, the place 0 left out."""
    return [place for place in range(1, len(tokens)) if tokens[place] not in tokens[:place]]


def test_greedy_generation_equals_a_loop_of_steps(tiny, texts, greedy):
    logits, cache = tiny.prefill(texts, np.zeros(BATCH, np.int32), LENGTHS, tiny.cache())
    tokens, logprobs = [], []
    for step in range(TOKENS):
        tokens.append(logits.argmax(-1).astype(np.int32))
        logprobs.append(
            np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[-1][:, None], 1)[:, 0]
        )
        logits, cache = tiny.step(tokens[-1], LENGTHS + step, cache)

    np.testing.assert_array_equal(greedy.tokens, np.stack(tokens, 1)[PROMPTS])
    assert_close(greedy.logprobs, np.stack(logprobs, 1)[PROMPTS])
    assert greedy.count.tolist() == [TOKENS] * 4
    assert not greedy.stopped.any()
    assert not greedy.not_finite.any()


def test_a_row_ends_at_its_end_of_sentence_token(request_, greedy):
    eos = request_.config.eos_token_id
    place = first_uses(greedy.tokens[0])[-1]
    last = greedy.tokens[0, place]

    def swap(head):  # from now on the model writes one where it wrote the other
        head[[eos, last]] = head[[last, eos]]

    params = request_.with_rows_of(("head", "weight"), swap)
    stops = request_.run(params=params)
    goes_on = request_.run(params=params, stop_at_eos=(False,) * 4)

    assert eos not in greedy.tokens
    for row, tokens in enumerate(greedy.tokens):
        count = tokens.tolist().index(last) + 1 if last in tokens else TOKENS
        expected = np.where(tokens == last, eos, tokens)[:count].tolist()
        assert stops.tokens[row].tolist() == expected + [NO_TOKEN] * (TOKENS - count)
        assert stops.count[row] == count
        assert stops.stopped[row] == (last in tokens)
        assert goes_on.tokens[row, :count].tolist() == expected
    assert not stops.logprobs[stops.tokens == NO_TOKEN].any()
    assert stops.stopped[0]
    assert goes_on.count.tolist() == [TOKENS] * 4
    assert not goes_on.stopped.any()


def test_each_row_has_a_maximum_of_its_own(request_, greedy):
    maximum = (0, 1, 5, TOKENS)

    written = request_.run(max_tokens=maximum)

    assert written.count.tolist() == list(maximum)
    for row, count in enumerate(maximum):
        assert written.tokens[row, :count].tolist() == greedy.tokens[row, :count].tolist()
        assert (written.tokens[row, count:] == NO_TOKEN).all()
        assert not written.logprobs[row, count:].any()
    assert not written.stopped.any()


def test_a_draw_depends_on_the_rows_seed_and_not_on_its_neighbours(request_):
    sampling = tuple(SamplingParams(temperature=1.0, seed=seed) for seed in (5, 6, 7, 8))
    order = [2, 0, 3, 1]
    drawn = request_.run(sampling=sampling)

    moved = request_.run(
        ids=request_.ids[order],
        length=request_.length[order],
        sampling=tuple(sampling[row] for row in order),
    )
    among_others = request_.run(
        ids=np.concatenate([request_.ids[:1], request_.ids[3:0:-1]]),
        length=np.concatenate([request_.length[:1], request_.length[3:0:-1]]),
        sampling=(sampling[0], *[SamplingParams(temperature=0.7, top_k=9, seed=1)] * 3),
        max_tokens=(TOKENS, 0, 2, 3),
    )
    other_seed = request_.run(sampling=(SamplingParams(temperature=1.0, seed=9), *sampling[1:]))

    np.testing.assert_array_equal(moved.tokens, drawn.tokens[order])
    np.testing.assert_array_equal(among_others.tokens[0], drawn.tokens[0])
    np.testing.assert_array_equal(other_seed.tokens[1:], drawn.tokens[1:])
    assert (other_seed.tokens[0] != drawn.tokens[0]).any()


@contextmanager
def counting_compilations() -> Iterator[list[str]]:
    """Collects the programs that XLA compiles."""
    compiled = []

    def on_event(event: str, duration: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(about))

    jax.monitoring.register_event_duration_secs_listener(on_event)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(on_event)


def test_other_prompts_and_parameters_of_the_same_shapes_compile_nothing(tiny, texts, request_, greedy):
    draws = tuple(SamplingParams(temperature=0.8, top_p=0.9, seed=seed) for seed in range(4))
    request_.run(sampling=draws)

    with counting_compilations() as compiled:
        request_.run(
            ids=texts[3:7, 100 : 100 + ROOM],
            length=np.array([24, 2, 11, 1], np.int32),
            sampling=draws,
            max_tokens=(1, 2, 3, 4),
            stop_at_eos=(False, True, False, True),
        )
    with counting_compilations() as compiled_by_another_shape:
        jax.jit(lambda x: x + 1)(np.zeros(7))

    assert compiled == []
    assert len(compiled_by_another_shape) == 1  # the counter counts


# Numbers that are not finite.


def test_a_nan_in_the_head_gives_no_token_and_says_so(request_):
    def spoil(head):
        head[77, 5] = np.nan

    written = request_.run(params=request_.with_rows_of(("head", "weight"), spoil))

    assert written.not_finite.all()
    assert not written.count.any()
    assert (written.tokens == NO_TOKEN).all()
    assert not written.stopped.any()


def test_a_nan_that_one_row_reads_ends_that_row_alone(request_, greedy):
    # A token that row 2 alone writes: reading it back spoils what would come next.
    elsewhere = {*request_.ids.reshape(-1), *np.delete(greedy.tokens, 2, axis=0).reshape(-1)}
    place = next(place for place in first_uses(greedy.tokens[2]) if greedy.tokens[2, place] not in elsewhere)
    assert place < TOKENS - 1

    def spoil(embed):
        embed[greedy.tokens[2, place]] = np.nan

    written = request_.run(params=request_.with_rows_of(("embed", "weight"), spoil))

    expected = np.where(np.arange(TOKENS) <= place, greedy.tokens[2], NO_TOKEN)
    np.testing.assert_array_equal(written.tokens[2], expected)
    np.testing.assert_array_equal(np.delete(written.tokens, 2, axis=0), np.delete(greedy.tokens, 2, axis=0))
    assert written.not_finite.tolist() == [False, False, True, False]
    assert written.count.tolist() == [TOKENS, TOKENS, place + 1, TOKENS]


def test_a_row_that_asks_for_no_token_is_not_reported(request_):
    def spoil(head):
        head[0] = np.inf

    params = request_.with_rows_of(("head", "weight"), spoil)
    written = request_.run(params=params, max_tokens=(0, TOKENS, 0, 1))

    assert written.not_finite.tolist() == [False, True, False, True]
