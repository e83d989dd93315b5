"""Many requests on one device: each has a slot, comes and goes between steps, and waits for no other.

A slot is a row of fixed arrays, so nothing compiles when requests come and go. Several decode steps are one
program, which takes as many as the host asks for: one between two pieces of a prompt, which is read piece by
piece, else as many as fit. A slot whose request has ended reads and writes nothing. What a slot's caches hold
of earlier requests gets weight 0 from later ones. So it needs no clearing, unless it may not be finite, which
0 times it would not be either.

With `prefix_bytes`, what prompts have left behind is kept after each of their largest pieces (`prefix`). A
prompt that begins with the same pieces goes on from there, and gets the same answer, to the bit: it reads the
rest in the pieces in which it would have read it anyway.

With `invariant` a greedy request's bits do not depend on the number of drafts either: prompts are read in
pieces of one length, and tokens of answers one at a time. docs/numerics.md says what that guarantees, and
what it costs.
"""

import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from dsv4_jax.cache import make_cache
from dsv4_jax.checkpoint.load import LoadedModel
from dsv4_jax.compiles import count_compiles
from dsv4_jax.config import Config
from dsv4_jax.decode import (
    FREE,
    INVARIANT_PIECE,
    MOST_DRAFTS,
    Added,
    Caches,
    Requests,
    Sequences,
)
from dsv4_jax.errors import MemoryPlanError, RequestError
from dsv4_jax.model import Params
from dsv4_jax.mtp import make_mtp_cache
from dsv4_jax.numerics import Numerics
from dsv4_jax.parallel import on_all, settled
from dsv4_jax.penalties import Penalties, Said
from dsv4_jax.prefix import PrefixCache, PromptState, put_block, take_block
from dsv4_jax.programs import compiled
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.sharding import on_mesh
from dsv4_jax.slots import begin, clear_row, follow, read_out_slot, read_piece, set_row, take_steps
from pallas_kernels.dispatch import choose
from pallas_kernels.target import current_target

# Tokens of a prompt that are read at once: as many of these as are left of it, or the fewest.
PIECES = (32, 128, 512)
# From some hundred tokens on a piece reads all experts, which takes a GPU longer than what it computes.
PIECES_ON_GPU = (*PIECES, 2048)  # of one GPU: `plan` has no more room on a mesh
MOST_WARM_UPS = 4
FinishReason = Literal["stop", "length", "error", "cancelled"]

# On a GPU starting a program costs the host some microseconds for each array and each kernel in it. Where the
# host takes longer than the device for one step, it is to start several at once.
STEPS_ON_GPU = 8


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step, or several that were one program, brought a request.

    Attributes:
      request: as `add` numbered it.
      token_ids: new tokens, none or several; the EOS that ended it is among them.
      logprobs: of these under the model, before temperature.
      finish_reason: None while it goes on; then "stop" at an EOS, "length" at its maximum, "error" where
        logits were not finite numbers, "cancelled".
      stood: of each step that had drafts, how many of them; these are among the new tokens.
    """

    request: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None
    stood: tuple[int, ...] = ()

    @property
    def accepted(self) -> int:
        """How many of the new tokens are drafts."""
        return sum(self.stood)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function, with arguments like those that it will get; `size` tells its programs apart."""

    function: Any
    static: tuple[Any, ...]
    arguments: tuple[Any, ...]
    size: int = 0


@dataclasses.dataclass
class _Request:
    """A request, and where it is: waiting, reading its prompt (`read` tokens of it), or under way."""

    number: int
    ids: list[int]
    sampling: SamplingParams
    forced: list[int]  # the tokens it is to generate; empty: those it chooses
    slot: int | None = None
    read: int = 0
    told: int = 0  # how many of `forced` the device has been told

    @property
    def reading(self) -> bool:
        return self.read < len(self.ids)

    @property
    def left(self) -> int:
        """How many tokens it may still get."""
        return len(self.ids) + self.sampling.max_tokens - self.read


