"""Rotary position embedding: by which angles the trailing dimensions turn, in interleaved pairs.

Layers without compression use plain RoPE at `rope_theta`; layers with it use YaRN at `compress_rope_theta`,
at every length and without an attention factor. Source: `precompute_freqs_cis` and `apply_rotary_emb` of the
released inference/model.py.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from dsv4_jax.config import Config, RopeScaling


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each pair of dimensions, by position."""

    cos: Float32[Array, "*rows pairs"]
    sin: Float32[Array, "*rows pairs"]


def _yarn(frequencies: np.ndarray, theta: float, rope_dim: int, scaling: RopeScaling) -> np.ndarray:
    """Slow frequencies divided by `factor`, fast ones kept, a linear ramp between."""

    def pair_that_turns(times: float) -> float:
        """Index of the pair that makes so many turns over the original length."""
        length = scaling.original_max_position_embeddings
        return rope_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), rope_dim - 1)
    ramp = np.clip((np.arange(rope_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequencies * (1 - ramp) + frequencies / scaling.factor * ramp


def rope_frequencies(config: Config, ratio: int) -> np.ndarray:
    """Radians a position, one float32 per pair of dimensions, for layers of this compression ratio."""
    rope_dim = config.qk_rope_head_dim
    theta = config.compress_rope_theta if ratio else config.rope_theta
    frequencies = theta ** (-np.arange(0, rope_dim, 2) / rope_dim)
    if ratio:
        frequencies = _yarn(frequencies, theta, rope_dim, config.rope_scaling)
    return frequencies.astype(np.float32)


def rotation(position: Int32[Array, "*rows"], frequencies: np.ndarray) -> Rotation:
    """Of each pair at each position, float32 [*rows, pairs]."""
    angles = position[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))
