"""The definition of `block_matmul` and `block_diagonal_matmul`."""

import jax
import jax.numpy as jnp

from pallas_kernels.activation_quant.reference import activation_quant
from pallas_kernels.formats import QuantArray, dequantize
from pallas_kernels.target import current_target


def product_operands(
    x: jax.Array | QuantArray, weight: jax.Array | QuantArray
) -> tuple[jax.Array, jax.Array]:
    """Both operands as plain arrays of one dtype that loses nothing of either.

    On a GPU the narrowest such; a CPU multiplies float32 ten times faster than bfloat16, to the same sums.
    """
    dtype = jnp.promote_types(_exact_dtype(x), _exact_dtype(weight))
    dtype = jnp.dtype(jnp.float32) if current_target().vendor == "cpu" else dtype
    return _numbers(x, dtype), _numbers(weight, dtype)


def _exact_dtype(array: jax.Array | QuantArray) -> jnp.dtype:
    return array.exact_dtype if isinstance(array, QuantArray) else array.dtype


def _numbers(array: jax.Array | QuantArray, dtype: jnp.dtype) -> jax.Array:
    return dequantize(array, dtype) if isinstance(array, QuantArray) else array.astype(dtype)


def _precision(x: jax.Array, weight: jax.Array, tokens: int) -> str | None:
    """Of a product that sums in float32.

    Products of bfloat16 numbers are exact there, whatever the precision. Asked for the highest, XLA makes
    float32 of the operands, far from a GPU's tensor cores; with one token, that is still its best.
    """
    return None if x.dtype == weight.dtype == jnp.bfloat16 and tokens > 1 else "highest"


def block_matmul(
    x: jax.Array | QuantArray, weight: jax.Array | QuantArray, out_dtype, activation: str | None = None
) -> jax.Array:
    if activation and not isinstance(x, QuantArray):
        x = activation_quant(x)
    x_TK, weight_NK = product_operands(x, weight)
    plain = not isinstance(x, QuantArray) and not isinstance(weight, QuantArray)
    precision = _precision(x_TK, weight_NK, x_TK.size // x_TK.shape[-1]) if plain else "highest"
    out_TN = jnp.einsum(
        "...k,nk->...n", x_TK, weight_NK, precision=precision, preferred_element_type=jnp.float32
    )
    return out_TN.astype(out_dtype)


def block_diagonal_matmul(x: jax.Array, weight: jax.Array | QuantArray, out_dtype) -> jax.Array:
    x_TGK, weight_NK = product_operands(x, weight)
    groups, columns = x_TGK.shape[-2:]
    weight_GOK = weight_NK.reshape(groups, -1, columns)
    precision = "highest"
    if not isinstance(weight, QuantArray):
        precision = _precision(x_TGK, weight_GOK, x_TGK.size // (groups * columns))
    out_TGO = jnp.einsum(
        "...gk,gok->...go", x_TGK, weight_GOK, precision=precision, preferred_element_type=jnp.float32
    )
    return out_TGO.astype(out_dtype)
