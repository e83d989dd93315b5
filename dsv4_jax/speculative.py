"""Drafted tokens: how they are drawn, and which of them the model lets stand.

The rule is lossless: whatever the drafts, the tokens that come out are distributed as if each had been drawn
from the model alone, and at temperature 0 they are the same tokens. A draft x, drawn from q where the model
says p, stands with probability min(1, p(x) / q(x)); in place of the first that falls comes a draw from what
p has more than q; after the last that stands comes one from p. Source: Leviathan et al., "Fast Inference
from Transformers via Speculative Decoding", section 2.3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from dsv4_jax.sampling import SamplingArrays, all_greedy, draw, most_likely, truncated_logits, uniform


def propose(
    logits: Float32[Array, "B V"], sampling: SamplingArrays, step: Int32[Array, " B"]
) -> tuple[Int32[Array, " B"], Float32[Array, "B V"]]:
    """Draws a draft for each row from the draft head's logits, under the row's own temperature and cuts.

    Args:
      step: how many tokens the row will have before this one.

    Returns:
      the drafts, and the logits of the distributions that they were drawn from.
    """

    def drawn() -> tuple[jax.Array, jax.Array]:
        drawn_from = truncated_logits(logits, sampling)
        return draw(drawn_from, sampling.seed, step, "draft"), drawn_from

    return jax.lax.cond(all_greedy(sampling), lambda: (most_likely(logits), logits), drawn)


def verify(
    logits: Float32[Array, "B n V"],
    drafts: Int32[Array, "B n-1"],
    drawn_from: Float32[Array, "B n-1 V"],
    sampling: SamplingArrays,
    step: Int32[Array, " B"],
) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
    """How many of each row's drafts stand, and the token that comes after those.

    With no drafts at all (n = 1) the token is that of `sampling.sample`.

    Args:
      logits: the model's, after the newest token and after each draft.
      drawn_from: as `propose` gave it.
      step: how many tokens each row has before the first draft.
    """

    def greedy() -> tuple[jax.Array, jax.Array]:
        best = most_likely(logits)
        standing = _leading(drafts == best[:, :-1])
        return standing, jnp.take_along_axis(best, standing[:, None], axis=1)[:, 0]

    def drawn() -> tuple[jax.Array, jax.Array]:
        steps = step[:, None] + jnp.arange(logits.shape[1])
        wide = jax.tree.map(lambda leaf: jnp.repeat(leaf, logits.shape[1]), sampling)
        target = truncated_logits(logits.reshape(-1, logits.shape[-1]), wide).reshape(logits.shape)
        p, q = jax.nn.softmax(target), jax.nn.softmax(drawn_from)

        chosen = drafts[..., None]
        odds = jnp.take_along_axis(p[:, :-1], chosen, -1) / jnp.take_along_axis(q, chosen, -1)
        standing = _leading(uniform(sampling.seed, steps[:, :-1]) < odds[..., 0])

        # Past the last draft nothing was drafted: what p has more than nothing is p.
        q = jnp.concatenate([q, jnp.zeros_like(p[:, :1])], axis=1)
        at = standing[:, None, None]
        here, other = (jnp.take_along_axis(each, at, axis=1)[:, 0] for each in (p, q))
        rest = jnp.maximum(here - other, 0)
        fell = (standing < drafts.shape[1]) & (rest.sum(-1) > 0)  # equal but for rounding: p itself
        plain = jnp.take_along_axis(target, at, axis=1)[:, 0]
        left = jnp.where(fell[:, None], jnp.log(rest), plain)
        return standing, draw(left, sampling.seed, step + standing)

    return jax.lax.cond(all_greedy(sampling), greedy, drawn)


def _leading(holds: jax.Array) -> Int32[Array, " B"]:
    """How many of each row are true before the first that is not."""
    return jnp.cumprod(holds.astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)
