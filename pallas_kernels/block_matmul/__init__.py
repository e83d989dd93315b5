"""Products with a linear layer's weight: FP8 in 128x128 blocks, or unquantised."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.block_matmul import reference
from pallas_kernels.block_matmul.tiles import BLOCK, tile_for
from pallas_kernels.dispatch import Implementation, default_of, select
from pallas_kernels.formats import QuantArray, dequantize
from pallas_kernels.target import Target, current_target

MOST_NUMBERS = 2**31  # the kernels' offsets have 32 bits
MOST_PLAIN_ROWS = 8192
MANY_TOKENS = 1024  # from which on decoding the weight of `wo_a` first costs less than it saves


def _mosaic_block_matmul(x, weight, out_dtype, activation):
    from pallas_kernels.block_matmul import mosaic, mosaic_config, mosaic_few  # that only a Hopper GPU needs

    shape = mosaic_config.shape_of(x, weight)
    config = mosaic_config.chosen(shape) or mosaic_config.by_rule(shape)
    if isinstance(config, mosaic_config.Few):
        return mosaic_few.block_matmul(x, weight, out_dtype, config=config)
    return mosaic.block_matmul(x, weight, out_dtype, config=config)


def _mosaic_fits(target: Target, x, weight, out_dtype, activation=None) -> bool:
    if target.vendor != "cuda" or target.arch != "sm_90":
        return False
    from pallas_kernels.block_matmul import mosaic_config

    return mosaic_config.takes(x, weight, out_dtype)


def _mosaic_is_faster(target: Target, x, weight, out_dtype, activation=None) -> bool:
    """Than Triton's kernel."""
    if not _mosaic_fits(target, x, weight, out_dtype, activation):
        return False
    from pallas_kernels.block_matmul import mosaic_config

    return mosaic_config.chosen(mosaic_config.shape_of(x, weight)) is not None


def _triton_block_matmul(*args, **kwargs):
    from pallas_kernels.block_matmul import triton  # Triton is an extra that a CPU does without

    return triton.block_matmul(*args, **kwargs)


def _triton_block_diagonal_matmul(*args, **kwargs):
    from pallas_kernels.block_matmul import triton

    return triton.block_diagonal_matmul(*args, **kwargs)


def _is_streamed(target: Target, x, weight) -> bool:
    """Whether all of K is in one program: of a single token, where the chip's tiles are made for it."""
    return x.size == x.shape[-1] and tile_for(target.arch, "fp8", 1, *weight.shape).tokens == 1


def _triton_fits(target: Target, x, weight, out_dtype, activation=None) -> bool:
    """An FP8 weight in whole blocks of columns; activations in FP8 or bfloat16, or one to be quantised."""
    if activation and not (
        target.has_e4m3 and isinstance(weight, QuantArray) and _is_streamed(target, x, weight)
    ):
        return False
    if target.vendor == "cpu" or (target.vendor == "rocm" and target.arch not in ("gfx942", "gfx950")):
        return False
    if not isinstance(weight, QuantArray) or weight.format != "fp8_block128" or weight.ndim != 2:
        return False
    right_x = x.format == "fp8_token128" if isinstance(x, QuantArray) else x.dtype == jnp.bfloat16
    right_out = jnp.dtype(out_dtype) in (jnp.bfloat16, jnp.float32)
    right_size = weight.shape[1] % BLOCK == 0 and 0 < x.size < MOST_NUMBERS and weight.size < MOST_NUMBERS
    return right_x and right_out and right_size


def _decoded_block_diagonal_matmul(x, weight, out_dtype):
    return reference.block_diagonal_matmul(x, dequantize(weight, jnp.bfloat16), out_dtype)


def _decoded_fits(target: Target, x, weight, out_dtype) -> bool:
    """Many tokens, to which a weight is exact in bfloat16."""
    tokens = x.size // (x.shape[-2] * x.shape[-1])
    return (
        tokens >= MANY_TOKENS
        and _triton_fits(target, x, weight, out_dtype)
        and weight.scale.dtype == jnp.uint8
    )


def _triton_fits_diagonal(target: Target, x, weight, out_dtype) -> bool:
    whole_tiles = weight.shape[0] // x.shape[-2] % 16 == 0
    return whole_tiles and not isinstance(x, QuantArray) and _triton_fits(target, x, weight, out_dtype)


