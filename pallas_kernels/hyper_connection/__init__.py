"""Hyper-connections: several residual streams, mixed before and after each sub-layer."""

from jaxtyping import Array, Float, Float32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.hyper_connection import reference

PRE = (Implementation("reference", reference.hc_pre),)
POST = (Implementation("reference", reference.hc_post),)
HEAD = (Implementation("reference", reference.hc_head),)


def hc_pre(
    streams: Float[Array, "*tokens X M"],
    fn: Float32[Array, "(2+X)*X X*M"],
    scale: Float32[Array, "3"],
    base: Float32[Array, "(2+X)*X"],
    *,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "*tokens M"], Float32[Array, "*tokens X"], Float32[Array, "*tokens X X"]]:
    """Collapses the streams into a sub-layer's input and says how its output goes back.

    Returns the input (in the streams' dtype), `post` (what each stream takes of the output) and `comb`
    (how the old streams mix into the new ones, doubly stochastic up to `eps`). Everything is float32
    inside. Source: `hc_pre` of the released inference/model.py and `hc_split_sinkhorn` of kernel.py; the
    report writes the Sinkhorn steps in another order, the code is followed.

    Args:
      fn, scale, base: rows and numbers for pre (X), post (X) and comb (X*X), in this order.
      sinkhorn_iters: `hc_sinkhorn_iters`.
      eps: `hc_eps`.
      norm_eps: `rms_norm_eps`.
    """
    return select(PRE, implementation, streams, fn, scale, base, sinkhorn_iters, eps, norm_eps)


def hc_post(
    y: Float[Array, "*tokens M"],
    streams: Float[Array, "*tokens X M"],
    post: Float32[Array, "*tokens X"],
    comb: Float32[Array, "*tokens X X"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*tokens X M"]:
    """New stream j = post[j] * y + sum_i comb[i, j] * streams[i], in float32, in the streams' dtype."""
    return select(POST, implementation, y, streams, post, comb)


def hc_head(
    streams: Float[Array, "*tokens X M"],
    fn: Float32[Array, "X X*M"],
    scale: Float32[Array, "1"],
    base: Float32[Array, " X"],
    *,
    eps: float,
    norm_eps: float,
    implementation: str | None = None,
) -> Float[Array, "*tokens M"]:
    """Collapses the streams before the head: the `pre` part of `hc_pre` alone."""
    return select(HEAD, implementation, streams, fn, scale, base, eps, norm_eps)
