"""What stands around attention: its queries, keys and values as it takes them, its output as it goes on.

Norm, rotary embedding and quantisation of whole vectors, each op in one pass. A rotation comes as cosine and
sine of each pair's angle, so that layers share them; it turns the last 2 * pairs columns, two neighbours at a
time. Between two steps numbers are rounded to the dtype of the input.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_inputs import reference
from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.target import Target


def _run_query(*arguments):
    from pallas_kernels.attention_inputs import triton  # Triton is an extra that a CPU does without

    return triton.query(*arguments)


def _run_unrotate(*arguments):
    from pallas_kernels.attention_inputs import triton

    return triton.unrotate(*arguments)


def _run_key_value(*arguments):
    from pallas_kernels.attention_inputs import triton

    return triton.key_value(*arguments)


def _run_index_query(*arguments):
    from pallas_kernels.attention_inputs import triton

    return triton.index_query(*arguments)


def _run_entries(*arguments):
    from pallas_kernels.attention_inputs import entries_triton

    return entries_triton.compressed_entries(*arguments)


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _width_fits(width: int, format: str | None, columns: int) -> bool:
    """Whether so many `columns` of `width` go through `format` in whole groups."""
    group = {"fp8_block64": 64, "fp4_group32": 32}.get(format or "", 0)
    return group > 0 and columns % group == 0 and group <= width <= 4096 and _power_of_two(width)


def _rotates(target: Target, x, cos, sin) -> bool:
    alike = x.dtype == jnp.bfloat16 and cos.dtype == sin.dtype == jnp.float32
    width = x.shape[-1]
    return target.vendor != "cpu" and alike and x.size > 0 and _power_of_two(width) and 2 <= width <= 4096


def _query_fits(target: Target, q, cos, sin, eps) -> bool:
    return _rotates(target, q, cos, sin)


def _key_value_fits(target: Target, kv, weight, cos, sin, eps, format) -> bool:
    width, plain = kv.shape[-1], kv.shape[-1] - 2 * cos.shape[-1]
    known = format == "fp8_block64" and weight.dtype in (jnp.bfloat16, jnp.float32)
    return known and _rotates(target, kv, cos, sin) and _width_fits(width, format, plain)


def _index_query_fits(target: Target, q, cos, sin, format) -> bool:
    width = q.shape[-1]
    return format == "fp4_group32" and _rotates(target, q, cos, sin) and _width_fits(width, format, width)


def _entries_fit(
    target: Target, kv, score, kv_ring, score_ring, position, length, weight, cos, sin, *settings
) -> bool:
    ratio, _, for_index, format, dtype = settings
    (width,), floats = weight.shape, (kv, score, kv_ring, score_ring, cos, sin)
    known = format == ("fp4_group32" if for_index else "fp8_block64") and dtype == jnp.bfloat16
    known &= all(each.dtype == jnp.float32 for each in floats)
    known &= position.dtype == length.dtype == jnp.int32 and weight.dtype in (jnp.bfloat16, jnp.float32)
    columns = width if for_index else width - 2 * cos.shape[-1]
    fitting = _width_fits(width, format, columns) and _power_of_two(ratio)
    return target.vendor != "cpu" and known and fitting and cos.size > 0


QUERY = (
    Implementation("triton", _run_query, _query_fits, proven=False),
    Implementation("reference", reference.query),
)
UNROTATE = (
    Implementation("triton", _run_unrotate, _rotates, proven=False),
    Implementation("reference", reference.unrotate),
)
KEY_VALUE = (
    Implementation("triton", _run_key_value, _key_value_fits, proven=False),
    Implementation("reference", reference.key_value),
)
INDEX_QUERY = (
    Implementation("triton", _run_index_query, _index_query_fits, proven=False),
    Implementation("reference", reference.index_query),
)
ENTRIES = (
    Implementation("triton", _run_entries, _entries_fit, proven=False),
    Implementation("reference", reference.compressed_entries),
)


def attention_query(
    q: Float[Array, "B T H D"],
    cos: Float32[Array, "B T pairs"],
    sin: Float32[Array, "B T pairs"],
    *,
    eps: float,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Each head divided by its root mean square, then rotated.

    Source: `Attention.forward` of the released inference/model.py.

    Args:
      eps: `rms_norm_eps`.
    """
    return select(QUERY, implementation, q, cos, sin, eps)


