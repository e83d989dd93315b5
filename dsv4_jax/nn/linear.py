"""Linear layers without bias: y = x @ weight.T."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv4_jax.config import Config
from dsv4_jax.nn.parameter import parameter, quantized_parameter, scale_dtype
from dsv4_jax.numerics import Numerics
from pallas_kernels import QuantArray, block_diagonal_matmul, block_matmul


class Linear(nnx.Module):
    """FP8 in 128x128 blocks; a checkpoint may store any one of them as bfloat16 instead."""

    def __init__(
        self, shape: tuple[int, int], axes: tuple[str | None, ...], config: Config, numerics: Numerics
    ):
        self.weight = quantized_parameter(shape, "fp8_block128", scale_dtype(config), *axes)
        self.rows = shape[0]
        self.numerics = numerics

    @property
    def activation(self) -> str | None:
        """The format in which it takes its input.

        An unquantised weight was left so because its product is sensitive: its input stays too.
        """
        return self.numerics.activation if isinstance(self.weight.get_value(), QuantArray) else None

    def __call__(
        self, x: Float[Array, "*tokens in"] | QuantArray, *, partial: bool = False
    ) -> Float[Array, "*tokens out"]:
        """The product with `x`, which may be quantised already; one that is `partial`, a term of a sum over
        devices, in float32.
        """
        out_dtype = self._out_dtype(partial)
        return block_matmul(x, self.weight.get_value(), out_dtype=out_dtype, activation=self.activation)

    def _out_dtype(self, partial: bool) -> str:
        return "float32" if partial else self.numerics.dtype


def products(
    x: Float[Array, "*tokens in"], first: Linear, second: Linear
) -> tuple[Float[Array, "*tokens first"], Float[Array, "*tokens second"] | None]:
    """Both linears of one input; side by side in the first place where their weights were joined at load."""
    return first(x), None if second.weight.get_value() is None else second(x)


def side_by_side(
    x: Float[Array, "*tokens in"], *linears: "Linear | PlainLinear"
) -> Float[Array, "*tokens out"]:
    """The columns of all linears of one input; one product, if their weights were joined at load."""
    columns = [linear(x) for linear in linears if linear.weight.get_value() is not None]
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=-1)


class BlockDiagonalLinear(Linear):
    """`wo_a`: each group of heads has its own rows; the released model gives it unquantised activations."""

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "*tokens groups in"], *, partial: bool = False
    ) -> Float[Array, "*tokens groups out"]:
        return block_diagonal_matmul(x, self.weight.get_value(), out_dtype=self._out_dtype(partial))


class PlainLinear(nnx.Module):
    """A small linear that is stored as bfloat16; `out_dtype` is float32 where rounding hurts."""

    def __init__(self, shape: tuple[int, int], axes: tuple[str | None, str], out_dtype):
        self.weight = parameter(shape, jnp.bfloat16, *axes)
        self.out_dtype = jnp.dtype(out_dtype)

    def __call__(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        return block_matmul(x, self.weight.get_value(), out_dtype=self.out_dtype)
