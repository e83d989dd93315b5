"""Routed experts on the tensor cores: two products, the gated activation between them.

Weights are the rows of the tensor core's product and tokens its columns, so even a single token reads each
weight once and at full width, and a token's sum runs over K in one order whatever else is in the batch.
Activations in `fp8_token128` meet weights in E4M3: those of FP4 weights come from a table, exactly, those of
FP8 weights are what is stored. This is the released arithmetic, on FP8 tensor cores. Unquantised activations
meet the same weights in bfloat16.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.expert_mlp.decode_triton import fp4_operand, pairs_in_tile_order
from pallas_kernels.expert_mlp.plan import Plan, plan, total_of_choices
from pallas_kernels.expert_mlp.quant import tile_quant
from pallas_kernels.expert_mlp.rows import ExpertRows
from pallas_kernels.expert_mlp.tiles import ExpertTiles
from pallas_kernels.expert_mlp.tilings import Operands, Tiling, Tilings, tilings_for
from pallas_kernels.formats import e8m0_decode, fake_quantize
from pallas_kernels.target import current_target
from pallas_kernels.triton_call import triton_call


@triton.jit
def _power_of_two(exponent):
    """2^(exponent - 127) of E8M0 bytes as float32; 0 stands for the smallest normal number."""
    return (tl.maximum(exponent.to(tl.int32), 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _number(scale):
    """A scale as float32, whether it is stored so or as an E8M0 byte."""
    if scale.dtype == tl.uint8:
        scale = _power_of_two(scale)
    return scale


@triton.jit
def _product(
    values,  # FP4: tiles; FP8: [E, N, K] e4m3
    scale,  # FP4: [E, N] uint8, the exponents of rows; FP8: [E, N/8, K/128]
    x,  # [?, K] e4m3, or bfloat16 without scales
    x_scale,  # [?, K/128] uint8, or [K/128, STRIDE] float32 of rows in sorted order
    expert,
    block,
    rows,  # [BT] of x
    start,  # of these rows in sorted order
    real,  # [BT]
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    FP4: tl.constexpr,
    FP8: tl.constexpr,
    SORTED: tl.constexpr,
    STRIDE: tl.constexpr,
    VENDOR: tl.constexpr,
):
    """[BN, BT] float32: BN rows of an expert's weight, from row block * BN, times the `rows` of x."""
    KT: tl.constexpr = K // 128
    WORDS: tl.constexpr = tl.constexpr(1088)  # of a tile of 64 rows: 1024 of codes, 64 of multipliers
    first = expert.to(tl.int64) * N + block * BN
    x_at = x + rows.to(tl.int64)[:, None] * K + tl.arange(0, 128)[None, :]
    # Neighbours in memory need one pointer a thread; a pointer for each row costs half the registers.
    x_scale_at = x_scale + start + tl.arange(0, BT) if SORTED else x_scale + rows.to(tl.int64) * KT
    if FP4:
        # Words of eight values, of the first half of a tile's columns; words of four multipliers.
        tiles = values.to(tl.pointer_type(tl.int32)) + first // 64 * (KT * WORDS)
        n16 = tl.arange(0, BN // 16)
        word_at = tiles + (n16 // 4 * (KT * WORDS) + n16 % 4 * 256)[:, None] + tl.arange(0, 128)[None, :]
        share_at = tiles + (n16 // 4 * (KT * WORDS) + n16 % 4 * 16)[:, None] + tl.arange(1024, 1040)[None, :]
    else:
        value_at = values + (first + tl.arange(0, BN))[:, None] * K + tl.arange(0, 128)[None, :]
        scale_at = scale + (first // 8 + tl.arange(0, BN) // 8) * KT

    total = tl.zeros((BN, BT), tl.float32)
    if FP8:
        following = tl.load(x_scale_at) if SORTED else tl.load(x_scale_at, mask=real, other=0)
    for k in range(KT):
        # Weights first: their loads need not wait for the list of rows to arrive.
        if FP4:
            words, shares = tl.load(word_at + k * WORDS), tl.load(share_at + k * WORDS)
            more = tl.load(word_at + k * WORDS + 128)
            weights = fp4_operand(words, more, shares, BN, VENDOR, FP8)
        else:
            weights = tl.load(value_at + k * 128)
            if not FP8:
                weights = weights.to(tl.float32).to(tl.bfloat16)
        xk = tl.load(x_at + k * 128, mask=real[:, None], other=0.0)
        if FP8:
            # Scales come a step ahead: so few bytes do not go through the pipeline that tiles go through.
            x_scales, after = following, tl.minimum(k + 1, KT - 1)
            if SORTED:
                following = tl.load(x_scale_at + after * STRIDE)
            else:
                following = tl.load(x_scale_at + after, mask=real, other=0)
            part = tl.dot(weights, tl.trans(xk)) * _number(x_scales)[None, :]
        else:
            part = tl.dot(weights, tl.trans(xk))
        if not FP4:
            part *= _number(tl.load(scale_at + k))[:, None]
        total += part
    if FP4:
        # The row's scale is that of its largest group, which has multiplier 11: 2^(11 - 5) too much.
        total *= (_power_of_two(tl.load(scale + first + tl.arange(0, BN))) * 0.015625)[:, None]
    return total


@triton.jit
def _gate_up(
    values,  # of gate and up, rows interleaved eight by eight: N of them an expert
    scale,
    x,
    x_scale,
    weight,  # [R] float32, routing weight of each (token, choice), or [R + BT] of each row in sorted order
    order,  # [R] int32, the (token, choice) of each row, rows sorted by expert
    tile_expert,  # [tiles] int32, -1 for tiles that are not there
    tile_start,  # [tiles] int32, first row
    tile_end,  # [tiles] int32, row after the last
    out,  # [R, N/2] in sorted order
    N: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    LIMIT: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    FP4: tl.constexpr,
    FP8: tl.constexpr,
    SORTED: tl.constexpr,
    STRIDE: tl.constexpr,
    VENDOR: tl.constexpr,
):
    NT: tl.constexpr = N // BN
    tile, block = tl.program_id(0) // NT, tl.program_id(0) % NT
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    start = tl.load(tile_start + tile)
    rows = start + tl.arange(0, BT)
    real = rows < tl.load(tile_end + tile)
    pair = tl.load(order + rows, mask=real, other=0)

    total = _product(
        values,
        scale,
        x,
        x_scale,
        expert,
        block,
        pair // CHOICES,
        start,
        real,
        N,
        K,
        BN,
        BT,
        FP4,
        FP8,
        SORTED,
        STRIDE,
        VENDOR,
    )
    # Rows r and r + 8 of sixteen are in one thread: the gate and the up of one inner column.
    total = tl.permute(tl.reshape(total.to(tl.bfloat16), (BN // 16, 2, 8, BT)), (0, 2, 3, 1))
    gate, up = tl.split(total)
    gate = tl.minimum(gate.to(tl.float32), LIMIT)
    up = tl.minimum(tl.maximum(up.to(tl.float32), -LIMIT), LIMIT)
    inner = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (BN // 2, BT))
    if SORTED:
        inner *= tl.load(weight + start + tl.arange(0, BT))[None, :]
    else:
        inner *= tl.load(weight + pair, mask=real, other=0.0)[None, :]
    columns = block * (BN // 2) + tl.arange(0, BN // 2)
    out_at = out + rows.to(tl.int64)[:, None] * (N // 2) + columns[None, :]
    tl.store(out_at, tl.trans(inner).to(tl.bfloat16), mask=real[:, None])


@triton.jit
def _down(
    values,
    scale,
    x,  # [R, K] in sorted order
    x_scale,
    order,
    tile_expert,
    tile_start,
    tile_end,
    out,  # [R, N] in (token, choice) order
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    FP4: tl.constexpr,
    FP8: tl.constexpr,
    SORTED: tl.constexpr,
    STRIDE: tl.constexpr,
    VENDOR: tl.constexpr,
):
    NT: tl.constexpr = N // BN
    tile, block = tl.program_id(0) // NT, tl.program_id(0) % NT
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    start = tl.load(tile_start + tile)
    rows = start + tl.arange(0, BT)
    real = rows < tl.load(tile_end + tile)

    total = _product(
        values,
        scale,
        x,
        x_scale,
        expert,
        block,
        rows,
        start,
        real,
        N,
        K,
        BN,
        BT,
        FP4,
        FP8,
        SORTED,
        STRIDE,
        VENDOR,
    )
    columns = block * BN + tl.arange(0, BN)
    pair = tl.load(order + rows, mask=real, other=0).to(tl.int64)
    out_at = out + pair[:, None] * N + columns[None, :]
    tl.store(out_at, tl.trans(total).to(tl.bfloat16), mask=real[:, None])


Weight = ExpertTiles | ExpertRows


def operands(weight: Weight, activation: str | None) -> Operands:
    """What the tensor cores multiply: where they take no E4M3, quantised activations too are bfloat16."""
    fp8 = activation is not None and current_target().has_e4m3
    if isinstance(weight, ExpertTiles):
        return "fp4 x fp8" if fp8 else "fp4 x bf16"
    return "fp8 x fp8" if fp8 else "fp8 x bf16"


def expert_mlp(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    w1: Weight,
    w2: Weight,
    w3: None,
    limit: float,
    activation: str | None,
) -> jax.Array:
    sizes = tilings_for(current_target().arch, operands(w1, activation), experts.size)
    planned = plan(experts, w1.shape[0], sizes.tile_rows)
    return planned_mlp(x, planned, weights, w1, w2, limit, activation, sizes)


def planned_mlp(
    x: jax.Array,
    planned: Plan,
    weights: jax.Array,
    w13: Weight,
    w2: Weight,
    limit: float,
    activation: str | None,
    sizes: Tilings,
) -> jax.Array:
    """`expert_mlp` once its plan is made."""
    inner = gate_up(x, planned, weights, w13, limit, activation, sizes.tile_rows, sizes.gate_up)
    out = down(inner, planned, w2, activation, sizes.tile_rows, sizes.down)
    return total_of_choices(out, weights)


def gate_up(
    x: jax.Array,
    planned: Plan,
    weights: jax.Array,
    w13: Weight,
    limit: float,
    activation: str | None,
    tile_rows: int,
    tiling: Tiling,
) -> jax.Array:
    """[R, F] bfloat16 in sorted order: weight * silu(gate) * up."""
    constants = {"CHOICES": weights.shape[1], "LIMIT": limit}
    flat = weights.reshape(-1)
    if _in_order(w13, activation, tile_rows):
        flat = jnp.pad(flat[planned.order], (0, tile_rows))
    out = jax.ShapeDtypeStruct((weights.size, w13.shape[1] // 2), jnp.bfloat16)
    return _launch(_gate_up, x, (flat,), planned, w13, out, activation, tile_rows, tiling, constants)


def down(
    inner: jax.Array, planned: Plan, w2: Weight, activation: str | None, tile_rows: int, tiling: Tiling
) -> jax.Array:
    """[R, M] bfloat16 in (token, choice) order."""
    out = jax.ShapeDtypeStruct((inner.shape[0], w2.shape[1]), jnp.bfloat16)
    return _launch(_down, inner, (), planned, w2, out, activation, tile_rows, tiling, {})


def _launch(
    kernel, x, more, planned: Plan, weight: Weight, out, activation, tile_rows: int, tiling: Tiling, constants
) -> jax.Array:
    _, rows, columns = weight.shape
    fp8 = operands(weight, activation).endswith("x fp8")
    fp4 = isinstance(weight, ExpertTiles)
    arrays = (weight.tiles, weight.row_exponent) if fp4 else (weight.values, weight.scale)
    in_order = _in_order(weight, activation, tile_rows)
    if fp8:
        if fp4:
            x, x_scale = tile_quant(x)
        else:
            quantised = activation_quant(x)
            x, x_scale = quantised.values, quantised.scale
        if in_order:
            choices = constants.get("CHOICES")
            x_scale = _by_block(x_scale if choices is None else x_scale[planned.order // choices], tile_rows)
    else:
        x_scale = arrays[-1]  # holds the place, never read
        if activation is not None:
            x = fake_quantize(x, activation)  # bfloat16 holds these numbers too
        if fp4:
            x = pairs_in_tile_order(x)
    return triton_call(
        kernel,
        *arrays,
        x,
        x_scale,
        *more,
        *(planned.order, planned.expert, planned.start, planned.end),
        out=out,
        grid=(planned.expert.size * (rows // tiling.rows),),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        N=rows,
        K=columns,
        BN=tiling.rows,
        BT=tile_rows,
        FP4=fp4,
        FP8=fp8,
        SORTED=in_order,
        STRIDE=x_scale.shape[-1] if in_order else 0,
        **constants,
    )


def _in_order(weight: Weight, activation: str | None, tile_rows: int) -> bool:
    """Whether scales and routing weights are brought into sorted order first: it costs launches, for large
    tiles it saves registers.
    """
    return operands(weight, activation).endswith("x fp8") and tile_rows > 16


def _by_block(scale: jax.Array, tile_rows: int) -> jax.Array:
    """[R, K/128] E8M0 as [K/128, R + tile_rows] float32: what the last tile reads past the rows is there."""
    return jnp.pad(e8m0_decode(scale).T, ((0, 0), (0, tile_rows)))
