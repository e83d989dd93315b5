"""Training text, made on the device as token ids: the same for the same seed, step and row.

Lines of short tasks, whose answers follow an "=":

    720+583=2140                                   27 + 385: the units first, three digits long
    copy lamp egg owl = lamp egg owl
    sort 8 3 5 = 3 5 8
    close ( [ { = } ] )
    the lamp follows the owl near the egg.         a templated English

and texts of facts: what follows a pair of words is the same wherever the pair comes again.

     red lamp owl
     wet stone key
     red lamp owl

Numbers are written as they are added, the units first: no digit hangs on one that is not yet there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.train.words import ADJECTIVES, BRACKETS, ID, NOUNS, PLACES, VERBS

LINE = 32  # tokens of the longest line
FACT = 4  # tokens of a fact
DIGITS = 3  # of the numbers of a sum
_SHORTEST = 5  # of the short tasks, " copy owl = owl" and its end
_END, _EQUALS, _SPACE_EQUALS = ID["Ċ"], ID["="], ID["Ġ="]
_DIGIT = ID["0"]
_SPACED_DIGIT = ID["Ġ0"]
_ADJECTIVE, _NOUN = ID[f"Ġ{ADJECTIVES[0]}"], ID[f"Ġ{NOUNS[0]}"]
_VERB, _PLACE, _OPEN = ID[f"Ġ{VERBS[0]}"], ID[f"Ġ{PLACES[0]}"], ID[f"Ġ{BRACKETS[0]}"]
HELD_OUT = 16  # one problem of so many is never trained on
TASKS = ("arithmetic", "copy", "sort", "close", "recall")  # what has answers; by number, plus one


class Level(NamedTuple):
    """How hard the lines are: up to so many items, 12 at most, and digits of a number, 3 at most."""

    items: int = 12
    digits: int = 3


class Lines(NamedTuple):
    """Rows of ids; of each its length, and which of its tokens are the answer."""

    ids: jax.Array
    answer: jax.Array
    length: jax.Array


def _join(*parts: tuple[jax.Array, jax.Array | int, bool]) -> Lines:
    """One line of pieces (ids, how many of them count, whether they are the answer)."""
    ids, answer = jnp.full(LINE, _END, jnp.int32), jnp.zeros(LINE, bool)
    at = jnp.int32(0)
    for piece, count, answers in parts:
        place = jnp.where(jnp.arange(piece.size) < count, at + jnp.arange(piece.size), LINE)
        ids = ids.at[place].set(piece.astype(jnp.int32), mode="drop")
        answer = answer.at[place].set(answers, mode="drop")
        at += count
    return Lines(ids, answer, at)


def _one(id: int) -> tuple[jax.Array, int, bool]:
    return jnp.array([id]), 1, False


def _number(value: jax.Array, digits: int) -> jax.Array:
    """Its digits, the units first."""
    return _DIGIT + value // 10 ** np.arange(digits) % 10


def _is_held_out(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * 7919 + b * 104729) // 8 % HELD_OUT == 0


def arithmetic(key: jax.Array, level: Level, held_out: bool) -> Lines:
    """a+b=c or a-b=c with numbers that are not negative."""
    which, sign, *keys = jax.random.split(key, 4)
    digits = 1 + jax.random.randint(which, (2,), 0, level.digits)
    # The next problem in line that is (not) held out; one is found within 64 but for a few in a thousand.
    first = jax.random.randint(keys[0], (64, 2), 0, 10**digits)
    fits = _is_held_out(first.max(1), first.min(1)) == held_out  # a sum turned round is the same problem
    a, b = first[jnp.argmax(fits)]
    minus = jax.random.bernoulli(sign)
    a, b = jnp.where(minus & (a < b), b, a), jnp.where(minus & (a < b), a, b)
    result = jnp.where(minus, a - b, a + b)
    sign_id = jnp.where(minus, ID["-"], ID["+"])
    asked = jnp.concatenate([_number(a, DIGITS), sign_id[None], _number(b, DIGITS), jnp.array([_EQUALS])])
    answer = jnp.append(_number(result, DIGITS + 1), _END)
    return _join((asked, asked.size, False), (answer, answer.size, True))


def copying(key: jax.Array, level: Level, held_out: bool) -> Lines:
    """Words, and again."""
    count, words = jax.random.split(key)
    count = jax.random.randint(count, (), 1, level.items + 1)
    words = _NOUN + jax.random.randint(words, (12,), 0, len(NOUNS))
    return _task("copy", words, words, count)


def sorting(key: jax.Array, level: Level, held_out: bool) -> Lines:
    """Digits in order."""
    count, digits = jax.random.split(key)
    count = jax.random.randint(count, (), 2, level.items + 1)
    digits = _SPACED_DIGIT + jax.random.randint(digits, (12,), 0, 10)
    in_order = jnp.sort(jnp.where(jnp.arange(12) < count, digits, 10**6))
    return _task("sort", digits, in_order, count)


def closing(key: jax.Array, level: Level, held_out: bool) -> Lines:
    """Brackets, closed."""
    count, kinds = jax.random.split(key)
    count = jax.random.randint(count, (), 1, level.items + 1)
    opened = _OPEN + jax.random.randint(kinds, (12,), 0, 3)
    closed = jnp.roll(opened[::-1] + 3, count)
    return _task("close", opened, closed, count)


def _task(command: str, given: jax.Array, answer: jax.Array, count: jax.Array) -> Lines:
    end = jnp.array([_END]), 1, True
    return _join(_one(ID[command]), (given, count, False), _one(_SPACE_EQUALS), (answer, count, True), end)


def english(key: jax.Array, level: Level, held_out: bool) -> Lines:
    """A sentence; nothing in it is an answer."""
    nouns, verb, place = jax.random.split(key, 3)
    a, b, c = _NOUN + jax.random.randint(nouns, (3,), 0, len(NOUNS))
    verb = _VERB + jax.random.randint(verb, (), 0, len(VERBS))
    place = _PLACE + jax.random.randint(place, (), 0, len(PLACES))
    the = ID["Ġthe"]
    words = jnp.stack([ID["the"], a, verb, the, b, place, the, c, ID["."], _END])
    return _join((words, words.size, False))


KINDS = (arithmetic, copying, sorting, closing, english)
_ARITHMETIC_MORE = np.array([0, 0, 0, 1, 2, 3, 4])  # what is hardest comes most often


def short_tasks(
    key: jax.Array, tokens: int, level: Level, held_out: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Ids [tokens] of lines of KINDS, and to which task each is an answer: its number plus one; else 0."""
    kinds, lines = jax.random.split(key)
    count = tokens // _SHORTEST
    kinds = jnp.asarray(_ARITHMETIC_MORE)[jax.random.randint(kinds, (count,), 0, _ARITHMETIC_MORE.size)]

    def line(kind, key):
        return jax.lax.switch(
            kind, [lambda key, make=make: make(key, level, held_out) for make in KINDS], key
        )

    ids, answer, length = jax.vmap(line)(kinds, jax.random.split(lines, count))
    start = 1 + jnp.cumsum(length) - length
    place = jnp.where(jnp.arange(LINE) < length[:, None], start[:, None] + jnp.arange(LINE), tokens)
    text = jnp.zeros(tokens, jnp.int32).at[place].set(ids, mode="drop")
    task = jnp.where(answer, 1 + kinds[:, None], 0)
    return text, jnp.zeros(tokens, jnp.int32).at[place].set(task, mode="drop")


