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
from dsv4_jax.decode import Requests
from dsv4_jax.generate import NO_TOKEN, Generation, decode_step, generate, prefill
from dsv4_jax.model import Params
from dsv4_jax.numerics import PLAIN
from dsv4_jax.sampling import SamplingArrays, SamplingParams

# Around every edge: the first window of 4, the sliding window of 16, the first and second window of 128, and
# where the 8 entries that the indexer may choose are long outnumbered.
LENGTHS = np.array([1, 3, 4, 5, 15, 16, 17, 127, 128, 129, 255, 256, 257, 301, 489], np.int32)
BATCH, LONGEST, START = len(LENGTHS), LENGTHS.max(), np.zeros_like(LENGTHS)
MAX_LEN, MAX_DRAFT = 512, 3
TOKENS = 8  # generated in a test
BEYOND = 16  # tokens a text goes on after its prompt

# Logits are of size 8; float32 and float64 runs of the official model differ by 5e-5 in them.
CLOSE = 1e-4


def placed(tree):
    """On the device, as results of calls are: arguments that are not would make a call compile again."""
    return jax.device_put(tree, jax.devices()[0])


@dataclasses.dataclass(frozen=True)
class Tiny:
    """The golden model and the calls that most tests share, so that each compiles once."""

    config: Config
    params: Params

    def cache(self, batch: int = BATCH) -> Cache:
        return placed(make_cache(self.config, PLAIN, batch=batch, max_len=MAX_LEN, max_draft=MAX_DRAFT))

    def prefill(self, ids, position, length, cache: Cache, **chunk) -> tuple[np.ndarray, Cache]:
        logits, cache = prefill(self.config, PLAIN, self.params, ids, position, length, cache, **chunk)
        return np.asarray(logits), cache

    def step(self, token, position, cache: Cache) -> tuple[np.ndarray, Cache]:
        logits, cache = decode_step(self.config, PLAIN, self.params, token, position, cache)
        return np.asarray(logits), cache


@pytest.fixture(scope="module")
def tiny(tiny_fp4, shallow) -> Tiny:
    loaded = shallow(tiny_fp4.loaded, 0, 1, 2)
    return Tiny(loaded.config, loaded.params)


@pytest.fixture(scope="module")
def texts(tiny) -> np.ndarray:
    """One text a row. A prompt is the beginning of one, so what pads it is what would come next."""
    rng = np.random.default_rng(0)
    return rng.integers(2, tiny.config.vocab_size, (BATCH, LONGEST + BEYOND), dtype=np.int32)


@pytest.fixture(scope="module")
def prompts(texts) -> np.ndarray:
    return texts[:, :LONGEST]


@pytest.fixture(scope="module")
def stepwise(tiny, texts) -> np.ndarray:
    """Logits after every token of every text, read one by one: [position, row, vocab]."""
    cache, rows = tiny.cache(), []
    for position in range(texts.shape[1]):
        logits, cache = tiny.step(texts[:, position], np.full(BATCH, position, np.int32), cache)
        rows.append(logits)
    return np.stack(rows)


@pytest.fixture(scope="module")
def at_once(tiny, prompts) -> tuple[np.ndarray, Cache]:
    """Logits after each row's prompt, and the cache, of one prefill of all of them."""
    logits, cache = tiny.prefill(prompts, START, LENGTHS, tiny.cache())
    return logits, jax.tree.map(np.array, cache)  # copied: calls give their cache's memory away


def assert_close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


def assert_caches_close(found: Cache, expected: Cache) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(ours, theirs)


# Prefill.


def test_a_prefill_equals_token_by_token(stepwise, at_once):
    logits, _ = at_once

    assert_close(logits, stepwise[LENGTHS - 1, np.arange(BATCH)])


@pytest.mark.parametrize(
    "chunk", [7, pytest.param(64, marks=pytest.mark.slow), 128], ids="chunks of {}".format
)
def test_a_prefill_in_chunks_equals_one_at_once(tiny, prompts, at_once, chunk):
    logits, cache = tiny.prefill(prompts, START, LENGTHS, tiny.cache(), chunk=chunk)

    expected_logits, expected_cache = at_once
    assert_close(logits, expected_logits)
    assert_caches_close(cache, expected_cache)


