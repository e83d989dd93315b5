"""FP8 expert weights as the kernels take them: rows as stored, scales by eight rows.

    values [E, N, K]        float8_e4m3fn
    scale  [E, N/8, K/128]  float32, or uint8 (E8M0)

Blocks of 128 rows share a scale in the checkpoint; given to every eight rows, scales can be interleaved with
their rows (`interleave`). They are one in 1,024 bytes of the weight.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.formats import QuantArray

GROUP = 8
_REPEATS = 128 // GROUP


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertRows:
    """A stack of FP8 weights in the layout above."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, N, K]."""
        return self.values.shape


def to_rows(weight: QuantArray) -> ExpertRows:
    """Exactly the weight.

    Raises:
      NotImplementedError: rows or columns are not a multiple of 128, or it is not fp8_block128.
    """
    if weight.format != "fp8_block128" or weight.shape[-2] % 128 or weight.shape[-1] % 128:
        raise NotImplementedError(f"needs fp8_block128 in multiples of 128, not {weight.format}")
    return ExpertRows(weight.values, jnp.repeat(weight.scale, _REPEATS, axis=-2))


def from_rows(weight: ExpertRows) -> QuantArray:
    """The inverse of `to_rows`."""
    return QuantArray(weight.values, weight.scale[:, ::_REPEATS], "fp8_block128")