class Engine:
    """Slots of a loaded model.

    Attributes:
      slots: requests that are under way together; more wait.
      max_len: tokens that a prompt and its answer may have together.
      draft_tokens: tokens that the MTP head drafts for each step; 0 for none.
      invariant: whether a request's bits are those it gets with any number of drafts, where it is greedy.
      steps_at_once: decode steps that the device takes, at most, before the host hears of the first.
      prefix_hits: prompts so far whose beginning was kept.
      prefix_tokens: tokens of these that were not read again.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        numerics: Numerics,
        slots: int,
        max_len: int,
        draft_tokens: int = 0,
        implementation: str | None = None,
        pieces: Sequence[int] | None = None,
        prefix_bytes: int = 0,
        invariant: bool = False,
        steps_at_once: int | None = None,
    ):
        """Allocates the caches of all slots.

        Args:
          pieces: in which prompts are read, in tokens; `invariant` has one of its own. None is PIECES,
            on one GPU PIECES_ON_GPU unless beginnings are kept, whose blocks are to be short.
          prefix_bytes: memory for the beginnings of prompts; 0 keeps none.
          steps_at_once: None is one on a CPU and some on a GPU.

        Raises:
          MemoryPlanError: caches and beginnings do not fit the device's free memory, or `prefix_bytes` do not
            hold a single piece.
          RequestError: drafts without the MTP head, or more than MOST_DRAFTS of them with `invariant`.
        """
        if invariant and draft_tokens > MOST_DRAFTS:
            raise RequestError(f"draft_tokens={draft_tokens}: invariant allows {MOST_DRAFTS} at most")
        if draft_tokens and model.mtp_params is None:
            raise RequestError(f"draft_tokens={draft_tokens} needs the MTP head, which was not loaded")
        self.model, self.numerics, self.implementation = model, numerics, implementation
        self.slots, self.max_len, self.draft_tokens = slots, max_len, draft_tokens
        self.invariant = invariant
        on_gpu = current_target().vendor != "cpu"
        self.steps_at_once = steps_at_once or (STEPS_ON_GPU if on_gpu else 1)
        self.prefix_hits = self.prefix_tokens = 0
        long = on_gpu and not prefix_bytes and not model.mesh
        pieces = pieces or (PIECES_ON_GPU if long else PIECES)
        self._pieces = (INVARIANT_PIECE,) if invariant else tuple(sorted(pieces))
        # Caches of one size for any number of drafts, so that the programs which take them are the same.
        max_draft = MOST_DRAFTS if invariant else draft_tokens
        self._sizes = {"batch": slots, "max_len": max_len, "max_draft": max_draft}
        needed, free = self.cache_bytes + prefix_bytes, free_bytes()
        if free is not None and needed > free:
            kept = f" and {prefix_bytes / 2**30:.2f} GiB of prefixes" if prefix_bytes else ""
            raise MemoryPlanError(
                f"caches of {slots} slots with {max_len} tokens{kept} take {needed / 2**30:.2f} GiB,"
                f" {free / 2**30:.2f} GiB are free",
                hint=f"fewer slots{', fewer prefix_bytes' if prefix_bytes else ''} or a smaller max_len",
            )
        self._prefix = self._make_prefix(prefix_bytes) if prefix_bytes else None
        with self._context():
            self._free = on_all(jnp.full((self.steps_at_once, slots), FREE, jnp.int32))
            self._requests = settled(_idle(slots))
            self._sequences, self._last = self._placed((self._empty(), self._empty_last()))
        self._numbers = itertools.count()
        self._waiting: collections.deque[_Request] = collections.deque()
        self._running: dict[int, _Request] = {}  # by slot
        self._penalised: tuple[Penalties, Said] | None = None
        self._late: list[Event] = []  # of requests that were cancelled
        self._flying: tuple[Added, dict[int, _Request]] | None = None
        self._ready: dict[tuple[Any, int | None], Any] = {}  # compiled programs, by function and size

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of all slots."""
        leaves = jax.tree.leaves(jax.eval_shape(self._empty_caches))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    @property
    def busy(self) -> bool:
        """Whether any request waits, is under way, or has events that `step` has not given yet."""
        return bool(self._waiting or self._running or self._late or self._flying)

    def add(self, ids: Sequence[int], sampling: SamplingParams, forced: Sequence[int] = ()) -> int:
        """Takes a request and gives its number; it starts once a slot is free.

        Args:
          forced: the tokens it is to generate, as many as `sampling.max_tokens`, whatever the model says; its
            events then tell how likely each was.

        Raises:
          RequestError: prompt and answer would be longer than `max_len`, the prompt is empty, or something in
            either is no token of the model.
        """
        if not ids:
            raise RequestError("the prompt is empty", hint="give at least one token")
        if len(ids) + sampling.max_tokens > self.max_len:
            raise RequestError(
                f"a prompt of {len(ids)} tokens and max_tokens {sampling.max_tokens} more exceed"
                f" max_len {self.max_len}"
            )
        vocab_size = self.model.config.vocab_size
        if not all(isinstance(id, Integral) and 0 <= id < vocab_size for id in (*ids, *forced)):
            raise RequestError(f"token ids are integers in [0, {vocab_size})")
        request = _Request(next(self._numbers), list(ids), sampling, list(forced))
        self._waiting.append(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Ends a request; `step` reports it. A request that has ended already stays as it is."""
        for request in [*self._waiting, *self._running.values()]:
            if request.number == number:
                self._late.append(Event(number, [], [], "cancelled"))
                if request.slot is None:
                    self._waiting.remove(request)
                else:
                    self._stop(request)

    def step(self) -> list[Event]:
        """Lets requests in, reads a piece of one prompt, takes decode steps, and tells what came of them.

        What decode steps bring is told one call later, so that the device works while the host reads.
        """
        events, self._late = self._late, []
        with self._context():
            self._admit()
            reading = next((each for each in self._running.values() if each.reading), None)
            if reading is not None:
                events += self._read_piece(reading)
            landed, self._flying = self._flying, None
            decoding = {slot: each for slot, each in self._running.items() if not each.reading}
            if decoding:
                with self._asked(decoding.values()) as asked:
                    self._flying = self._decode(asked, decoding.values()), decoding
            if landed is not None:
                events += self._events(*landed, drafted=self.draft_tokens > 0)
        return events

    def run(self) -> Iterator[Event]:
        """Steps until nothing is left to do."""
        while self.busy:
            yield from self.step()

    def warm_up(self) -> None:
        """Compiles everything that serving will need: each size of a piece, and a step of each kind.

        Raises:
          RequestError: requests are under way.
        """
        if self.busy:
            raise RequestError("warm_up needs an engine without requests")
        if not self.model.mesh:  # there XLA chooses how what a program leaves behind is laid out
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                self._ready = dict(pool.map(self._compiled, self.programs()))
        # On a mesh a program may be compiled once more for what another one has left behind.
        for _ in range(MOST_WARM_UPS):
            with count_compiles() as compiles:
                self._try_everything()
            if not compiles.count:
                break

    def programs(self) -> list[Program]:
        """The programs that serving needs, each with arguments like those that it will get; on one device.

        Those of penalties are not among them, nor trifles that change a row.
        """
        static, params, last = self._static, self._params, self._last
        caches, slot, place = self._sequences.caches, np.int32(0), np.zeros(2, np.int32)
        what = params, self._requests, self._sequences

        def left(shape: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=last.sharding)

        found = []
        for piece in self._pieces:
            if piece < self.max_len or piece == self._pieces[0]:
                ids, numbers = np.zeros((1, piece), np.int32), np.zeros(3, np.int32)
                streams = left(jax.ShapeDtypeStruct((1, piece, *last.shape[1:]), last.dtype))
                behind = caches.head, last
                found.append(Program(read_piece, static, (params[0], caches.main, ids, numbers), piece))
                found.append(Program(follow, static, (params, behind, streams, ids, numbers), piece))
        found.append(Program(read_out_slot, static, (params[0], last, slot)))
        read = jax.eval_shape(functools.partial(read_out_slot, *static), params[0], last, slot)
        read = jax.tree.map(left, read)
        found.append(Program(begin, (*static, self.draft_tokens), (*what, read, self._free[0], place)))
        found.append(Program(take_steps, (*static, self.invariant), (*what, self._free, np.int32(1))))
        return found

    # --- inside

    def _compiled(self, program: Program) -> tuple[Any, Any]:
        with self._context():
            made = compiled(program.function, program.static, program.arguments, self.implementation)
        return (program.function, program.size), made

    def _run(self, function: Any, static: tuple[Any, ...], *arguments: Any, size: int | None = 0) -> Any:
        """Runs a program, as `warm_up` compiled it or through its jit, which `size` None always does."""
        ready = self._ready.get((function, size))
        return function(*static, *arguments) if ready is None else ready(*arguments)

    def _try_everything(self) -> None:
        greedy = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        drawn, cut = (dataclasses.replace(greedy, temperature=1.0, top_k=count) for count in (0, 1))
        asked = [([0] * min(piece, self.max_len - 2), greedy, ()) for piece in self._pieces]
        for ids, sampling, forced in [*asked, ([0], drawn, [0, 0]), ([0], cut, ())]:
            self.add(ids, sampling, forced)
            for _ in self.run():
                pass
        number = self.add([0], drawn)
        self.step()
        self.cancel(number)
        for _ in self.run():
            pass
        if self._prefix is not None:
            self._prefix.clear()
            with self._context():
                self._put_block(self._take_block(0, 0), 0, 0)

    @property
    def _static(self) -> tuple[Config, Numerics]:
        return self.model.config, self.numerics

    @property
    def _params(self) -> tuple[Params, Params | None]:
        return self.model.params, self.model.mtp_params if self.draft_tokens else None

    def _context(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(on_mesh(self.model.mesh, self.model.rules))
        stack.enter_context(choose(self.implementation))
        return stack

    def _empty_caches(self) -> Caches:
        config, numerics = self._static
        head = make_mtp_cache(config, numerics, **self._sizes) if self.draft_tokens else None
        return Caches(make_cache(config, numerics, **self._sizes), head)

    def _placed(self, rows: Any) -> Any:
        """The same arrays, placed as programs will give them back: else all that take them compile twice."""
        rows = settled(rows)
        if self.model.mesh:
            return rows
        return jax.device_put(rows, jax.tree.leaves(self.model.params)[0].sharding)

    def _empty(self) -> Sequences:
        slots, drafts = self.slots, self.draft_tokens
        none = jnp.zeros(slots, jnp.int32)
        return Sequences(
            token=none,
            position=none + 0,
            drafts=jnp.zeros((slots, drafts), jnp.int32),
            drawn_from=jnp.zeros((slots, drafts, self.model.config.vocab_size), jnp.float32),
            count=none + 0,
            done=jnp.ones(slots, bool),
            caches=self._empty_caches(),
        )

    def _empty_last(self) -> Float[Array, "B X M"]:
        config, numerics = self._static
        return jnp.zeros((self.slots, config.hc_mult, config.hidden_size), numerics.dtype)

    def _make_prefix(self, budget: int) -> PrefixCache:
        tokens = self._pieces[-1]
        with self._context():
            state = jax.eval_shape(lambda: PromptState(self._empty_caches(), self._empty_last()))
            place = jax.ShapeDtypeStruct((2,), jnp.int32)
            take = functools.partial(take_block, self.model.config, tokens)
            block_bytes = jax.eval_shape(take, state, place).nbytes
        if block_bytes > budget:
            raise MemoryPlanError(
                f"prefix_bytes={budget} do not hold a piece of {tokens} tokens, which takes {block_bytes}",
                hint="more prefix_bytes, or 0",
            )
        return PrefixCache(tokens, block_bytes, budget)

    def _admit(self) -> None:
        for slot in range(self.slots):
            if self._waiting and slot not in self._running:
                request = self._waiting.popleft()
                request.slot = slot
                self._running[slot] = request
                row = dataclasses.replace(Requests.stack([request.sampling]), penalties=None)
                self._requests = set_row(self._requests, row, np.int32(slot))
                if request.sampling.penalises or self._penalised is not None:
                    self._remember(request)

    def _remember(self, request: _Request) -> None:
        """Notes a request's penalties, perhaps none, and its prompt; the first with any makes room for it."""
        vocab_size = self.model.config.vocab_size
        if self._penalised is None:
            none = Penalties.stack([SamplingParams()] * self.slots)
            self._penalised = self._placed((none, Said.nothing(self.slots, vocab_size)))
        row = Penalties.stack([request.sampling]), Said.prompt_of(request.ids, vocab_size)
        slot = np.int32(request.slot)  # type: ignore[arg-type]
        self._penalised = set_row(self._penalised, row, slot)

    @contextmanager
    def _asked(self, requests: Iterable[_Request]) -> Iterator[Requests]:
        """What all rows ask for; with penalties only if one of these has any.

        Inside, the sequences know what has been said if one of these has penalties.
        """
        if not any(request.sampling.penalises for request in requests):
            yield self._requests
            return
        assert self._penalised is not None
        penalties, said = self._penalised
        self._sequences = dataclasses.replace(self._sequences, said=said)
        yield dataclasses.replace(self._requests, penalties=penalties)
        assert self._sequences.said is not None
        self._penalised = penalties, self._sequences.said
        self._sequences = dataclasses.replace(self._sequences, said=None)

    @property
    def _state(self) -> PromptState:
        return PromptState(self._sequences.caches, self._last)

    @_state.setter
    def _state(self, state: PromptState) -> None:
        self._sequences = dataclasses.replace(self._sequences, caches=state.caches)
        self._last = state.last

    def _take_block(self, slot: int, number: int) -> PromptState:
        place = np.array([slot, number], np.int32)
        return take_block(self.model.config, self._pieces[-1], self._state, place)

    def _put_block(self, block: PromptState, slot: int, number: int) -> None:
        place = np.array([slot, number], np.int32)
        self._state = put_block(self.model.config, self._pieces[-1], self._state, block, place)

    def _re_enter(self, request: _Request) -> None:
        """Takes a prompt as far as what is kept of its beginning."""
        assert self._prefix is not None
        assert request.slot is not None
        blocks = self._prefix.find(request.ids)
        for number, block in enumerate(blocks):
            self._put_block(block, request.slot, number)
        request.read = len(blocks) * self._prefix.tokens
        self.prefix_hits += bool(blocks)
        self.prefix_tokens += request.read

    def _read_piece(self, request: _Request) -> list[Event]:
        """The next piece of a prompt; after the last, the first token."""
        slot = request.slot
        assert slot is not None
        if self._prefix is not None and request.read == 0:
            self._re_enter(request)
        left = len(request.ids) - request.read
        fits = [piece for piece in self._pieces if piece <= left]
        size = fits[-1] if fits else self._pieces[0]
        here = min(size, left)
        ids = np.zeros((1, size), np.int32)
        ids[0, :here] = request.ids[request.read : request.read + here]
        self._read_ids(ids, np.array([slot, request.read, here], np.int32))
        request.read += here
        if self._prefix is not None and here == self._prefix.tokens:
            number = request.read // here - 1
            self._prefix.keep(request.ids[: request.read], lambda: self._take_block(slot, number))
        if request.reading:
            return []
        place = np.array([slot, len(request.ids)], np.int32)
        last = self._run(read_out_slot, self._static, self._params[0], self._last, np.int32(slot))
        told = self._told([request], 1)[0]
        with self._asked([request]) as asked:
            what = self._params, asked, self._sequences, last, told, place
            size, static = _size_of(asked), (*self._static, self.draft_tokens)
            added, self._sequences = self._run(begin, static, *what, size=size)
        return self._events(added, {slot: request}, drafted=False)

    def _read_ids(self, ids: Int32[np.ndarray, "1 T"], numbers: Int32[np.ndarray, "3"]) -> None:
        """Runs a piece of a prompt through the model, then through the MTP head."""
        caches = self._sequences.caches
        what, static, size = (ids, numbers), self._static, ids.shape[1]
        streams, main = self._run(read_piece, static, self._params[0], caches.main, *what, size=size)
        behind = caches.head, self._last
        head, last = self._run(follow, static, self._params, behind, streams, *what, size=size)
        self._state = PromptState(Caches(main, head), last)

    def _decode(self, asked: Requests, requests: Iterable[_Request]) -> Added:
        """Takes steps, as many as some of these need, but one while a prompt is read."""
        most = min(self.steps_at_once, max(request.left for request in requests))
        if any(request.reading for request in self._running.values()):
            most = 1
        what = self._params, asked, self._sequences, self._told(requests, most), np.int32(most)
        size, static = _size_of(asked), (*self._static, self.invariant)
        added, self._sequences = self._run(take_steps, static, *what, size=size)
        return added

    def _told(
        self, requests: Iterable[_Request], steps: int
    ) -> Int32[Array, "n S"] | Int32[np.ndarray, "n S"]:
        """The next tokens of those requests whose tokens are given, for so many of n steps; else FREE."""
        if not any(request.forced for request in requests):
            return self._free
        forced = np.full(self._free.shape, FREE, np.int32)
        for request in requests:
            told = request.forced[request.told : request.told + steps]
            forced[: len(told), request.slot] = told
            request.told += len(told)
        return forced

    def _events(self, added: Added, requests: dict[int, _Request], *, drafted: bool) -> list[Event]:
        """Of the requests in these slots; those that have ended leave them."""
        host: Any = jax.tree.map(np.asarray, jax.device_get(added))
        if host.count.ndim == 1:  # of a single step
            host = jax.tree.map(lambda leaf: leaf[None], host)
        events = []
        for slot, request in requests.items():
            if self._running.get(slot) is not request:
                continue  # cancelled, or ended in the step before this one
            row = jax.tree.map(lambda leaf: leaf[:, slot], host)  # noqa: B023 (used here and now)
            real = np.arange(row.tokens.shape[1]) < row.count[:, None]
            tokens, logprobs = row.tokens[real].tolist(), row.logprobs[real].tolist()
            request.read += len(tokens)
            reason: FinishReason | None = None
            if row.not_finite.any():
                reason = "error"
            elif row.stopped.any():
                reason = "stop"
            elif request.left == 0:
                reason = "length"
            took = (row.count > 0) | row.not_finite
            stood = tuple(row.accepted[took].tolist()) if drafted else ()
            events.append(Event(request.number, tokens, logprobs, reason, stood))
            if reason == "error":
                self._clear(slot)
            if reason is not None:
                del self._running[slot]
        return events

    def _stop(self, request: _Request) -> None:
        slot = request.slot
        assert slot is not None
        done = set_row(self._sequences.done, np.ones(1, bool), np.int32(slot))
        self._sequences = dataclasses.replace(self._sequences, done=done)
        self._clear(slot)
        del self._running[slot]

    def _clear(self, slot: int) -> None:
        """Empties the caches of a slot in which there are, or may be, numbers that are not finite."""
        self._state = clear_row(self._state, np.int32(slot))


def _size_of(asked: Requests) -> int | None:
    """Of the program that serves it; None: it has penalties, which are not compiled ahead."""
    return 0 if asked.penalties is None else None


def _idle(slots: int) -> Requests:
    return Requests.stack([SamplingParams(temperature=0.0)] * slots)


def free_bytes() -> int | None:
    """Of the first device, or of this machine where a device does not say; None if neither does."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
