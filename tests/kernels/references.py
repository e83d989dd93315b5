"""What tests of the references share: inputs, what they stand for, and how far a sum may be off."""

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels import QuantArray

ULP = 2.0**-24  # half a unit in the last place of float32, relative

quantize = jax.jit(pk.quantize, static_argnums=1)
dequantize = jax.jit(pk.dequantize)

OPERANDS = {
    "plain": lambda x: jnp.asarray(x),
    "bfloat16": lambda x: jnp.asarray(x, jnp.bfloat16),
    "fp8 blocks": lambda x: quantize(x, "fp8_block128"),
    "fp4 groups": lambda x: quantize(x, "fp4_group32"),
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def numbers(array) -> np.ndarray:
    """What an operand stands for, in float64."""
    return np.float64(dequantize(array) if isinstance(array, QuantArray) else array)


def assert_sums_agree(found, terms: np.ndarray) -> None:
    """`found` is the sum of the last axis of `terms`, as float32 arithmetic in any order may give it."""
    # Products and partial sums each round once: at most as many half-ulps as terms, of the sum of magnitudes.
    bound = 2 * terms.shape[-1] * ULP * np.abs(terms).sum(-1)
    assert found.shape == terms.shape[:-1]
    assert (np.abs(np.float64(found) - terms.sum(-1)) <= bound).all()
