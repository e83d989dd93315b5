"""The forward pass of whole texts, dense and differentiable: what `model.Transformer` computes, uncached.

Attention is over all entries with masks in place of gathers, experts are all multiplied and most weighed 0:
more work for a large model, and the fastest for a small one. A test holds it against the model.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.config import Config
from dsv4_jax.nn.rope import rope_frequencies, rotation
from dsv4_jax.numerics import Numerics
from dsv4_jax.train.straight_through import rounded
from pallas_kernels.attention_inputs.reference import rms_norm, rms_normalize, rotate
from pallas_kernels.indexer.reference import hadamard
from pallas_kernels.routing.reference import choose_experts, gate_scores

Weights = dict[Any, Any]  # as `Params`, with plain float32 numbers in place of quantised ones


class Setting(NamedTuple):
    """What stays the same in a program.

    Attributes:
      numerics: as the model has them; `activation` is not simulated.
      choose: attend to the entries that the indexer chooses; else to all of them, for it to learn from.
    """

    config: Config
    numerics: Numerics
    choose: bool


class Reports(NamedTuple):
    """What training wants to know of a block besides its output.

    Attributes:
      load: the share of the tokens that each expert got, of routers that go by score; else None.
      alignment: how far the indexer's scores are from the attention that they are for, in nats; else 0.
    """

    load: jax.Array | None
    alignment: jax.Array | float


def product(x: jax.Array, weight: jax.Array, out_dtype=None) -> jax.Array:
    """x @ weight.T, the operands in the dtype of `x`, the sum in float32."""
    out = jnp.einsum("...k,nk->...n", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(out_dtype or x.dtype)


# --- hyper-connections; streams are lists, so that everything between products is one pass over memory


def _mix(streams: list[jax.Array], weights: Weights, eps: float) -> list[jax.Array]:
    wide = jnp.concatenate(streams, -1).astype(jnp.float32)
    rms = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    mixed = jnp.einsum("...k,nk->...n", wide, weights["fn"]) * rms
    return [mixed[..., i] for i in range(mixed.shape[-1])]


def _collapse(shares: list[jax.Array], streams: list[jax.Array]) -> jax.Array:
    terms = (
        share[..., None] * stream.astype(jnp.float32) for share, stream in zip(shares, streams, strict=True)
    )
    return functools.reduce(operator.add, terms).astype(streams[0].dtype)


def _sinkhorn(logits: list[list[jax.Array]], iterations: int, eps: float) -> list[list[jax.Array]]:
    n = range(len(logits))

    def columns(comb):
        totals = [sum(comb[i][j] for i in n) + eps for j in n]
        return [[comb[i][j] / totals[j] for j in n] for i in n]

    top = [jax.lax.stop_gradient(jnp.stack(row).max(0)) for row in logits]
    comb = [[jnp.exp(each - top[i]) for each in logits[i]] for i in n]
    comb = [[each / sum(row) + eps for each in row] for row in comb]
    comb = columns(comb)
    for _ in range(iterations - 1):
        comb = columns([[each / (sum(row) + eps) for each in row] for row in comb])
    return comb


def read(
    streams: list[jax.Array], weights: Weights, norm: jax.Array, config: Config
) -> tuple[jax.Array, list[jax.Array], list[list[jax.Array]]]:
    """A sub-layer's input, and how its output goes back: `post` and `comb`."""
    n, scale, base = len(streams), weights["scale"], weights["base"]
    mixed = _mix(streams, weights, config.rms_norm_eps)
    pre = [jax.nn.sigmoid(mixed[i] * scale[0] + base[i]) + config.hc_eps for i in range(n)]
    post = [2 * jax.nn.sigmoid(mixed[i] * scale[1] + base[i]) for i in range(n, 2 * n)]
    logits = [mixed[i] * scale[2] + base[i] for i in range(2 * n, len(mixed))]
    comb = _sinkhorn([logits[n * i : n * i + n] for i in range(n)], config.hc_sinkhorn_iters, config.hc_eps)
    return rms_norm(_collapse(pre, streams), norm, config.rms_norm_eps), post, comb


def write(
    y: jax.Array, streams: list[jax.Array], post: list[jax.Array], comb: list[list[jax.Array]]
) -> list[jax.Array]:
    """The streams with the sub-layer's output in them."""
    n, wide = range(len(streams)), y.astype(jnp.float32)
    return [
        (
            post[j][..., None] * wide + sum(comb[i][j][..., None] * streams[i].astype(jnp.float32) for i in n)
        ).astype(y.dtype)
        for j in n
    ]


