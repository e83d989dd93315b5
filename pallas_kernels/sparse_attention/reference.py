"""The definition of `sparse_attention`."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention_inputs.reference import rotate
from pallas_kernels.cached_rows import KeyValues, read_rows

# Gathered keys of all queries at once would not fit for long prompts.
QUERIES_AT_ONCE = 64


def sparse_attention(
    q: jax.Array,
    window_kv: KeyValues,
    window_index: jax.Array,
    compressed_kv: KeyValues | None,
    compressed_index: jax.Array | None,
    attn_sink: jax.Array,
    turns: tuple[jax.Array, jax.Array] | None,
    softmax_scale: float,
) -> jax.Array:
    def one_query(query):
        q_BHD, window_BW, compressed_BK, turns_BP = query
        kv_BKD, index_BK = read_rows(window_kv, window_BW, jnp.float32), window_BW
        if compressed_kv is not None:
            entries_BKD = read_rows(compressed_kv, compressed_BK, jnp.float32)
            kv_BKD = jnp.concatenate([kv_BKD, entries_BKD], 1)
            index_BK = jnp.concatenate([index_BK, compressed_BK], 1)
        out_BHD = _attend(q_BHD, kv_BKD, index_BK >= 0, attn_sink, softmax_scale)
        if turns_BP is not None:
            cos_B1P, sin_B1P = (each[:, None] for each in turns_BP)
            out_BHD = rotate(out_BHD, cos_B1P, -sin_B1P)
        return out_BHD.astype(q.dtype)

    arrays = (q, window_index, compressed_index, turns)
    by_token = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), arrays)
    out_TBHD = jax.lax.map(one_query, by_token, batch_size=max(1, QUERIES_AT_ONCE // q.shape[0]))
    return jnp.moveaxis(out_TBHD, 0, 1)


def _attend(q_BHD, kv_BKD, valid_BK, attn_sink, softmax_scale):
    logits_BHK = jnp.einsum("bhd,bkd->bhk", q_BHD.astype(jnp.float32), kv_BKD, precision="highest")
    logits_BHK *= softmax_scale
    logits_BHK = jnp.where(valid_BK[:, None], logits_BHK, -jnp.inf)
    # The maximum is over real keys; a query that has none keeps a finite one, and so gives zeros.
    top_BH1 = jnp.maximum(logits_BHK.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weight_BHK = jnp.exp(logits_BHK - top_BH1)
    total_BH1 = weight_BHK.sum(-1, keepdims=True) + jnp.exp(attn_sink[:, None] - top_BH1)
    out_BHD = jnp.einsum("bhk,bkd->bhd", weight_BHK, kv_BKD, precision="highest")
    return jnp.where(valid_BK.any(-1)[:, None, None], out_BHD / total_BH1, 0.0)
