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
from pallas_kernels.expert_mlp.plan import Plan, plan
from pallas_kernels.expert_mlp.quant import tile_quant
from pallas_kernels.expert_mlp.rows import ExpertRows
from pallas_kernels.expert_mlp.tiles import ExpertTiles, tile_order
from pallas_kernels.expert_mlp.tilings import Operands, Tiling, Tilings, tilings_for
from pallas_kernels.formats import e8m0_decode, fake_quantize
from pallas_kernels.target import current_target
from pallas_kernels.triton_call import triton_call


@triton.jit
def _e4m3_by_table(words, shares, shift):
    """The eight values of a word times 2^(multiplier - 5): two words of four E4M3 bytes, values 0-3 and 4-7.

    The table of a multiplier m is the E4M3 byte of each e2m1 magnitude times 2^(m-5): one more in m is 8 more
    in the byte, from the subnormals up. `prmt` looks four magnitudes up at once.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 share, low, high, which, found;
        shr.u32 share, $3, $4;
        and.b32 share, share, 0xFF;
        mad.lo.u32 low, share, 0x08080800, 0x14100800;
        mad.lo.u32 high, share, 0x08080808, 0x24201C18;
        and.b32 which, $2, 0x77777777;
        prmt.b32 found, low, high, which;
        lop3.b32 $0, found, $2, 0x80808080, 0xF8;
        shr.u32 which, which, 16;
        prmt.b32 found, low, high, which;
        shl.b32 which, $2, 4;
        lop3.b32 $1, found, which, 0x80808080, 0xF8;
        }
        """,
        "=&r,=&r,r,r,r",
        [words, shares, shift],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _bfloat16_by_table(words, shares, shift):
    """As `_e4m3_by_table`, in pairs of bfloat16: values 0-1, 2-3, 4-5 and 6-7.

    The table has sixteen bytes: the lower and the upper ones of the magnitudes times 2^(multiplier - 5), for
    which one more in the multiplier is 0x80 more. Words of one row share it: the assembler makes it once.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 share, e01, e23, e45, e67, lower03, lower47, upper03, upper47, which, upper, lower, sign;
        shr.u32 share, $5, $6;
        and.b32 share, share, 0xFF;
        mad.lo.u32 e01, share, 0x00800000, 0x3C800000;
        mad.lo.u32 e23, share, 0x00800080, 0x3D403D00;
        mad.lo.u32 e45, share, 0x00800080, 0x3DC03D80;
        mad.lo.u32 e67, share, 0x00800080, 0x3E403E00;
        prmt.b32 lower03, e01, e23, 0x6420;
        prmt.b32 lower47, e45, e67, 0x6420;
        prmt.b32 upper03, e01, e23, 0x7531;
        prmt.b32 upper47, e45, e67, 0x7531;
        and.b32 which, $4, 0x77777777;
        prmt.b32 lower, lower03, lower47, which;
        prmt.b32 upper, upper03, upper47, which;
        lop3.b32 upper, upper, $4, 0x80808080, 0xF8;
        prmt.b32 $0, lower, upper, 0x5140;
        prmt.b32 $1, lower, upper, 0x7362;
        shr.u32 which, which, 16;
        prmt.b32 lower, lower03, lower47, which;
        prmt.b32 upper, upper03, upper47, which;
        shl.b32 sign, $4, 4;
        lop3.b32 upper, upper, sign, 0x80808080, 0xF8;
        prmt.b32 $2, lower, upper, 0x5140;
        prmt.b32 $3, lower, upper, 0x7362;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r",
        [words, shares, shift],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _bytes(word):
    """The four bytes of a word, along a new pair of axes: [..., 2, 2] by bit 0 and bit 1 of their number."""
    even = tl.join(word.to(tl.uint8), (word >> 16).to(tl.uint8))
    odd = tl.join((word >> 8).to(tl.uint8), (word >> 24).to(tl.uint8))
    return tl.join(even, odd)  # high bit, low bit


@triton.jit
def _pairs(word):
    """The two halves of a word as bfloat16, along a new axis."""
    low, high = word.to(tl.uint16), (word >> 16).to(tl.uint16)
    return tl.join(low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True))


@triton.jit
def _by_arithmetic(words, multipliers, BN: tl.constexpr):
    """What the tables give, on any chip: float32 [n16 s2 t q s1 h j pair b]."""
    # Value i has its magnitude in bits 4i to 4i + 2; its sign in bit 8b + 7 for i = b, 8b + 3 for i = 4 + b.
    value = tl.arange(0, 8)
    words = words[:, :, :, :, :, :, None]
    magnitude = (words >> (4 * value)) & 7
    sign = (words >> (8 * (value % 4) + 7 - value // 4 * 4)) & 1
    exponent, mantissa = magnitude >> 1, magnitude & 1
    twice = tl.where(exponent == 0, mantissa, ((2 + mantissa) << exponent) >> 1).to(tl.float32)
    power = ((multipliers + (127 - 6)) << 23).to(tl.float32, bitcast=True)
    values = tl.where(sign == 1, -twice, twice) * power[:, :, :, :, :, :, None]
    return tl.reshape(values, (BN // 16, 2, 8, 4, 2, 2, 2, 2, 2))


@triton.jit
def _fp4_operand(words, shares, BN: tl.constexpr, VENDOR: tl.constexpr, FP8: tl.constexpr):
    """A [BN, 128] operand, still to be scaled by row, from the words of its tiles.

    Its columns stand as in `tile_order`, in bfloat16 as in `pairs_in_tile_order`.
    """
    words = tl.reshape(words, (BN // 16, 2, 8, 4, 2, 2))  # n16 s2 t q s1 h
    # Two q share a word of multipliers: a byte for each, and for each h.
    shares = tl.broadcast_to(tl.reshape(shares, (BN // 16, 1, 8, 2, 1, 1, 1)), (BN // 16, 2, 8, 2, 2, 2, 2))
    shares = tl.reshape(shares, (BN // 16, 2, 8, 4, 2, 2))
    shift = tl.reshape(16 * (tl.arange(0, 4) % 2), (1, 1, 1, 4, 1, 1))
    shift += tl.reshape(8 * tl.arange(0, 2), (1, 1, 1, 1, 1, 2))
    shift = tl.broadcast_to(shift, (BN // 16, 2, 8, 4, 2, 2))
    if VENDOR == "cuda":
        if FP8:
            first, second = _e4m3_by_table(words, shares, shift)
            values = _bytes(tl.join(first, second))  # n16 s2 t q s1 h j pair b
        else:
            low0, high0, low1, high1 = _bfloat16_by_table(words, shares, shift)
            values = _pairs(tl.join(tl.join(low0, low1), tl.join(high0, high1)))  # ... j pair b
    else:
        values = _by_arithmetic(words, (shares >> shift) & 0xFF, BN)
    if FP8:
        values = tl.permute(values, (0, 5, 2, 1, 4, 6, 3, 7, 8))  # n16 h t  s2 s1 j q pair b
        operand = tl.reshape(values, (BN, 128)).to(tl.float8e4nv, bitcast=VENDOR == "cuda")
    else:
        values = tl.permute(values, (0, 5, 2, 1, 4, 6, 7, 3, 8))  # n16 h t  s2 s1 j pair q b
        operand = tl.reshape(values, (BN, 128)).to(tl.bfloat16)
    return operand


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
    WORDS: tl.constexpr = 4352 // 4  # of a tile of 64 rows: 1024 of codes, 64 of multipliers
    first = expert.to(tl.int64) * N + block * BN
    x_at = x + rows.to(tl.int64)[:, None] * K + tl.arange(0, 128)[None, :]
    # Neighbours in memory need one pointer a thread; a pointer for each row costs half the registers.
    x_scale_at = x_scale + start + tl.arange(0, BT) if SORTED else x_scale + rows.to(tl.int64) * KT
    if FP4:
        word, share = tl.arange(0, BN * 16), tl.arange(0, BN)  # eight values, four multipliers each
        tiles = values.to(tl.pointer_type(tl.int32)) + first // 64 * (KT * WORDS)
        word_at = tiles + word // 1024 * (KT * WORDS) + word % 1024
        share_at = tiles + 1024 + share // 64 * (KT * WORDS) + share % 64
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
            weights = _fp4_operand(words, shares, BN, VENDOR, FP8)
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
    tokens, choices = weights.shape
    inner = gate_up(x, planned, weights, w13, limit, activation, sizes.tile_rows, sizes.gate_up)
    out = down(inner, planned, w2, activation, sizes.tile_rows, sizes.down)
    # Always in the order of the choices: the same bits in every run.
    return out.reshape(tokens, choices, -1).astype(jnp.float32).sum(1)


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


def pairs_in_tile_order(x: jax.Array) -> jax.Array:
    """`tile_order` for bfloat16 instructions, where 4q + 2p + b of every sixteen columns goes to 8p + 2q + b.

    A word of a tile holds four neighbouring columns. An instruction takes two of them from a thread, and two
    eight further on.
    """
    x = tile_order(x)
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 4, 2, 2)
    return jnp.swapaxes(parts, -3, -2).reshape(x.shape)
