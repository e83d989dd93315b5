"""The definition of `activation_quant`."""

import jax

from pallas_kernels.formats import QuantArray, quantize


def activation_quant(x: jax.Array) -> QuantArray:
    return quantize(x, "fp8_token128")
