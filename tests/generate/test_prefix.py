"""Prompts that begin alike: one that goes on from a kept beginning gets the bits that it gets without."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import prefix as prefix_module
from dsv4_jax.checkpoint.load import LoadedModel
from dsv4_jax.compiles import count_compiles
from dsv4_jax.decode import Caches
from dsv4_jax.engine import Engine
from dsv4_jax.errors import MemoryPlanError
from dsv4_jax.numerics import PLAIN
from dsv4_jax.prefix import PrefixCache, PromptState
from dsv4_jax.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
SAMPLED = dataclasses.replace(GREEDY, temperature=0.9, seed=5)

Answer = tuple[list[int], list[float], int, str | None]
Start = Callable[..., Engine]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((0, 128), id="k=0 block=128", marks=pytest.mark.slow),
        pytest.param((2, 32), id="k=2 block=32"),
    ],
)
def start(tiny_fp4, shallow, request) -> Start:
    """Makes engines of one shape. Blocks of 32 tokens end inside the entries of HCA, blocks of 128 do not."""
    draft_tokens, block = request.param
    loaded: LoadedModel = shallow(tiny_fp4.loaded)

    def make(blocks: int = 1000) -> Engine:
        """Keeps so many blocks."""
        sizes = {
            "slots": 2,
            "max_len": 5 * block,
            "draft_tokens": draft_tokens,
            "pieces": (block // 4, block),
        }
        engine = Engine(loaded, numerics=PLAIN, prefix_bytes=2**30 if blocks else 0, **sizes)
        if blocks:
            assert engine._prefix is not None
            engine._prefix.budget = blocks * engine._prefix.block_bytes + 1
        return engine

    return make


def block_of(engine: Engine) -> int:
    return engine._pieces[-1]


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, 512, length).tolist()


def ask(engine: Engine, ids: list[int], sampling: SamplingParams = GREEDY) -> Answer:
    """Tokens, logprobs, how many of the tokens are drafts, and the reason of the end."""
    number, tokens, logprobs, accepted, reason = engine.add(ids, sampling), [], [], 0, None
    for event in engine.run():
        assert event.request == number
        tokens, logprobs = tokens + event.token_ids, logprobs + event.logprobs
        accepted, reason = accepted + event.accepted, event.finish_reason
    return tokens, logprobs, accepted, reason


def head(engine: Engine) -> list[np.ndarray]:
    """What the MTP head drew its last drafts from in slot 0, and its window; these show what answers hide."""
    shown = engine._sequences.drawn_from, engine._sequences.caches.head
    return [np.asarray(leaf[0]) for leaf in jax.tree.leaves(shown)]


def prompts(block: int) -> list[list[int]]:
    """With 0, 1, 2 and 3 blocks in common, ends of all lengths, and two whole prefixes of others."""
    common = text(3 * block)
    ends = [(0, block + 3), (3, 40), (1, 1), (2, block), (3, 7), (1, 2 * block), (2, 33), (3, 0), (2, 0)]
    return [common[: shared * block] + text(end, seed) for seed, (shared, end) in enumerate(ends, start=1)]


def test_nothing_compiles_after_warm_up(tiny_fp4, shallow):
    block = 32
    sizes = {"slots": 2, "max_len": 5 * block, "pieces": (block // 4, block), "prefix_bytes": 2**24}
    warm = Engine(shallow(tiny_fp4.loaded, 0), numerics=PLAIN, draft_tokens=1, **sizes)
    warm.warm_up()

    with count_compiles() as compiles:
        for length in (2 * block + 6, 7, block + 8, 2 * block + 6):
            ask(warm, [3] * length)

    assert compiles.count == 0
    assert warm.prefix_hits == 2


def test_a_hit_gives_what_a_miss_gives_bit_for_bit(start):
    plain, keeping = start(0), start()
    block = block_of(keeping)

    for ids in prompts(block):
        for sampling in (GREEDY, SAMPLED):
            assert ask(keeping, ids, sampling) == ask(plain, ids, sampling)
            for found, expected in zip(head(keeping), head(plain), strict=True):
                np.testing.assert_array_equal(found, expected)

    # Each prompt is asked twice: the first time it goes on from what came before it, then from itself.
    first = [0, 0, 1, 2, 3, 1, 2, 2, 1]
    again = [(len(ids) - 1) // block for ids in prompts(block)]
    assert keeping.prefix_tokens == block * sum([*first, *again])
    assert keeping.prefix_hits == sum(map(bool, [*first, *again]))
    assert plain.prefix_hits == plain.prefix_tokens == 0


@pytest.mark.parametrize("number", [1, 2])
def test_what_is_put_back_is_all_that_counts(start, number):
    plain, keeping = start(0), start()
    ids = prompts(block_of(keeping))[number]
    expected = ask(plain, ids, SAMPLED)
    ask(keeping, ids, SAMPLED)

    keeping._state = jax.tree.map(lambda leaf: leaf * 0 + 3, keeping._state)

    assert ask(keeping, ids, SAMPLED) == expected
    assert keeping.prefix_hits == 1
    for found, wanted in zip(head(keeping), head(plain), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_prompts_under_way_together_share_what_the_first_has_read(start):
    plain, keeping = start(0), start()
    several = prompts(block_of(keeping))[1:6]
    expected = [ask(plain, ids, SAMPLED)[0] for ids in several]

    numbers = [keeping.add(ids, SAMPLED) for ids in several]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    for event in keeping.run():
        found[event.request] += event.token_ids

    assert [found[number] for number in numbers] == expected
    assert keeping.prefix_hits == 4


def test_a_prompt_that_is_cancelled_leaves_the_blocks_it_has_read(start):
    plain, keeping = start(0), start()
    ids = prompts(block_of(keeping))[1]
    expected = ask(plain, ids, SAMPLED)

    for _ in range(2):  # the second goes on from the first
        number = keeping.add(ids, SAMPLED)
        keeping.step()
        keeping.cancel(number)
        assert [event.finish_reason for event in keeping.run()] == ["cancelled"]

    assert ask(keeping, ids, SAMPLED) == expected
    assert keeping.prefix_hits == 2
    assert keeping.prefix_tokens == 3 * block_of(keeping)


@pytest.mark.parametrize("blocks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_small_budget_is_kept_and_changes_no_answer(start, blocks):
    plain, keeping = start(0), start(blocks)
    kept = keeping._prefix
    asked = prompts(block_of(keeping))

    for ids in [*asked, *asked[::2]]:
        expected = ask(plain, ids)
        number, tokens = keeping.add(ids, GREEDY), []
        while keeping.busy:
            tokens += [token for event in keeping.step() for token in event.token_ids]
            held = [block.state.nbytes for block in kept._blocks.values()]
            assert set(held) <= {kept.block_bytes}
            assert sum(held) == kept.nbytes <= kept.budget
        assert tokens == expected[0], number

    assert keeping.prefix_hits > 0


def test_equal_keys_of_different_texts_mix_nothing_up(start, monkeypatch):
    monkeypatch.setattr(prefix_module, "_digest", lambda before, ids: b"all the same")
    plain, keeping = start(0), start()

    for ids in prompts(block_of(keeping)):
        assert ask(keeping, ids) == ask(plain, ids)

    assert keeping._prefix.nbytes == keeping._prefix.block_bytes


def test_a_budget_below_one_block_is_refused(tiny_fp4):
    with pytest.raises(MemoryPlanError, match="prefix_bytes=1000 do not hold a piece of 512 tokens"):
        Engine(tiny_fp4.loaded, numerics=PLAIN, slots=1, max_len=100, prefix_bytes=1000)


# --- which blocks are kept, without a model


def state() -> PromptState:
    return PromptState(Caches((), None), jnp.zeros((1, 1, 1)))


def keep(kept: PrefixCache, ids: list[int]) -> None:
    """All blocks of `ids`, one after the other, as reading does."""
    for end in range(kept.tokens, len(ids) + 1, kept.tokens):
        kept.keep(ids[:end], state)


def small(blocks: int) -> PrefixCache:
    return PrefixCache(tokens=2, block_bytes=4, budget=4 * blocks + 3)


def test_what_was_not_used_for_longest_goes_first():
    kept = small(4)
    keep(kept, [1, 1, 2, 2])
    keep(kept, [1, 1, 3, 3])
    keep(kept, [5, 5])
    assert len(kept.find([1, 1, 2, 2, 0])) == 2  # used again

    keep(kept, [6, 6])

    assert [len(kept.find([*ids, 0])) for ids in ([1, 1, 2, 2], [1, 1, 3, 3], [5, 5], [6, 6])] == [2, 1, 1, 1]


def test_a_text_longer_than_the_budget_keeps_its_beginning():
    kept = small(3)
    keep(kept, [9, 9])

    keep(kept, list(range(12)))

    assert len(kept.find(list(range(12)))) == 3
    assert kept.find([9, 9, 9]) == []


def test_a_block_is_nothing_without_those_before_it():
    kept = small(4)

    kept.keep([1, 1, 2, 2], state)

    assert kept.nbytes == 0


@pytest.mark.parametrize("blocks", [1, 3, 10])
def test_found_is_what_was_kept_of_the_same_text(blocks):
    random, kept, texts = np.random.default_rng(blocks), small(blocks), {}
    for _ in range(400):
        ids = random.integers(0, 2, random.integers(1, 12)).tolist()
        found = kept.find(ids)
        assert len(found) <= (len(ids) - 1) // 2
        for number, each in enumerate(found, start=1):
            assert texts[id(each)][1] == ids[: 2 * number]
        for end in range(2, len(ids) + 1, 2):
            made = state()
            texts[id(made)] = made, ids[:end]
            kept.keep(ids[:end], lambda made=made: made)
            assert kept.nbytes <= kept.budget