# --- attention


def _entries(x: jax.Array, weights: Weights, ratio: int, setting: Setting, *, for_index: bool) -> jax.Array:
    """The compressed entries of a text [B, T, M], or the indexer's keys: [B, T // ratio, D]."""
    config, numerics = setting.config, setting.numerics
    head_dim = weights["norm"]["weight"].size
    by_window = (x.shape[0], x.shape[1] // ratio, ratio, -1)
    kv = product(x, weights["wkv"]["weight"], jnp.float32).reshape(by_window)
    score = product(x, weights["wgate"]["weight"], jnp.float32).reshape(by_window) + weights["ape"]
    if ratio == 4:  # the window before takes the first half of the channels

        def with_before(rows, first):
            before = jnp.pad(
                rows[:, :-1, :, :head_dim], ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=first
            )
            return jnp.concatenate([before, rows[..., head_dim:]], 2)

        kv, score = with_before(kv, 0), with_before(score, -jnp.inf)
    pooled = (jax.nn.softmax(score, axis=2) * kv).sum(2).astype(x.dtype)
    normed = rms_norm(pooled, weights["norm"]["weight"], config.rms_norm_eps)
    turns = rotation(jnp.arange(pooled.shape[1]) * ratio, rope_frequencies(config, ratio))
    turned = rotate(normed, *turns)
    if for_index:
        return rounded(hadamard(turned), numerics.index)
    return _round_plain(turned, config, numerics.kv)


def _round_plain(x: jax.Array, config: Config, format: str | None) -> jax.Array:
    plain, turned = jnp.split(x, [config.nope_head_dim], axis=-1)
    return jnp.concatenate([rounded(plain, format), turned], axis=-1)


def index_scores(
    x: jax.Array, q_latent: jax.Array, weights: Weights, ratio: int, setting: Setting
) -> jax.Array:
    """The indexer's score of every entry for every token, [B, T, S]."""
    config, heads = setting.config, setting.config.index_n_heads
    keys = _entries(x, weights["compressor"], ratio, setting, for_index=True)
    q = product(q_latent, weights["wq_b"]["weight"]).reshape(*x.shape[:2], heads, config.index_head_dim)
    turns = rotation(jnp.arange(x.shape[1]), rope_frequencies(config, ratio))
    q = rounded(hadamard(rotate(q, *(each[:, None] for each in turns))), setting.numerics.index)
    share = (
        product(x, weights["weights_proj"]["weight"], jnp.float32) * (heads * config.index_head_dim) ** -0.5
    )

    def add_head(total, head):
        q_BTJ, share_BT = head
        hits = jnp.einsum("btj,bsj->bts", q_BTJ, keys, preferred_element_type=jnp.float32)
        return total + share_BT[..., None] * jax.nn.relu(hits), None

    nothing = jnp.zeros((*x.shape[:2], keys.shape[1]), jnp.float32)
    by_head = jnp.moveaxis(q, 2, 0), jnp.moveaxis(share, 2, 0)
    return jax.lax.scan(jax.checkpoint(add_head), nothing, by_head)[0]


def attention(
    x: jax.Array, weights: Weights, ratio: int, setting: Setting, *, shuffle: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | float]:
    """Attention of whole texts [B, T, M], T a multiple of 128; and the indexer's alignment."""
    config, numerics = setting.config, setting.numerics
    batch, tokens, _ = x.shape
    heads, head_dim, window = config.num_attention_heads, config.head_dim, config.sliding_window
    blocks, eps = tokens // window, config.rms_norm_eps
    turns = rotation(jnp.arange(tokens), rope_frequencies(config, ratio))
    turns_of_heads = [each[:, None] for each in turns]
    q_latent = rms_norm(product(x, weights["wq_a"]["weight"]), weights["q_norm"]["weight"], eps)
    kv = rms_norm(product(x, weights["wkv"]["weight"]), weights["kv_norm"]["weight"], eps)
    kv = _round_plain(rotate(kv, *turns), config, numerics.kv)
    q = product(q_latent, weights["wq_b"]["weight"]).reshape(batch, tokens, heads, head_dim)
    q = rotate(rms_normalize(q, eps), *turns_of_heads)

    # A block of queries sees its own rows and those of the block before.
    q = q.reshape(batch, blocks, window, heads, head_dim)
    own = kv.reshape(batch, blocks, window, head_dim)
    near = jnp.concatenate([jnp.pad(own[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0))), own], 2)
    position = jnp.arange(tokens).reshape(blocks, window)
    near_position = (jnp.arange(blocks)[:, None] - 1) * window + jnp.arange(2 * window)
    back = position[:, :, None] - near_position[:, None]
    seen = (back >= 0) & (back < window) & (near_position[:, None] >= 0)
    logits = jnp.einsum("bnwhd,bnkd->bnhwk", q, near, preferred_element_type=jnp.float32)
    logits = jnp.where(seen[:, None], logits * head_dim**-0.5, -jnp.inf)

    entries, alignment = None, 0.0
    if ratio:
        entries = _entries(x, weights["compressor"], ratio, setting, for_index=False)
        visible = jnp.arange(entries.shape[1]) < (position[..., None] + 1) // ratio  # [blocks, W, S]
        far = jnp.einsum("bnwhd,bsd->bnhws", q, entries, preferred_element_type=jnp.float32)
        far = jnp.where(visible[:, None], far * head_dim**-0.5, -jnp.inf)
        if ratio == 4:
            x_there, latent_there = jax.lax.stop_gradient((x, q_latent))
            scores = index_scores(x_there, latent_there, weights["indexer"], ratio, setting)
            scores = jnp.where(visible, scores.reshape(batch, *visible.shape), -jnp.inf)
            chosen = visible
            if setting.choose and entries.shape[1] > config.index_topk:
                best = jax.lax.top_k(jax.lax.stop_gradient(scores), config.index_topk)[0]
                chosen = visible & (scores >= best[..., -1:])
                far = jnp.where(chosen[:, :, None], far, -jnp.inf)
            alignment = _divergence(jax.lax.stop_gradient(far), logits, scores, chosen)
        logits = jnp.concatenate([logits, far], -1)

    sink = weights["attn_sink"][:, None, None]
    top = jax.lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), sink))
    share = jnp.exp(logits - top)
    share = (share / (share.sum(-1, keepdims=True) + jnp.exp(sink - top))).astype(x.dtype)
    out = jnp.einsum("bnhwk,bnkd->bnwhd", share[..., : 2 * window], near, preferred_element_type=jnp.float32)
    if entries is not None:
        rest = share[..., 2 * window :]
        out += jnp.einsum("bnhws,bsd->bnwhd", rest, entries, preferred_element_type=jnp.float32)
    out = out.astype(x.dtype).reshape(batch, tokens, heads, head_dim)
    cos, sin = turns_of_heads
    out = rotate(out, cos, -sin).reshape(batch, tokens, config.o_groups, -1)
    wo_a = weights["wo_a"]["weight"].reshape(config.o_groups, config.o_lora_rank, -1).astype(x.dtype)
    grouped = jnp.einsum("btgk,gok->btgo", out, wo_a, preferred_element_type=jnp.float32).astype(x.dtype)
    return product(grouped.reshape(batch, tokens, -1), weights["wo_b"]["weight"]), alignment


