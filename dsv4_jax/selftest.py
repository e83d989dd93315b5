"""Holds every kernel against its definition on the device at hand: the proof that this GPU computes right.

A small made-up model reads a prompt and takes a decode step, by the definitions of all its ops. What each op
was called with is kept, and given to each of its other implementations. A kernel that is wrong on a device is
off by a large part of its numbers, one that is right by roundings; tests and benchmarks go further. Most of
the time goes into compiling, which is done on all cores.
"""

import collections
import dataclasses
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache import make_cache
from dsv4_jax.checkpoint.load import load
from dsv4_jax.checkpoint.synthetic import write_checkpoint
from dsv4_jax.config import FLASH
from dsv4_jax.model import bind
from dsv4_jax.numerics import OFFICIAL
from pallas_kernels import QuantArray, QuantKV, current_target, decode_rows
from pallas_kernels.dispatch import Call, choose, default_of, op_of, record

# Of a result's norm. Kernels that were measured differ by 2e-3 from their definitions in bfloat16 and FP8;
# one code of FP8 or FP4 that falls on the other side of a tie adds to that in results as small as these.
BOUND = 1e-2

_SMALL = dataclasses.replace(
    FLASH,
    vocab_size=1024,
    hidden_size=512,
    num_hidden_layers=3,
    num_hash_layers=1,
    compress_ratios=(0, 4, 128, 0),
    o_lora_rank=256,
    q_lora_rank=256,
    index_topk=64,
    n_routed_experts=16,
    moe_intermediate_size=512,
    max_position_embeddings=4096,
)
When = str  # "prefill" or "decode"

# Programs run once, and of the fastest way to multiply nothing is asked. Roundings between ops of one program
# are part of the definitions, those to FP8 among them: XLA would leave them out.
_COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_allow_excess_precision": False}

# Tokens: more than kernels for many ask for, and than a window and index_topk hold.
_PROMPT, _ROOM = 640, 1024


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an implementation made of calls of an op.

    Attributes:
      op: its folder.
      function: of the op.
      when: "prefill" or "decode".
      implementation: its name, a number after it where an op has two of a name.
      default: whether such calls run it here.
      status: "ok"; "wrong"; "failed", with `detail`; "not here" if it does not take such calls here.
      error: norm of the difference from the definition over the definition's, the largest of all calls.
    """

    op: str
    function: str
    when: When
    implementation: str
    default: bool
    status: Literal["ok", "wrong", "failed", "not here"]
    error: float | None = None
    detail: str = ""


def check_kernels(*, run: bool = True) -> Iterator[Verdict]:
    """A verdict on each implementation of each op that the model calls, the definition's among them.

    Those on one function come one after the other.

    Args:
      run: False only finds out which ones fit here, and which are the default; so it is on a CPU anyway.
    """
    run = run and current_target().vendor != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made-up"
        write_checkpoint(path, _SMALL, shards=1, mtp=False)
        model = load(path)
    ids = np.arange(2 * _PROMPT, dtype=np.int32).reshape(2, -1) * 7 % _SMALL.vocab_size
    start, length = np.zeros(2, np.int32), np.array([_PROMPT, _PROMPT - 3], np.int32)
    cache = make_cache(_SMALL, OFFICIAL, batch=2, max_len=_ROOM)
    given: dict[When, Any] = {
        "prefill": (model.params, ids, start, length),
        "decode": (model.params, ids[:, :1], length, np.ones(2, np.int32)),
    }
    traced = {when: _traced(*each, cache) for when, each in given.items()}
    # Shapes in place of arrays, at first: enough to compile what is to be held against the definitions.
    calls = {when: each.calls(each.out[0]) for when, each in traced.items()}
    groups = _grouped(calls)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = {when: pool.submit(each.compile) for when, each in traced.items() if run}
        prepared = [_prepared(calls[when][places[0]], pool if run else None) for when, places in groups]
        for when, program in compiling.items():
            arrays, cache = program.result()(*given[when], cache)
            calls[when] = traced[when].calls(arrays)
        for (when, places), programs in zip(groups, prepared, strict=True):
            yield from _verdicts(when, [calls[when][place] for place in places], programs)


_MISSING = object()  # where an array was


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A program of the model that gives the arrays with which it called ops, and the cache after it.

    Attributes:
      program: as `jax.jit` traced it.
      out: shapes of what it gives.
      noted: the calls; arrays in them are missing.
    """

    program: Any
    out: tuple[list[Any], Any]
    noted: list[Call]

    def compile(self) -> Callable[..., Any]:
        return self.program.lower().compile(_COMPILER_OPTIONS)

    def calls(self, arrays: list[Any]) -> list[Call]:
        """The calls with these arrays in them."""
        given = iter(arrays)
        return [_filled(call, given) for call in self.noted]


def _traced(*given: Any) -> _Traced:
    """Given are parameters, and what `Transformer.__call__` takes."""
    noted: list[Call] = []

    @jax.jit
    def program(params: Any, ids: jax.Array, position: jax.Array, length: jax.Array, cache: Any) -> Any:
        with choose("reference"), record() as calls:
            transformer = bind(_SMALL, OFFICIAL, params)
            x = transformer.embed(ids)
            before: Any = jnp.broadcast_to(x[:, :, None], (*ids.shape, transformer.hc_mult, x.shape[-1]))
            after = []
            for block, layer_cache in zip(transformer.layers, cache, strict=True):
                before, layer_cache = block(before, ids, position, length, layer_cache)
                after.append(layer_cache)
            transformer.logits(before.written())
        noted.extend(map(_without_arrays, calls))
        return [leaf for call in calls for leaf in _arrays(call)], tuple(after)

    traced = program.trace(*given)
    return _Traced(traced, traced.out_info, noted)