def recall(key: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """As `short_tasks`: facts, each of another key, that come again at distances of any scale."""
    keys, values, asks, back = jax.random.split(key, 4)
    count = -(-tokens // FACT)
    again = (jax.random.uniform(asks, (count,)) < 0.5) & (jnp.arange(count) > 0)
    known = jnp.cumsum(~again)  # facts so far
    # Half of them go log-uniformly far back, half anywhere.
    far, how = jax.random.uniform(back, (2, count))
    far = jnp.where(how < 0.5, known**far, far * known)
    fact = jnp.where(again, known - 1 - jnp.floor(far).astype(jnp.int32), known - 1)
    fact = jnp.clip(fact, 0, known - 1)
    keys_there_are = len(ADJECTIVES) * len(NOUNS)
    words = jax.random.permutation(keys, keys_there_are)[fact % keys_there_are]
    value = _NOUN + jax.random.randint(values, (count,), 0, len(NOUNS))[fact]
    key_ids = [_ADJECTIVE + words // len(NOUNS), _NOUN + words % len(NOUNS)]
    lines = jnp.stack([*key_ids, value, jnp.full(count, _END)], axis=1)
    task = jnp.zeros((count, FACT), jnp.int32).at[:, 2].set(again * len(TASKS))
    begin = jnp.zeros(1, jnp.int32)
    text, task = (jnp.concatenate([begin, each.reshape(-1)])[:tokens] for each in (lines, task))
    return text.astype(jnp.int32), task


def batch(
    key: jax.Array, rows: int, tokens: int, recall_share: float, level: Level
) -> tuple[jax.Array, jax.Array]:
    """Ids [rows, tokens] and what they answer; the first `recall_share` of the rows are recall."""
    recalls = round(rows * recall_share)
    keys = jax.random.split(key, rows)
    parts = [jax.vmap(lambda key: recall(key, tokens))(keys[:recalls])] if recalls else []
    if recalls < rows:
        parts.append(jax.vmap(lambda key: short_tasks(key, tokens, level))(keys[recalls:]))
    ids, task = (jnp.concatenate(each) for each in zip(*parts, strict=True))
    return ids, task
