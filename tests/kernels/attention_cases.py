"""Arguments of `sparse_attention` for its tests, and what its result is held against."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import empty_kv, encode_rows
from pallas_kernels.sparse_attention import reference

F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32
CHANNELS, SCALE = 512, 512**-0.5
# Relative, of a whole result. A rounding to bfloat16 is off by 1.7e-3 in the mean: that of weights, of the
# result, and where keys are split of the parts; together by the root of their squares.
MOST_ERROR = {1: 2.4e-3, 2: 2.9e-3}
SINKS = (0.5, -2.0, -jnp.inf, 30.0, 1e30)


def shapes(
    batch: int,
    tokens: int,
    heads: int,
    rows: int,
    places: int,
    entries: int = 0,
    chosen: int = 0,
    *,
    channels: int = CHANNELS,
    pairs: int = 32,
    dtype: Any = BF16,
    codes: bool = False,
    turned: bool = False,
) -> tuple[Any, ...]:
    """Arguments without the scale, as shapes; with `codes` rows are QuantKV."""

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def kv(slots):
        format = "fp8_block64" if codes else None
        return jax.eval_shape(lambda: empty_kv(batch, slots, channels, format, 2 * pairs, dtype))

    compressed = (None, None)
    if entries:
        compressed = (kv(entries), shape(batch, tokens, chosen, dtype=I32))
    return (
        shape(batch, tokens, heads, channels),
        kv(rows),
        shape(batch, tokens, places, dtype=I32),
        *compressed,
        shape(heads, dtype=F32),
        (shape(batch, tokens, pairs, dtype=F32),) * 2 if turned else None,
    )


def made_up(*sizes: int, absent="model", sink=SINKS, **form: Any) -> tuple[Any, ...]:
    """Numbers of these shapes; `absent` says where lists have -1.

    In "model" it leads a window and trails a list, as it does there; "some" is a third of all, "most" nearly
    all; "but one" leaves each query one row, "all" none.
    """
    return _made_up(sizes, absent, sink, tuple(form.items()))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _made_up(sizes, absent, sink, form) -> tuple[Any, ...]:
    keys = iter(jax.random.split(jax.random.key(sum(sizes)), 16))
    q, window_kv, window_index, compressed_kv, compressed_index, sinks, turns = shapes(*sizes, **dict(form))

    def normal(like) -> Any:
        return jax.random.normal(next(keys), like.shape, like.dtype)

    def rows(like) -> Any:
        # Blocks of very different size, so that their scales are.
        *outer, width = like.shape
        size = jnp.exp2(jax.random.randint(next(keys), (*outer, width // 16), -3, 2))
        return encode_rows(normal(like) * jnp.repeat(size, 16, axis=-1).astype(like.dtype), like)

    def index(like, rows, leading):
        index, place = jax.random.randint(next(keys), like.shape, 0, rows), jnp.arange(like.shape[-1])
        if absent == "model":
            count = jax.random.randint(next(keys), (*like.shape[:2], 1), 0, like.shape[-1] + 1)
            return jnp.where(place < count if leading else place >= like.shape[-1] - count, -1, index)
        if absent == "but one":
            return jnp.where((place == 3) if leading else False, index, -1)
        share: Any = {"none": 0.0, "some": 0.3, "most": 0.98, "all": 1.1}[absent]
        return jnp.where(jax.random.uniform(next(keys), like.shape) < share, -1, index)

    compressed: tuple[Any, Any] = (None, None)
    if compressed_kv is not None:
        compressed = (rows(compressed_kv), index(compressed_index, compressed_kv.shape[1], False))
    if turns is not None:
        angle = jax.random.uniform(next(keys), turns[0].shape, F32, 0, 2**20)
        turns = (jnp.cos(angle), jnp.sin(angle))
    return (
        normal(q),
        rows(window_kv),
        index(window_index, window_kv.shape[1], True),
        *compressed,
        jnp.resize(jnp.array(sink, F32), sinks.shape),
        turns,
    )


@functools.partial(jax.jit, static_argnames="scale")
def expected_of(arguments, scale=SCALE):
    """What the definition gives with queries, and so a result, in float32."""
    q, *others = arguments
    return reference.sparse_attention(q.astype(F32), *others, softmax_scale=scale)


@jax.jit
def _compared(found, expected):
    found = found.astype(F32)
    error = jnp.linalg.norm((found - expected).reshape(-1)) / jnp.linalg.norm(expected.reshape(-1))
    return error, jnp.isfinite(found).all(), jnp.where(expected == 0, found, 0).any()


def assert_right(found, expected, splits=1, most_error=None):
    """Compared on the device: results have up to 131 million numbers."""
    assert found.shape == expected.shape
    error, finite, more_than_zero = _compared(found, expected)
    assert finite
    assert not more_than_zero
    if expected.any():
        assert error <= (most_error or MOST_ERROR[min(splits, 2)])