def _leaves(call: Call) -> list[Any]:
    return jax.tree.leaves((call.arguments, dict(call.keywords)))


def _arrays(call: Call) -> list[Any]:
    return [leaf for leaf in _leaves(call) if _is_array(leaf)]


def _without_arrays(call: Call) -> Call:
    return _filled(call, itertools.repeat(_MISSING), _is_array)


def _filled(call: Call, given: Iterator[Any], missing: Callable[[Any], bool] | None = None) -> Call:
    """The call with what is missing in it replaced by what is given, one after the other."""
    missing = missing or (lambda leaf: leaf is _MISSING)
    leaves, tree = jax.tree.flatten((call.arguments, dict(call.keywords)))
    arguments, keywords = jax.tree.unflatten(tree, [next(given) if missing(x) else x for x in leaves])
    return Call(call.implementations, arguments, keywords)


def _grouped(calls: dict[When, list[Call]]) -> list[tuple[When, list[int]]]:
    """Places of calls of one function with arguments of one kind, which one program runs; by function."""
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for when, each in calls.items():
        for place, call in enumerate(each):
            tree = jax.tree.structure((call.arguments, dict(call.keywords)))
            kinds = tuple(f"{x.dtype}{x.shape}" if _is_array(x) else str(x) for x in _leaves(call))
            groups[(call.implementations, when, str(tree), kinds)].append(place)
    functions = list(dict.fromkeys(implementations for implementations, *_ in groups))
    ordered = sorted(groups, key=lambda key: functions.index(key[0]))
    return [(key[1], groups[key]) for key in ordered]


Program = Callable[[list[jax.Array]], Any]


def _prepared(call: Call, pool: ThreadPoolExecutor | None) -> dict[int, Future[Program] | None]:
    """What takes such calls here, by its place among the implementations; as a program if it is to run."""
    target = current_target()
    fitting = [
        place
        for place, each in enumerate(call.implementations)
        if each.fits(target, *call.arguments, **call.keywords)
    ]
    if pool is None or len(fitting) == 1:  # nothing to hold against the definition
        return dict.fromkeys(fitting)
    return {place: pool.submit(_compiled, call.implementations[place].run, call) for place in fitting}


def _compiled(function: Callable[..., Any], call: Call) -> Program:
    """A program that takes the arrays of such a call, and gives its result as numbers."""
    empty = _without_arrays(call)

    def program(arrays: list[jax.Array]) -> Any:
        filled = _filled(empty, iter(arrays))
        result = function(*filled.arguments, **filled.keywords)
        return jax.tree.map(_numbers, result, is_leaf=_is_quantised)

    return jax.jit(program).lower(_arrays(call)).compile(_COMPILER_OPTIONS)


def _verdicts(
    when: When, calls: list[Call], programs: dict[int, Future[Program] | None]
) -> Iterator[Verdict]:
    first, implementations = calls[0], calls[0].implementations
    default = default_of(implementations, *first.arguments, **first.keywords)
    definition = implementations[-1]
    op, function = op_of(implementations), definition.run.__name__
    names = [each.name for each in implementations]
    expected: list[Any] = []
    for place, each in enumerate(implementations):
        number = "" if names.count(each.name) == 1 else f" {names[: place + 1].count(each.name)}"
        told = Verdict(op, function, when, f"{each.name}{number}", each is default, "ok")
        if place not in programs:
            yield dataclasses.replace(told, status="not here")
        elif each is definition or (program := programs[place]) is None:
            yield told
        else:
            expected = expected or _results(programs[len(names) - 1], calls)
            yield _held(told, program, calls, expected)


def _held(told: Verdict, program: Future[Program], calls: list[Call], expected: list[Any]) -> Verdict:
    """The verdict on a program that is to give these results."""
    try:
        pairs = zip(_results(program, calls), expected, strict=True)
        error = max(_error(found, wanted) for found, wanted in pairs)
    except Exception as caught:  # whatever a compiler or driver raises is the finding
        said = str(caught).splitlines()
        detail = f"{type(caught).__name__}: {said[0] if said else ''}"
        return dataclasses.replace(told, status="failed", detail=detail)
    return dataclasses.replace(told, status="ok" if error <= BOUND else "wrong", error=error)


def _results(program: Future[Program] | None, calls: list[Call]) -> list[Any]:
    """Those of calls, on the host."""
    assert program is not None
    return [jax.device_get(program.result()(_arrays(call))) for call in calls]


def _error(found: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(_difference(*pair) for pair in pairs)


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Of numbers relative to their norm; of integers the share that differs."""
    if np.issubdtype(expected.dtype, np.integer):
        return float(np.mean(found != expected))
    size = np.linalg.norm(expected.astype(np.float64))
    difference = np.linalg.norm(found.astype(np.float64) - expected)
    return float(difference / size) if size else float(difference)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | jax.ShapeDtypeStruct)


def _is_quantised(value: Any) -> bool:
    return isinstance(value, QuantArray | QuantKV)


def _numbers(value: Any) -> Any:
    """What a result stands for, in a dtype that numpy has.

    Codes and scales by themselves would say little: where a scale is another by a rounding, all codes are.
    """
    integers = not _is_quantised(value) and jnp.issubdtype(value.dtype, jnp.integer)
    return value if integers else decode_rows(value, jnp.float32)
