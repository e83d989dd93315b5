"""Hyper-connections: several residual streams, mixed before and after each sub-layer."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.hyper_connection import reference
from pallas_kernels.target import Target


def _run_pre(*arguments):
    from pallas_kernels.hyper_connection import triton  # Triton is an extra that a CPU does without

    return triton.hc_pre(*arguments)


def _run_post(*arguments):
    from pallas_kernels.hyper_connection import triton

    return triton.hc_post(*arguments)


def _run_post_pre(*arguments):
    from pallas_kernels.hyper_connection import triton

    return triton.hc_post_pre(*arguments)


def _run_head(*arguments):
    from pallas_kernels.hyper_connection import triton

    return triton.hc_head(*arguments)


def _streams_fit(target: Target, *in_bfloat16) -> bool:
    """The last one is the streams."""
    *_, n, columns = in_bfloat16[-1].shape
    alike = all(each.dtype == jnp.bfloat16 for each in in_bfloat16)
    fitting = n == 4 and columns % 128 == 0 and columns <= 16384 and in_bfloat16[-1].size > 0
    return target.vendor != "cpu" and alike and fitting


def _float32(*arrays) -> bool:
    return all(each.dtype == jnp.float32 for each in arrays)


def _norm_fits(norm_weight) -> bool:
    return norm_weight is None or norm_weight.dtype in (jnp.bfloat16, jnp.float32)


def _pre_fits(target: Target, streams, fn, scale, base, sinkhorn_iters, eps, norm_eps, norm_weight) -> bool:
    return _streams_fit(target, streams) and _float32(fn, scale, base) and _norm_fits(norm_weight)


def _post_fits(target: Target, y, streams, post, comb) -> bool:
    return _streams_fit(target, y, streams) and _float32(post, comb)


def _post_pre_fits(target: Target, y, streams, post, comb, *of_pre) -> bool:
    return _post_fits(target, y, streams, post, comb) and _pre_fits(target, streams, *of_pre)


def _head_fits(target: Target, streams, fn, scale, base, eps, norm_eps, norm_weight) -> bool:
    return _streams_fit(target, streams) and _float32(fn, scale, base) and _norm_fits(norm_weight)


PRE = (
    Implementation("triton", _run_pre, _pre_fits),
    Implementation("reference", reference.hc_pre),
)
POST = (
    Implementation("triton", _run_post, _post_fits),
    Implementation("reference", reference.hc_post),
)
POST_PRE = (
    Implementation("triton", _run_post_pre, _post_pre_fits),
    Implementation("reference", reference.hc_post_pre),
)
HEAD = (
    Implementation("triton", _run_head, _head_fits),
    Implementation("reference", reference.hc_head),
)


def hc_pre(
    streams: Float[Array, "*tokens X M"],
    fn: Float32[Array, "(2+X)*X X*M"],
    scale: Float32[Array, "3"],
    base: Float32[Array, "(2+X)*X"],
    *,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
    norm_weight: Float[Array, " M"] | None = None,
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
      norm_weight: of an RMSNorm that the input goes through, once it is rounded; None for none.
    """
    return select(PRE, implementation, streams, fn, scale, base, sinkhorn_iters, eps, norm_eps, norm_weight)


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


def hc_post_pre(
    y: Float[Array, "*tokens M"],
    streams: Float[Array, "*tokens X M"],
    post: Float32[Array, "*tokens X"],
    comb: Float32[Array, "*tokens X X"],
    fn: Float32[Array, "(2+X)*X X*M"],
    scale: Float32[Array, "3"],
    base: Float32[Array, "(2+X)*X"],
    *,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
    norm_weight: Float[Array, " M"] | None = None,
    implementation: str | None = None,
) -> tuple[
    Float[Array, "*tokens X M"],
    Float[Array, "*tokens M"],
    Float32[Array, "*tokens X"],
    Float32[Array, "*tokens X X"],
]:
    """`hc_post` of one sub-layer and `hc_pre` of the next: the new streams, and what `hc_pre` makes of them.

    Args:
      y, streams, post, comb: as `hc_post`.
      fn, scale, base, sinkhorn_iters, eps, norm_eps, norm_weight: as `hc_pre`.
    """
    before = (y, streams, post, comb)
    after = (fn, scale, base, sinkhorn_iters, eps, norm_eps, norm_weight)
    return select(POST_PRE, implementation, *before, *after)


def hc_head(
    streams: Float[Array, "*tokens X M"],
    fn: Float32[Array, "X X*M"],
    scale: Float32[Array, "1"],
    base: Float32[Array, " X"],
    *,
    eps: float,
    norm_eps: float,
    norm_weight: Float[Array, " M"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*tokens M"]:
    """Collapses the streams before the head: the `pre` part of `hc_pre` alone, `norm_weight` as there."""
    return select(HEAD, implementation, streams, fn, scale, base, eps, norm_eps, norm_weight)