def test_a_prefill_in_chunks_of_one_equals_one_at_once(tiny, prompts, at_once):
    short = np.flatnonzero(LENGTHS <= 129)

    logits, cache = tiny.prefill(
        prompts[short, :129], START[short], LENGTHS[short], tiny.cache(len(short)), chunk=1
    )

    expected_logits, expected_cache = at_once
    assert_close(logits, expected_logits[short])
    assert_caches_close(cache, jax.tree.map(lambda leaf: leaf[short], expected_cache))


def test_a_prompt_in_two_calls_equals_one_at_once(tiny, prompts, at_once):
    first = np.maximum(LENGTHS * 3 // 5, 1)
    position = np.where(LENGTHS > 1, first, 0)  # the prompt of one token is read a second time
    columns = (position[:, None] + np.arange(LONGEST)) % LONGEST
    rest = np.take_along_axis(prompts, columns, axis=1)

    _, cache = tiny.prefill(prompts, START, first, tiny.cache())
    logits, cache = tiny.prefill(rest, position, LENGTHS - position, cache)

    expected_logits, expected_cache = at_once
    assert_close(logits, expected_logits)
    assert_caches_close(cache, expected_cache)


def test_a_row_of_a_batch_gets_what_it_gets_alone(tiny, prompts, at_once):
    expected_logits, expected_cache = at_once

    for row in range(0, BATCH, 2):
        only = slice(row, row + 1)
        logits, cache = tiny.prefill(prompts[only], START[only], LENGTHS[only], tiny.cache(batch=1))

        assert_close(logits, expected_logits[only])
        assert_caches_close(cache, jax.tree.map(lambda leaf, only=only: leaf[only], expected_cache))


def test_what_pads_a_row_changes_nothing(tiny, prompts, at_once):
    padding = np.arange(LONGEST) >= LENGTHS[:, None]
    others = np.where(padding, (prompts + 7) % tiny.config.vocab_size, prompts)

    logits, cache = tiny.prefill(others, START, LENGTHS, tiny.cache())

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


@pytest.mark.parametrize("wrong", [1, 2, 3], ids="{} wrong tokens".format)
def test_rejected_tokens_leave_no_trace(tiny, texts, stepwise, at_once, wrong):
    # Each round reads a token and three drafts, the last of which are wrong, steps back and goes on right.
    # It begins two tokens before each length, so that wrong tokens close windows and the wrap of the rings.
    reads = np.full(BATCH, 1 + MAX_DRAFT, np.int32)
    position, rows = np.maximum(LENGTHS - 2, 1), np.arange(BATCH)
    cache = placed(at_once[1])

    for _ in range(3):
        tokens = texts[rows[:, None], position[:, None] + np.arange(1 + MAX_DRAFT)]
        tokens[:, -wrong:] = (tokens[:, -wrong:] + 101) % tiny.config.vocab_size
        _, cache = tiny.prefill(tokens, position, reads, cache)
        position = position + 1 + MAX_DRAFT - wrong

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
            Requests(
                SamplingArrays.stack(request.sampling),
                np.array(request.max_tokens, np.int32),
                np.array(request.stop_at_eos),
            ),
            max_new=TOKENS,
            max_len=MAX_LEN,
        )
        return jax.tree.map(np.asarray, generation)

    def with_rows_of(self, path: tuple[str, ...], change) -> Params:
        """The parameters with one matrix changed, as `change` does to a float32 copy of it."""
        first, last = path
        matrix = np.float32(self.params[first][last])
        change(matrix)
        return self.params | {first: {last: placed(jnp.asarray(matrix, jnp.bfloat16))}}


@pytest.fixture(scope="module")
def request_(tiny, texts) -> Request:
    return Request(tiny.config, tiny.params, texts[PROMPTS, :ROOM], LENGTHS[PROMPTS])


@pytest.fixture(scope="module")
def greedy(request_) -> Generation:
    return request_.run()


def first_uses(tokens: np.ndarray) -> list[int]:
    """Where a token stands that is not in the row before, the place 0 left out."""
    return [place for place in range(1, len(tokens)) if tokens[place] not in tokens[:place]]


def test_greedy_generation_equals_a_loop_of_steps(tiny, greedy, at_once):
    logits, cache = at_once[0], placed(at_once[1])
    tokens, logprobs = [], []
    for step in range(TOKENS):
        best = logits.argmax(-1).astype(np.int32)
        tokens.append(best)
        logprobs.append(np.asarray(jax.nn.log_softmax(logits))[np.arange(BATCH), best])
        logits, cache = tiny.step(best, LENGTHS + step, cache)

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