def _triton_plain_matmul(x, weight, out_dtype, activation):
    from pallas_kernels.block_matmul import triton

    return triton.plain_matmul(x, weight, out_dtype)


def _triton_fits_plain(target: Target, x, weight, out_dtype, activation=None) -> bool:
    """A token and a small weight in bfloat16: XLA reads the head at the memory's speed, but no small ones."""
    if target.arch not in ("sm_90", "sm_100") or isinstance(x, QuantArray) or isinstance(weight, QuantArray):
        return False
    one = x.size == x.shape[-1] and x.dtype == weight.dtype == jnp.bfloat16
    return one and weight.shape[0] <= MOST_PLAIN_ROWS and weight.shape[1] % BLOCK == 0


MATMUL = (
    Implementation("mosaic", _mosaic_block_matmul, fits=_mosaic_is_faster),
    Implementation("triton", _triton_block_matmul, fits=_triton_fits),
    Implementation("triton", _triton_plain_matmul, fits=_triton_fits_plain),
    Implementation("mosaic", _mosaic_block_matmul, fits=_mosaic_fits),
    Implementation("reference", reference.block_matmul),
)
DIAGONAL = (
    Implementation("xla", _decoded_block_diagonal_matmul, fits=_decoded_fits),
    Implementation("triton", _triton_block_diagonal_matmul, fits=_triton_fits_diagonal),
    Implementation("reference", reference.block_diagonal_matmul),
)


def block_matmul(
    x: Float[Array, "*tokens K"] | QuantArray,
    weight: Float[Array, "N K"] | QuantArray,
    *,
    out_dtype=jnp.bfloat16,
    activation: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "*tokens N"]:
    """x @ weight.T with float32 accumulation, rounded once to `out_dtype`.

    Source: `fp8_gemm` in the released inference/kernel.py.

    Args:
      x: activations, plain or already quantised (`activation_quant`).
      weight: one row per output.
      activation: "fp8_token128" quantises plain activations of a quantised weight first.

    Raises:
      ValueError: x and weight differ in K.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"x has {x.shape[-1]} columns, weight has {weight.shape[-1]}: {x.shape}, {weight.shape}"
        )
    if isinstance(x, QuantArray) or not isinstance(weight, QuantArray):
        activation = None
    elif activation and implementation != "reference":
        runs = implementation or default_of(MATMUL, x, weight, out_dtype, activation).name
        if runs != "triton" or not _triton_fits(current_target(), x, weight, out_dtype, activation):
            x, activation = activation_quant(x), None
    return select(MATMUL, implementation, x, weight, out_dtype, activation)


def block_diagonal_matmul(
    x: Float[Array, "*tokens G K"],
    weight: Float[Array, "G*O K"] | QuantArray,
    *,
    out_dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "*tokens G O"]:
    """Each group of `x` times its own slab of rows of `weight`: the product of `wo_a`.

    Source: the `einsum` with wo_a in the released inference/model.py. The weight is stored in FP8 and the
    product takes unquantised activations.

    Args:
      weight: the G slabs of O rows, one below the other.

    Raises:
      ValueError: the rows of `weight` do not divide by the groups of `x`, or K differs.
    """
    if weight.shape[0] % x.shape[-2] or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"weight {weight.shape} does not split into {x.shape[-2]} slabs of {x.shape[-1]} columns"
        )
    return select(DIAGONAL, implementation, x, weight, out_dtype)


def join_rows(
    first: Float[Array, "N K"] | QuantArray, second: Float[Array, "O K"] | QuantArray, target: Target
) -> tuple[Float[Array, "N+O K"] | QuantArray, Float[Array, "O K"] | QuantArray | None]:
    """Two weights that multiply the same activations, as one; to be called once, at load.

    Returns:
      The rows of both and None; or the two as they are, where no kernel gains or their blocks do not meet.
    """
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(weight)] for weight in (first, second)]
    alike = jax.tree.structure(first) == jax.tree.structure(second) and dtypes[0] == dtypes[1]
    if isinstance(first, QuantArray):
        alike = alike and first.format == "fp8_block128" and first.shape[0] % BLOCK == 0
    if target.vendor == "cpu" or not alike or first.shape[1] != second.shape[1]:
        return first, second
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), first, second), None