def attention_unrotate(
    out: Float[Array, "B T H D"],
    cos: Float32[Array, "B T pairs"],
    sin: Float32[Array, "B T pairs"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """The output of each head, turned back by the angle of its query."""
    return select(UNROTATE, implementation, out, cos, sin)


def attention_key_value(
    kv: Float[Array, "B T D"],
    weight: Float[Array, " D"],
    cos: Float32[Array, "B T pairs"],
    sin: Float32[Array, "B T pairs"],
    *,
    eps: float,
    format: str | None,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """RMSNorm, rotation, and the columns that are not rotated through `format` and back.

    Args:
      weight: of the norm.
      eps: `rms_norm_eps`.
      format: "fp8_block64", or None to leave the columns as they are.
    """
    return select(KEY_VALUE, implementation, kv, weight, cos, sin, eps, format)


def index_query(
    q: Float[Array, "B T I J"],
    cos: Float32[Array, "B T pairs"],
    sin: Float32[Array, "B T pairs"],
    *,
    format: str | None,
    implementation: str | None = None,
) -> Float[Array, "B T I J"]:
    """Rotation, Hadamard transform, and all columns through `format` and back.

    Args:
      format: "fp4_group32", or None to leave the columns as they are.

    Raises:
      ValueError: J is not a power of two.
    """
    _check_transform(q.shape[-1])
    return select(INDEX_QUERY, implementation, q, cos, sin, format)


def compressed_entries(
    kv: Float32[Array, "B T C"],
    score: Float32[Array, "B T C"],
    kv_ring: Float32[Array, "B S C"],
    score_ring: Float32[Array, "B S C"],
    position: Int32[Array, " B"],
    length: Int32[Array, " B"],
    weight: Float[Array, " D"],
    cos: Float32[Array, "B N pairs"],
    sin: Float32[Array, "B N pairs"],
    *,
    ratio: int,
    eps: float,
    for_index: bool,
    format: str | None,
    dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "B N D"]:
    """The entries that `length` new tokens complete: pooled, normalised, rotated and quantised.

    Entry n of a sequence covers positions i * ratio to (i + 1) * ratio - 1 with i = position // ratio + n; an
    entry whose last token is not there is zeros. What is pooled how is said at `compress`; what precedes the
    text takes no part. `compress` is followed by a rounding to `dtype`, and that by what
    `attention_key_value` does, or `index_query` after an RMSNorm.

    Args:
      kv, score: raw rows of the new tokens, the first of which stands at `position`; those from `length` on
        are not looked at. `ape` is already added to `score`.
      kv_ring, score_ring: rows of the tokens before; that of position p is in slot p mod S. S is at least
        ratio * C / D - 1.
      weight: of the norm.
      cos, sin: of the first position of each entry's window; N of them say how many entries there are to be,
        T / ratio rounded up.
      eps: `rms_norm_eps`.
      for_index: transforms and quantises all columns, as `index_query`.
      format: "fp8_block64", with for_index "fp4_group32"; None leaves the columns as they are.

    Raises:
      ValueError: C is neither D nor 2 * D, S is too small, or D is no power of two with `for_index`.
    """
    channels, (head_dim,) = kv.shape[-1], weight.shape
    if channels not in (head_dim, 2 * head_dim):
        raise ValueError(f"kv has {channels} channels, neither head_dim {head_dim} nor twice that")
    if (slots := kv_ring.shape[1]) < (reach := ratio * (channels // head_dim) - 1):
        raise ValueError(f"rings of {slots} slots do not hold the {reach} tokens that an entry may need")
    if for_index:
        _check_transform(head_dim)
    rows, settings = (kv, score, kv_ring, score_ring), (ratio, eps, for_index, format, dtype)
    return select(ENTRIES, implementation, *rows, position, length, weight, cos, sin, *settings)


def _check_transform(size: int) -> None:
    if not _power_of_two(size):
        raise ValueError(f"the transform needs a power of two, got {size} columns")