def _divergence(far: jax.Array, near: jax.Array, scores: jax.Array, chosen: jax.Array) -> jax.Array:
    """KL between the attention of all heads to the entries and the scores, a mean over tokens.

    Tokens count by how much of their attention goes to entries at all.
    """
    total = jnp.logaddexp(jax.nn.logsumexp(far, -1), jax.nn.logsumexp(jax.lax.stop_gradient(near), -1))
    wanted = jnp.exp(far - total[..., None]).mean(2)  # [B, blocks, W, S], of a sum below 1
    log_scores = jax.nn.log_softmax(jnp.where(chosen, scores, -1e30), -1)
    mass = wanted.sum(-1, keepdims=True)
    log_wanted = jnp.log(jnp.maximum(wanted, 1e-30) / jnp.maximum(mass, 1e-30))
    per_token = jnp.where(chosen & (wanted > 0), wanted * (log_wanted - log_scores), 0).sum(-1)
    return per_token.sum() / jnp.maximum(mass.sum(), 1e-6)


# --- experts


def mixture(
    x: jax.Array, ids: jax.Array, weights: Weights, config: Config
) -> tuple[jax.Array, jax.Array | None]:
    """Routed and shared experts of [B, T, M], and each expert's share of the tokens if they go by score."""
    gate, experts, shared = weights["gate"], weights["experts"], weights["shared_experts"]
    scores = gate_scores(product(x, gate["weight"], jnp.float32))
    if "tid2eid" in gate:
        chosen = gate["tid2eid"][ids]
    else:
        chosen = choose_experts(jax.lax.stop_gradient(scores), gate["bias"], config.num_experts_per_tok)
    mask = jax.nn.one_hot(chosen, config.n_routed_experts).sum(-2)
    share = scores * mask
    share = share / share.sum(-1, keepdims=True) * config.routed_scaling_factor

    def inner(w1, w3, equation):
        up, gated = (
            jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
            for w in (w3, w1)
        )
        gated = jnp.minimum(gated.astype(jnp.float32), config.swiglu_limit)
        return jax.nn.silu(gated) * jnp.clip(
            up.astype(jnp.float32), -config.swiglu_limit, config.swiglu_limit
        )

    routed = (inner(experts["w1"], experts["w3"], "btm,efm->btef") * share[..., None]).astype(x.dtype)
    out = jnp.einsum(
        "btef,emf->btm", routed, experts["w2"].astype(x.dtype), preferred_element_type=jnp.float32
    )
    own = inner(shared["w1"]["weight"], shared["w3"]["weight"], "btm,fm->btf").astype(x.dtype)
    out += product(own, shared["w2"]["weight"], jnp.float32)
    load = None if "tid2eid" in gate else mask.mean((0, 1))
    return out.astype(x.dtype), load


