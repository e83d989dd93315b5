"""Holds every kernel against its definition on the device at hand: the proof that this GPU computes right.

A small made-up model reads a prompt and takes a decode step, by the definitions of all its ops. What each op
was called with is kept, and given to each of its other implementations. A kernel that is wrong on a device is
off by a large part of its numbers, one that is right by roundings; tests and benchmarks go further.
"""

import collections
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache import make_cache
from dsv4_jax.checkpoint.load import LoadedModel, load
from dsv4_jax.checkpoint.synthetic import write_checkpoint
from dsv4_jax.config import FLASH
from dsv4_jax.model import bind
from dsv4_jax.numerics import OFFICIAL
from pallas_kernels import QuantArray, current_target, dequantize
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
    num_attention_heads=16,
    o_groups=2,
    o_lora_rank=256,
    q_lora_rank=256,
    index_n_heads=16,
    index_topk=64,
    n_routed_experts=16,
    moe_intermediate_size=256,
    max_position_embeddings=4096,
)
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
    when: Literal["prefill", "decode"]
    implementation: str
    default: bool
    status: Literal["ok", "wrong", "failed", "not here"]
    error: float | None = None
    detail: str = ""


def check_kernels(*, run: bool = True) -> Iterator[Verdict]:
    """A verdict on each implementation of each op that the model calls, the definition's among them.

    Args:
      run: False only finds out which ones fit here, and which are the default; so it is on a CPU anyway.
    """
    run = run and current_target().vendor != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made-up"
        write_checkpoint(path, _SMALL, shards=1, mtp=False)
        model = load(path)
    for when, calls in _calls(model, run=run).items():
        for alike in _grouped(calls):
            yield from _verdicts(when, alike, run=run)


def _calls(model: LoadedModel, *, run: bool) -> dict[Literal["prefill", "decode"], list[Call]]:
    """The calls of a prompt and of a step after it, with the arrays that were given, or their shapes.

    Args:
      run: compute the arrays.
    """
    ids = np.arange(2 * _PROMPT, dtype=np.int32).reshape(2, -1) * 7 % _SMALL.vocab_size
    start, length = np.zeros(2, np.int32), np.array([_PROMPT, _PROMPT - 3], np.int32)
    cache = make_cache(_SMALL, OFFICIAL, batch=2, max_len=_ROOM)
    prefill, cache = _recorded(run, model.params, ids, start, length, cache)
    decode, _ = _recorded(run, model.params, ids[:, :1], length, np.ones(2, np.int32), cache)
    return {"prefill": prefill, "decode": decode}


def _recorded(run: bool, *given_to_model: Any) -> tuple[list[Call], Any]:
    """The calls, and the cache after them; given are parameters, and what `Transformer.__call__` takes."""
    noted: list[Call] = []
    shapes: list[Any] = []

    @jax.jit
    def program(params: Any, ids: jax.Array, position: jax.Array, length: jax.Array, cache: Any) -> Any:
        with choose("reference"), record() as calls:
            transformer = bind(_SMALL, OFFICIAL, params)
            x = transformer.embed(ids)
            streams = jnp.broadcast_to(x[:, :, None], (*ids.shape, transformer.hc_mult, x.shape[-1]))
            after = []
            for block, layer_cache in zip(transformer.layers, cache, strict=True):
                streams, layer_cache = block(streams, ids, position, length, layer_cache)
                after.append(layer_cache)
            transformer.logits(streams)
        noted.extend(calls)
        # Arrays leave as results; what else a call was given is known here.
        leaves, tree = jax.tree.flatten([(call.arguments, dict(call.keywords)) for call in calls])
        shapes.append((tree, [None if _is_array(leaf) else leaf for leaf in leaves]))
        return [leaf for leaf in leaves if _is_array(leaf)], tuple(after)

    arrays, cache = program(*given_to_model) if run else jax.eval_shape(program, *given_to_model)
    tree, leaves = shapes[0]
    given = iter(arrays)
    made = jax.tree.unflatten(tree, [next(given) if leaf is None else leaf for leaf in leaves])
    calls = [
        Call(call.implementations, arguments, keywords)
        for call, (arguments, keywords) in zip(noted, made, strict=True)
    ]
    return calls, cache


def _grouped(calls: list[Call]) -> list[list[Call]]:
    """Calls of one function with arguments of one kind together, which run in one program."""
    groups: dict[Any, list[Call]] = collections.defaultdict(list)
    for call in calls:
        leaves, tree = jax.tree.flatten((call.arguments, dict(call.keywords)))
        kinds = tuple(f"{leaf.dtype}{leaf.shape}" if _is_array(leaf) else str(leaf) for leaf in leaves)
        groups[(call.implementations, str(tree), kinds)].append(call)
    return list(groups.values())


def _verdicts(when: Literal["prefill", "decode"], calls: list[Call], *, run: bool) -> Iterator[Verdict]:
    first, implementations = calls[0], calls[0].implementations
    default = default_of(implementations, *first.arguments, **first.keywords)
    definition = implementations[-1]
    op, function = op_of(implementations), definition.run.__name__
    names = [each.name for each in implementations]
    expected: list[Any] = []
    for place, each in enumerate(implementations):
        number = "" if names.count(each.name) == 1 else f" {names[: place + 1].count(each.name)}"
        told = Verdict(op, function, when, f"{each.name}{number}", each is default, "ok")
        if not each.fits(current_target(), *first.arguments, **first.keywords):
            yield dataclasses.replace(told, status="not here")
        elif each is definition or not run:
            yield told
        else:
            expected = expected or [_run(definition.run, call) for call in calls]
            yield _held(told, each.run, calls, expected)


def _held(told: Verdict, function: Callable[..., Any], calls: list[Call], expected: list[Any]) -> Verdict:
    """The verdict on a function that is to give these results."""
    try:
        pairs = zip(calls, expected, strict=True)
        error = max(_error(_run(function, call), wanted) for call, wanted in pairs)
    except Exception as caught:  # whatever a compiler or driver raises is the finding
        said = str(caught).splitlines()
        detail = f"{type(caught).__name__}: {said[0] if said else ''}"
        return dataclasses.replace(told, status="failed", detail=detail)
    return dataclasses.replace(told, status="ok" if error <= BOUND else "wrong", error=error)


def _run(function: Callable[..., Any], call: Call) -> Any:
    """The result of a call, on the host, as numbers."""
    leaves, tree = jax.tree.flatten((call.arguments, dict(call.keywords)))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]

    # Without that XLA leaves roundings out between the ops of one program, those to FP8 among them, and a
    # definition would be off.
    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def program(arrays: list[jax.Array]) -> Any:
        given = iter(arrays)
        filled = [next(given) if _is_array(leaf) else leaf for leaf in leaves]
        arguments, keywords = jax.tree.unflatten(tree, filled)
        return function(*arguments, **keywords)

    return jax.device_get(jax.tree.map(_numbers, program(arrays), is_leaf=_is_quantised))


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
    return isinstance(value, QuantArray)


def _numbers(value: Any) -> Any:
    """What a result stands for, in a dtype that numpy has."""
    if _is_quantised(value):
        return dequantize(value)
    return value if jnp.issubdtype(value.dtype, jnp.integer) else value.astype(jnp.float32)
