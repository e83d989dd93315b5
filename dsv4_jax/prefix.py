"""Prompts that begin alike: what reading the beginning left behind is kept by its text, and read no more.

Texts are kept in blocks of a fixed number of tokens, each after the block before it: texts that begin alike
share what they have in common. A block holds what reading it left in its slot: the rings, which are whole,
and those compressed entries that are new. So to enter a text again is to put back its blocks one by one.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from dsv4_jax.config import Config
from dsv4_jax.decode import Caches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptState:
    """What reading leaves behind: of all slots, or of one after a block.

    Nothing in it depends on the token that comes next. That is why the MTP head is one token behind.

    Attributes:
      caches: of the tokens that were read; the head's of all but the last, with which it needs the next one.
      last: streams of the last token.
    """

    caches: Caches
    last: Float[Array, "B X M"]

    @property
    def nbytes(self) -> int:
        """Of all its arrays, which may also be mere shapes."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    key: bytes
    ids: bytes
    before: "_Block | None"  # None where a text starts
    state: PromptState


class PrefixCache:
    """Blocks of texts under a budget; those that were not used for longest go first.

    Attributes:
      tokens: in a block.
      block_bytes: what one takes.
      budget: bytes that all of them may take.
    """

    def __init__(self, tokens: int, block_bytes: int, budget: int):
        self.tokens, self.block_bytes, self.budget = tokens, block_bytes, budget
        # By key, the least recently used first. Whatever uses a block uses those before it too, so a block
        # always goes before the one that it comes after.
        self._blocks: collections.OrderedDict[bytes, _Block] = collections.OrderedDict()

    @property
    def nbytes(self) -> int:
        """What the kept blocks take."""
        return len(self._blocks) * self.block_bytes

    def find(self, ids: Sequence[int]) -> list[PromptState]:
        """The kept blocks with which `ids` begins, from the start on; they leave at least one token."""
        found = self._chain(ids, (len(ids) - 1) // self.tokens)
        self._use(found)
        return [block.state for block in found]

    def keep(self, ids: Sequence[int], make: Callable[[], PromptState]) -> None:
        """Keeps the last block of `ids`, which is whole blocks, if those before it are there and it has room.

        Args:
          make: gives its state; called only if it is kept.
        """
        count = len(ids) // self.tokens
        chain = self._chain(ids, count)
        self._use(chain)
        if len(chain) != count - 1:
            return  # it is there already, or one before it is not
        before = chain[-1] if chain else None
        block_ids = self._ids(ids, count - 1)
        key = _digest(before, block_ids)
        if key in self._blocks:
            return  # another text, whose key happens to be the same
        while self.nbytes + self.block_bytes > self.budget:
            if not self._blocks or next(iter(self._blocks.values())) is before:
                return  # only those before it are left
            self._blocks.popitem(last=False)
        self._blocks[key] = _Block(key, block_ids, before, make())
        self._use([*chain, self._blocks[key]])

    def clear(self) -> None:
        """Forgets everything."""
        self._blocks.clear()

    def _ids(self, ids: Sequence[int], number: int) -> bytes:
        return np.array(ids[number * self.tokens : (number + 1) * self.tokens], np.int32).tobytes()

    def _chain(self, ids: Sequence[int], most: int) -> list[_Block]:
        """The kept ones of the first `most` blocks of `ids`, up to the first that is missing."""
        chain: list[_Block] = []
        for number in range(most):
            before, block_ids = chain[-1] if chain else None, self._ids(ids, number)
            block = self._blocks.get(_digest(before, block_ids))
            # Keys may be equal by chance; the text itself decides, here and in all blocks before.
            if block is None or block.ids != block_ids or block.before is not before:
                break
            chain.append(block)
        return chain

    def _use(self, chain: list[_Block]) -> None:
        for block in reversed(chain):
            self._blocks.move_to_end(block.key)


def _digest(before: _Block | None, ids: bytes) -> bytes:
    return hashlib.sha256((before.key if before else b"") + ids).digest()


# --- device programs


@functools.partial(jax.jit, static_argnums=(0, 1))
def take_block(config: Config, tokens: int, state: PromptState, place: Int32[Array, "2"]) -> PromptState:
    """What block `place[1]` of its prompt left in the slot `place[0]`, which has just read it.

    Args:
      tokens: in a block.
      state: of all slots.
    """

    def take(path, leaf):
        first, count = _rows(config, tokens, place[1], path, leaf.shape[1])
        return jax.lax.dynamic_slice(leaf, (place[0], first, 0), (1, count, leaf.shape[2]))

    return jax.tree.map_with_path(take, state)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def put_block(
    config: Config, tokens: int, state: PromptState, block: PromptState, place: Int32[Array, "2"]
) -> PromptState:
    """The state of all slots, after `block` was put where `take_block` takes it."""

    def put(path, leaf, rows):
        first, _ = _rows(config, tokens, place[1], path, leaf.shape[1])
        return jax.lax.dynamic_update_slice(leaf, rows, (place[0], first, 0))

    return jax.tree.map_with_path(put, state, block)


def _rows(
    config: Config, tokens: int, number: Int32[Array, ""], path, slots: int
) -> tuple[int | Int32[Array, ""], int]:
    """The first of the rows that block `number` leaves in an array with so many `slots`, and their count.

    Where a block ends inside an entry, the last row is one that does not count yet, and the next block has it
    again.
    """
    match jax.tree_util.keystr(path, simple=True, separator="/").split("/"):
        case ["caches", "main", layer, _, "entries", *_]:
            ratio = config.main_ratios[int(layer)]
            return number * tokens // ratio, min(-(-tokens // ratio), slots)
        case ["caches", "main", layer, _, "kv" | "score", _]:
            # Where a block ends with an entry none is under way; overlapping ones still need the one before.
            ratio = config.main_ratios[int(layer)]
            return 0, 0 if ratio != 4 and tokens % ratio == 0 else slots
        case _:
            return 0, slots