# --- the whole


def block(
    streams: list[jax.Array], ids: jax.Array, weights: Weights, ratio: int, setting: Setting
) -> tuple[list[jax.Array], Reports]:
    """One layer."""
    config = setting.config
    x, post, comb = read(streams, weights["hc_attn"], weights["attn_norm"]["weight"], config)
    y, alignment = attention(x, weights["attn"], ratio, setting)
    streams = write(y, streams, post, comb)
    x, post, comb = read(streams, weights["hc_ffn"], weights["ffn_norm"]["weight"], config)
    y, load = mixture(x, ids, weights["ffn"], config)
    return write(y, streams, post, comb), Reports(load, alignment)


def embed(ids: jax.Array, weights: Weights, setting: Setting) -> jax.Array:
    return weights["embed"]["weight"].astype(setting.numerics.dtype)[ids]


def head(streams: list[jax.Array], weights: Weights, main: Weights, config: Config) -> jax.Array:
    """Logits, by the collapse and norm of `weights`: the main model's, or those of its MTP head."""
    hyper = weights["hc_head"]
    mixed = _mix(streams, hyper, config.rms_norm_eps)
    pre = [
        jax.nn.sigmoid(each * hyper["scale"] + hyper["base"][i]) + config.hc_eps
        for i, each in enumerate(mixed)
    ]
    x = rms_norm(_collapse(pre, streams), weights["norm"]["weight"], config.rms_norm_eps)
    return product(x, main["head"]["weight"], jnp.float32)


def forward(
    ids: jax.Array, weights: Weights, setting: Setting, *, remat: bool = False
) -> tuple[jax.Array, jax.Array, list[Reports]]:
    """Logits [B, T, V] of the next tokens; the MTP head's, of the tokens after those; a report of each block.

    The MTP head reads the next tokens too: the last position has none, and its logits mean nothing.
    """
    config = setting.config
    run = jax.checkpoint(block, static_argnums=(3, 4)) if remat else block
    streams, reports = [embed(ids, weights, setting)] * config.hc_mult, []
    for layer, ratio in enumerate(config.main_ratios):
        streams, report = run(streams, ids, weights["layers"][layer], ratio, setting)
        reports.append(report)
    logits = head(streams, weights, weights, config)

    mtp, next_ids, eps = weights["mtp"][0], jnp.roll(ids, -1, 1), config.rms_norm_eps
    token = product(
        rms_norm(embed(next_ids, weights, setting), mtp["enorm"]["weight"], eps), mtp["e_proj"]["weight"]
    )
    mixed = [
        token + product(rms_norm(each, mtp["hnorm"]["weight"], eps), mtp["h_proj"]["weight"])
        for each in streams
    ]
    streams, report = run(mixed, next_ids, mtp["block"], 0, setting)
    return logits, head(streams, mtp, weights, config), [*reports, report]
