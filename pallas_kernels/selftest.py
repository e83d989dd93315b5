"""Holds every kernel against its definition on the device at hand: the proof that this GPU computes right.

The cases are small, so that all of them take a minute or two; tests and benchmarks go further. A kernel that
is wrong on a device is off by a large part of its numbers, one that is right by roundings.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels.dispatch import known_implementations, watch
from pallas_kernels.formats import QuantArray, dequantize
from pallas_kernels.target import current_target

# Of a result's norm. Most that measured kernels differ from their definitions by, in bfloat16 and FP8, is
# 2e-3; one code of FP8 or FP4 that falls on the other side of a tie adds to that in results this small.
BOUND = 1e-2

_BF16, _F32 = jnp.bfloat16, jnp.float32


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of a public op.

    Attributes:
      op: its folder.
      name: of the function, and what is particular about the arguments.
      call: the function, its keywords bound but for `implementation`.
      arguments: arrays.
    """

    op: str
    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one implementation made of a case.

    Attributes:
      op, case, implementation: which.
      status: "ok", "wrong", "failed" with `detail`, or "not here" if it does not take this device or case.
      error: norm of the difference from the definition over the definition's; None if it did not run.
    """

    op: str
    case: str
    implementation: str
    status: Literal["ok", "wrong", "failed", "not here"]
    error: float | None = None
    detail: str = ""


def check_kernels() -> Iterator[Verdict]:
    """Runs each case by each implementation but the definition; nothing on a CPU, which has no other."""
    known = known_implementations()
    for case in cases():
        others = [name for name in known.get(case.op, ()) if name != "reference"]
        if not others or current_target().vendor == "cpu":
            continue
        expected = run(case, "reference")
        for name in others:
            yield _verdict(case, name, expected)


def default_of(case: Case) -> str:
    """The implementation that a call takes here which names none."""
    with watch() as taken:
        jax.eval_shape(functools.partial(case.call, implementation=None), *case.arguments)
    return taken[0]


def run(case: Case, implementation: str | None) -> Any:
    """The result of a case, on the host."""
    program = jax.jit(functools.partial(case.call, implementation=implementation))
    return jax.device_get(jax.tree.map(_numbers, program(*case.arguments), is_leaf=_is_quantised))


def _verdict(case: Case, name: str, expected: Any) -> Verdict:
    try:
        found = run(case, name)
    except NotImplementedError as error:
        return Verdict(case.op, case.name, name, "not here", detail=str(error).splitlines()[0])
    except Exception as error:  # whatever a compiler or driver raises is the finding
        detail = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Verdict(case.op, case.name, name, "failed", detail=detail)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    error = max(_error(*pair) for pair in pairs)
    return Verdict(case.op, case.name, name, "ok" if error <= BOUND else "wrong", error)


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """Of numbers relative to their norm; of integers the share that differs."""
    if np.issubdtype(expected.dtype, np.integer):
        return float(np.mean(found != expected))
    difference = np.linalg.norm(found.astype(np.float64) - expected)
    return float(difference / max(np.linalg.norm(expected.astype(np.float64)), 1e-30))


def _is_quantised(value: Any) -> bool:
    return isinstance(value, QuantArray)


def _numbers(value: Any) -> Any:
    """What a result stands for, in a dtype that numpy has."""
    if _is_quantised(value):
        return dequantize(value)
    return value if jnp.issubdtype(value.dtype, jnp.integer) else value.astype(_F32)


# --- cases


def cases() -> Iterator[Case]:
    """One or two of each public function that has kernels."""
    draw = _Draw(jax.random.key(0))
    yield from _products(draw)
    yield from _experts(draw)
    yield from _streams(draw)
    yield from _attention(draw)
    yield from _index(draw)


class _Draw:
    """Random arrays, each from a key of its own."""

    def __init__(self, key: jax.Array):
        self._key = key

    def _next(self) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return key

    def normal(self, *shape: int, dtype: Any = _BF16, spread: float = 1.0) -> jax.Array:
        return (spread * jax.random.normal(self._next(), shape, _F32)).astype(dtype)

    def weight(self, *shape: int, format: str) -> QuantArray:
        return pk.quantize(self.normal(*shape, dtype=_F32, spread=shape[-1] ** -0.5), format)

    def integers(self, *shape: int, below: int) -> jax.Array:
        return jax.random.randint(self._next(), shape, 0, below, jnp.int32)

    def turns(self, *shape: int) -> tuple[jax.Array, jax.Array]:
        angles = self.normal(*shape, dtype=_F32, spread=3.0)
        return jnp.cos(angles), jnp.sin(angles)


def _case(op: str, what: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Case:
    name = ", ".join(part for part in (function.__name__.removeprefix("_"), what) if part)
    return Case(op, name, functools.partial(function, **keywords), arguments)


def _products(draw: _Draw) -> Iterator[Case]:
    weight = draw.weight(512, 1024, format="fp8_block128")
    for tokens in (4, 40, 1024):
        x = draw.normal(tokens, 1024)
        yield _case("block_matmul", f"{tokens} tokens", pk.block_matmul, x, weight)
        quantised = pk.activation_quant(x, implementation="reference")
        yield _case("block_matmul", f"{tokens} tokens in FP8", pk.block_matmul, quantised, weight)
        yield _case("activation_quant", f"{tokens} tokens", pk.activation_quant, x)
    yield _case("block_matmul", "40 tokens", pk.block_diagonal_matmul, draw.normal(40, 4, 1024), weight)


def _experts(draw: _Draw) -> Iterator[Case]:
    for format in ("fp4_group32", "fp8_block128"):
        gate, up = (draw.weight(8, 256, 512, format=format) for _ in range(2))
        down = draw.weight(8, 512, 256, format=format)
        prepared = pk.prepare_experts(gate, down, up, current_target())
        for tokens in (5, 512):
            chosen = (draw.integers(tokens, 1, below=8) + jnp.array([0, 3])) % 8
            arguments = draw.normal(tokens, 512), chosen, jnp.full((tokens, 2), 0.75, _F32), *prepared
            for activation in (None, "fp8_token128"):
                what = f"{tokens} tokens, {format}, activations {activation or 'bfloat16'}"
                how: Mapping[str, Any] = {"limit": 10.0, "activation": activation}
                yield _case("expert_mlp", what, pk.expert_mlp, *arguments, **how)
    gate, up = draw.normal(40, 512), draw.normal(40, 512)
    yield _case("swiglu", "", pk.swiglu, gate, up, limit=10.0)
    yield _case("swiglu", "", pk.swiglu_quant, gate, up, limit=10.0)
    logits = draw.normal(40, 256, dtype=_F32)
    yield _case("routing", "", _route_by_score, logits, draw.normal(256, dtype=_F32, spread=0.1))
    table = (draw.integers(64, 1, below=256) + jnp.arange(6)) % 256
    yield _case("routing", "", _route_by_id, logits, draw.integers(40, below=64), table)


def _route_by_score(logits: jax.Array, bias: jax.Array, *, implementation: str | None) -> Any:
    return pk.route_by_score(logits, bias, 6, 1.5, implementation=implementation)


def _route_by_id(logits: jax.Array, ids: jax.Array, table: jax.Array, *, implementation: str | None) -> Any:
    return pk.route_by_id(logits, ids, table, 1.5, implementation=implementation)


def _streams(draw: _Draw) -> Iterator[Case]:
    streams, y = draw.normal(40, 4, 512), draw.normal(40, 512)
    rows = [draw.normal(count, 2048, dtype=_F32, spread=0.02) for count in (24, 4)]
    scales = [jnp.ones(count, _F32) for count in (3, 1)]
    bases = [draw.normal(count, dtype=_F32) for count in (24, 4)]
    post, comb = jnp.full((40, 4), 0.5, _F32), jnp.full((40, 4, 4), 0.25, _F32)
    how = {"eps": 1e-6, "norm_eps": 1e-6}
    whole = {"sinkhorn_iters": 20, **how}
    of_pre, of_head = ((rows[n], scales[n], bases[n]) for n in range(2))
    yield _case("hyper_connection", "", pk.hc_pre, streams, *of_pre, **whole)
    yield _case("hyper_connection", "", pk.hc_post, y, streams, post, comb)
    yield _case("hyper_connection", "", pk.hc_post_pre, y, streams, post, comb, *of_pre, **whole)
    yield _case("hyper_connection", "", pk.hc_head, streams, *of_head, **how)


def _attention(draw: _Draw) -> Iterator[Case]:
    sink = draw.normal(64, dtype=_F32)
    for what, tokens in (("decode", 1), ("prefill", 64)):
        q, window, compressed = (
            draw.normal(2, tokens, 64, 512),
            draw.normal(2, 256, 512),
            draw.normal(2, 512, 512),
        )
        near = jnp.broadcast_to(jnp.arange(128, dtype=jnp.int32), (2, tokens, 128))
        far = jnp.where(jnp.arange(512) < 300, draw.integers(2, tokens, 512, below=512), -1)
        arguments = q, window, near, compressed, far, sink
        yield _case("sparse_attention", what, pk.sparse_attention, *arguments, softmax_scale=512**-0.5)
    turns, eps = draw.turns(2, 20, 32), 1e-6
    heads = draw.normal(2, 20, 16, 512)
    yield _case("attention_inputs", "", pk.attention_query, heads, *turns, eps=eps)
    yield _case("attention_inputs", "", pk.attention_unrotate, heads, *turns)
    weights = jnp.ones(1024, _BF16), jnp.ones(512, _BF16)
    how = {"eps": eps, "format": "fp8_block64", "activation": "fp8_token128"}
    yield _case(
        "attention_inputs", "", pk.attention_latents, draw.normal(2, 20, 1536), *weights, *turns, **how
    )
    for what, ratio, width, for_index in (
        ("CSA", 4, 512, False),
        ("HCA", 128, 512, False),
        ("index", 4, 128, True),
    ):
        channels = width * (2 if ratio == 4 else 1)
        tokens, entries = 2 * ratio, 2
        rings = [draw.normal(2, 2 * ratio, channels, dtype=_F32) for _ in range(2)]
        position, length = jnp.full(2, ratio, jnp.int32), jnp.full(2, tokens, jnp.int32)
        projected, ape = (
            draw.normal(2, tokens, 2 * channels, dtype=_F32),
            draw.normal(ratio, channels, dtype=_F32),
        )
        places = position, length, jnp.ones(width, _BF16)
        how = {"column": 0, "eps": eps, "for_index": for_index}
        how["format"] = "fp4_group32" if for_index else "fp8_block64"
        arguments = projected, ape, *rings, *places, *draw.turns(2, entries, 32)
        yield _case("attention_inputs", what, pk.compressed_entries, *arguments, **how)


def _index(draw: _Draw) -> Iterator[Case]:
    turns, q = draw.turns(2, 20, 32), draw.normal(2, 20, 64, 128)
    projected = draw.normal(2, 20, 64, dtype=_F32)
    how = {"column": 0, "format": "fp4_group32"}
    yield _case("attention_inputs", "", pk.index_query, q, projected, *turns, **how)
    keys, weights = draw.normal(2, 1024, 128), draw.normal(2, 20, 64, dtype=_F32, spread=0.1)
    yield _case("indexer", "", pk.index_scores, q, keys, weights)
    visible = jnp.full((2, 20), 1000, jnp.int32)
    yield _case("indexer", "", _index_select, q, keys, weights, visible)


def _index_select(
    q: jax.Array, keys: jax.Array, weights: jax.Array, visible: jax.Array, *, implementation: str | None
) -> Any:
    return pk.index_select(q, keys, weights, visible, 256, implementation=implementation)
