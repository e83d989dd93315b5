"""What stands around attention: its queries, keys and values as it takes them, its output as it goes on.

Norm, rotary embedding and quantisation of whole vectors, each op in one pass. A rotation comes as cosine and
sine of each pair's angle, so that layers share them; it turns the last 2 * pairs columns, two neighbours at a
time. Between two steps numbers are rounded to the dtype of the input. Where an op takes some columns of a
product, it is given the whole product and where they begin: a slice would be a kernel of its own. What a
cache is to keep is written into it by the op that makes it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention_inputs import reference
from pallas_kernels.cached_rows import CachedRows, KeyValues, QuantKV
from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.formats import QuantArray
from pallas_kernels.indexer.queries import TiledQueries
from pallas_kernels.target import Target


def _run_latents(*arguments):
    from pallas_kernels.attention_inputs import triton  # Triton is an extra that a CPU does without

    return triton.latents(*arguments)


def _run_query(*arguments):
    from pallas_kernels.attention_inputs import triton

    return triton.query(*arguments)


def _run_unrotate(*arguments):
    from pallas_kernels.attention_inputs import triton

    return triton.unrotate(*arguments)


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


def _keeps_key_values(rows, plain: int) -> bool:
    """Whether `rows` are codes of so many columns, and the rest as it is."""
    return isinstance(rows, QuantKV) and rows.nope.shape[-1] == plain and rows.dtype == jnp.bfloat16


def _latents_fit(
    target: Target, x, q_weight, kv_weight, window, position, length, cos, sin, eps, format, activation
) -> bool:
    (width,), plain = kv_weight.shape, kv_weight.shape[0] - 2 * cos.shape[-1]
    known = format == "fp8_block64" and activation in (None, "fp8_token128")
    known &= _keeps_key_values(window, plain) and position.dtype == length.dtype == jnp.int32
    known &= all(weight.dtype in (jnp.bfloat16, jnp.float32) for weight in (q_weight, kv_weight))
    known &= x.dtype == jnp.bfloat16 and cos.dtype == sin.dtype == jnp.float32
    whole = 0 < q_weight.size <= 4096 and q_weight.size % 128 == 0 and _width_fits(width, format, plain)
    return target.vendor != "cpu" and x.size > 0 and known and whole


def _query_fits(target: Target, q, cos, sin, eps) -> bool:
    return _rotates(target, q, cos, sin)


def _index_query_fits(target: Target, q, projected, column, cos, sin, format) -> bool:
    width = q.shape[-1]
    known = format == "fp4_group32" and projected.dtype == jnp.float32 and width % 32 == 0
    return known and _rotates(target, q, cos, sin) and _width_fits(width, format, width)


def _entries_fit(
    target: Target,
    projected,
    column,
    ape,
    entries,
    kv_ring,
    score_ring,
    position,
    length,
    weight,
    cos,
    sin,
    eps,
    for_index,
    format,
    dtype,
) -> bool:
    (width,), floats = weight.shape, (projected, ape, kv_ring, score_ring, cos, sin)
    known = format == ("fp4_group32" if for_index else "fp8_block64") and dtype == jnp.bfloat16
    known &= all(each.dtype == jnp.float32 for each in floats)
    known &= position.dtype == length.dtype == jnp.int32 and weight.dtype in (jnp.bfloat16, jnp.float32)
    columns = width if for_index else width - 2 * cos.shape[-1]
    known &= isinstance(entries, QuantArray) if for_index else _keeps_key_values(entries, columns)
    fitting = _width_fits(width, format, columns) and _power_of_two(ape.shape[0])
    return target.vendor != "cpu" and known and fitting and cos.size > 0


LATENTS = (
    Implementation("triton", _run_latents, _latents_fit),
    Implementation("reference", reference.latents),
)
QUERY = (
    Implementation("triton", _run_query, _query_fits),
    Implementation("reference", reference.query),
)
UNROTATE = (
    Implementation("triton", _run_unrotate, _rotates),
    Implementation("reference", reference.unrotate),
)
INDEX_QUERY = (
    Implementation("triton", _run_index_query, _index_query_fits),
    Implementation("reference", reference.index_query),
)
ENTRIES = (
    Implementation("triton", _run_entries, _entries_fit),
    Implementation("reference", reference.compressed_entries),
)


def attention_latents[Rows: KeyValues](
    x: Float[Array, "B T Q+D"],
    q_weight: Float[Array, " Q"],
    kv_weight: Float[Array, " D"],
    window: Rows,
    position: Int32[Array, " B"],
    length: Int32[Array, " B"],
    cos: Float32[Array, "B T pairs"],
    sin: Float32[Array, "B T pairs"],
    *,
    eps: float,
    format: str | None,
    activation: str | None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T Q"] | QuantArray, Float[Array, "B T D"], Rows]:
    """What queries are made of, normalised; and key-values, normalised, rotated and through `format`.

    Also the window with the key-values of the first `length` tokens in it.

    Source: `Attention.forward` of the released inference/model.py.

    Args:
      x: the columns of both, side by side.
      q_weight, kv_weight: of the norms.
      window: [B, slots, D], a ring: the row of position p is in slot p mod slots.
      position: of each sequence's first token in x.
      eps: `rms_norm_eps`.
      format: "fp8_block64", through which the key-values' columns go that are not rotated; None leaves them.
      activation: "fp8_token128", in which the first result is given then, as a linear takes it; or None.

    Raises:
      ValueError: x has other columns than the two norms.
    """
    if x.shape[-1] != q_weight.size + kv_weight.size:
        raise ValueError(f"x has {x.shape[-1]} columns, the norms {q_weight.size} and {kv_weight.size}")
    ring, settings = (window, position, length), (eps, format, activation)
    return select(LATENTS, implementation, x, q_weight, kv_weight, *ring, cos, sin, *settings)


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


def index_query(
    q: Float[Array, "B T I J"],
    projected: Float32[Array, "B T P"],
    cos: Float32[Array, "B T pairs"],
    sin: Float32[Array, "B T pairs"],
    *,
    column: int,
    format: str | None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T I J"] | TiledQueries, Float32[Array, "B T I"]]:
    """Rotation, Hadamard transform, and all columns through `format`; and the weight of each head.

    What went through a format is given as `index_scores` takes it with keys of that format.

    Source: `Indexer.forward` of the released inference/model.py.

    Args:
      projected: a product, whose I columns from `column` on are the weights, before they are rounded to the
        dtype of q and divided by sqrt(I * J).
      format: "fp4_group32", or None to leave the columns as they are.

    Raises:
      ValueError: J is not a power of two, or `projected` has no such columns.
    """
    _check_transform(q.shape[-1])
    _check_columns(projected, column, q.shape[-2])
    return select(INDEX_QUERY, implementation, q, projected, column, cos, sin, format)


def compressed_entries[Rows: CachedRows](
    projected: Float32[Array, "B T P"],
    ape: Float32[Array, "ratio C"],
    entries: Rows,
    kv_ring: Float32[Array, "B S C"],
    score_ring: Float32[Array, "B S C"],
    position: Int32[Array, " B"],
    length: Int32[Array, " B"],
    weight: Float[Array, " D"],
    cos: Float32[Array, "B N pairs"],
    sin: Float32[Array, "B N pairs"],
    *,
    column: int,
    eps: float,
    for_index: bool,
    format: str | None,
    dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> tuple[Rows, Float32[Array, "B S C"], Float32[Array, "B S C"]]:
    """The cache with the entries that `length` new tokens complete: pooled, normalised, rotated, quantised.

    Also the rings with the raw rows of those tokens. Entry i of a sequence covers positions i * ratio to
    (i + 1) * ratio - 1. What is pooled how is said at `compress`; what precedes the text takes no part.
    `compress` is followed by a rounding to `dtype`, an RMSNorm, and then by what `attention_latents` does
    with key-values, or, `for_index`, by what becomes of queries in `index_query`.

    Args:
      projected: a product, whose C columns from `column` on are the values of the new tokens, and the C after
        them their scores. The first token stands at `position`; those from `length` on are not looked at.
      ape: added to a score by its position modulo ratio.
      entries: [B, slots, D]; entry i stands in slot i, one past the last slot is dropped.
      kv_ring, score_ring: rows of the tokens before; that of position p is in slot p mod S. S is at least
        ratio * C / D - 1. The rings returned have the rows of the new tokens in them, `ape` added.
      weight: of the norm.
      cos, sin: of the first position of entry position // ratio and those after it. N of them say how many
        entries may be completed, T / ratio rounded up.
      eps: `rms_norm_eps`.
      for_index: transforms and quantises all columns, as `index_query`.
      format: "fp8_block64", with for_index "fp4_group32"; None leaves the columns as they are.

    Raises:
      ValueError: C is neither D nor 2 * D, `projected` has no such columns, S is too small, or D is no power
        of two with `for_index`.
    """
    (ratio, channels), (head_dim,) = ape.shape, weight.shape
    if channels not in (head_dim, 2 * head_dim):
        raise ValueError(f"there are {channels} channels, neither head_dim {head_dim} nor twice that")
    _check_columns(projected, column, 2 * channels)
    if (slots := kv_ring.shape[1]) < (reach := ratio * (channels // head_dim) - 1):
        raise ValueError(f"rings of {slots} slots do not hold the {reach} tokens that an entry may need")
    if for_index:
        _check_transform(head_dim)
    kept, settings = (entries, kv_ring, score_ring), (eps, for_index, format, dtype)
    arguments = (projected, column, ape, *kept, position, length, weight, cos, sin, *settings)
    return select(ENTRIES, implementation, *arguments)


def _check_columns(projected: Float32[Array, "B T P"], column: int, count: int) -> None:
    if not 0 <= column <= (columns := projected.shape[-1]) - count:
        raise ValueError(f"a product of {columns} columns has no {count} from {column} on")


def _check_transform(size: int) -> None:
    if not _power_of_two(size):
        raise ValueError(f"the transform needs a power of two, got {size} columns")
