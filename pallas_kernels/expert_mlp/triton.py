"""Routed experts on the tensor cores: two products over FP4 tiles, the gated activation between them.

Weights are the rows of the tensor core's product and tokens its columns, so even a single token reads each
weight once and at full width, and a token's sum runs over K in one order whatever else is in the batch. The
four bytes that hold eight values become E4M3 by table, exactly, and meet activations in `fp8_token128`: the
released arithmetic, on FP8 tensor cores. Where there are none, the same bytes become bfloat16.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.expert_mlp.plan import Plan, plan
from pallas_kernels.expert_mlp.tiles import ExpertTiles
from pallas_kernels.formats import QuantArray
from pallas_kernels.triton_call import triton_call


@triton.jit
def _e4m3_by_table(words, multiplier):
    """Bytes of a word of eight values, and its multiplier four times: values 0-3 and 4-7 as E4M3 bytes.

    A thread must hold the four bytes of a word side by side, which Triton arranges when the multipliers come
    through shared memory too: at least four bytes of them a thread, so BN is 32 times the number of warps.

    The table of a multiplier m is the E4M3 byte of each e2m1 magnitude times 2^(m-5): one more in m is 8 more
    in the byte, from the subnormals up. `prmt` looks four magnitudes up at once.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high, which, found;
        mad.lo.u32 low, $3, 0x08080800, 0x14100800;
        mad.lo.u32 high, $3, 0x08080808, 0x24201C18;
        and.b32 which, $2, 0x77777777;
        prmt.b32 found, low, high, which;
        lop3.b32 $0, found, $2, 0x80808080, 0xF8;
        shr.u32 which, which, 16;
        prmt.b32 found, low, high, which;
        shl.b32 which, $2, 4;
        lop3.b32 $1, found, which, 0x80808080, 0xF8;
        }
        """,
        "=r,=r,r,r,r,r,r",
        [words, multiplier],
        dtype=(tl.uint8, tl.uint8),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _operand(codes, multipliers, BN: tl.constexpr, VENDOR: tl.constexpr, FP8: tl.constexpr):
    """A [BN, 128] operand, still to be scaled by row, from the bytes of its tile."""
    codes = tl.reshape(codes, (BN // 16, 2, 8, 4, 2, 2, 4))  # n16 k64 t q g h byte
    multipliers = tl.reshape(multipliers, (BN // 16, 2, 8, 1, 2, 2, 1))
    if FP8 and VENDOR == "cuda":
        # Each word's four bytes get its one multiplier as a 32-bit number.
        wide = tl.broadcast_to(multipliers.to(tl.int32), (BN // 16, 2, 8, 4, 2, 2, 4))
        first, second = _e4m3_by_table(codes, wide)
        values = tl.join(first, second)  # n16 k64 t q g h b j
        values = tl.permute(values, (0, 5, 2, 1, 4, 7, 3, 6))  # n16 h t k64 g j q b
        return tl.reshape(values, (BN, 128)).to(tl.float8e4nv, bitcast=True)
    # Byte i holds the magnitudes of values 2i and 2i + 1, and the signs of values i and 4 + i.
    magnitude = tl.join(codes & 7, (codes >> 4) & 7)  # ... h byte half
    sign = tl.join(codes >> 7, (codes >> 3) & 1)  # ... h b j
    sign = tl.permute(sign, (0, 1, 2, 3, 4, 5, 7, 6))  # ... h j b
    magnitude = tl.reshape(magnitude, (BN // 16, 2, 8, 4, 2, 2, 8)).to(tl.int32)
    sign = tl.reshape(sign, (BN // 16, 2, 8, 4, 2, 2, 8)).to(tl.int32)
    exponent, mantissa = magnitude >> 1, magnitude & 1
    twice = tl.where(exponent == 0, mantissa, ((2 + mantissa) << exponent) >> 1).to(tl.float32)
    power = ((multipliers.to(tl.int32) + (127 - 6)) << 23).to(tl.float32, bitcast=True)
    values = tl.where(sign == 1, -twice, twice) * power
    values = tl.reshape(values, (BN // 16, 2, 8, 4, 2, 2, 2, 4))  # n16 k64 t q g h j b
    values = tl.reshape(tl.permute(values, (0, 5, 2, 1, 4, 6, 3, 7)), (BN, 128))
    return values.to(tl.float8e4nv) if FP8 else values.to(tl.bfloat16)


@triton.jit
def _power_of_two(exponent):
    """2^(exponent - 127) of E8M0 bytes as float32; 0 stands for the smallest normal number."""
    return (tl.maximum(exponent.to(tl.int32), 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _tile_product(codes, multipliers, x, x_scale, BN: tl.constexpr, VENDOR: tl.constexpr, FP8: tl.constexpr):
    """[BN, BT] partial sum over one block of 128 columns."""
    product = tl.dot(_operand(codes, multipliers, BN, VENDOR, FP8), tl.trans(x))
    return product * x_scale[None, :]


@triton.jit
def _tile_at(expert, block, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr):
    """Offsets of the codes and multipliers of BN rows, whole tiles, in the first 128 columns."""
    KT: tl.constexpr = K // 128
    base = (expert.to(tl.int64) * (N // 128) + block * (BN // 128)) * KT
    code, multiplier = tl.arange(0, BN * 64), tl.arange(0, BN * 4)
    code = (base + code // 8192 * KT) * 8192 + code % 8192
    multiplier = (base + multiplier // 512 * KT) * 512 + multiplier % 512
    return code, multiplier


@triton.jit
def _gate_up(
    x,  # [T, K] e4m3, or bfloat16 without scales
    x_scale,  # [T, K/128] uint8
    w1,  # codes of the gate: tiles of [E, N, K]
    m1,
    r1,
    w3,  # codes of the up projection
    m3,
    r3,
    weight,  # [R] float32, routing weight of each (token, choice)
    order,  # [R] int32, the (token, choice) of each row, rows sorted by expert
    tile_expert,  # [tiles] int32, -1 for tiles that are not there
    tile_start,  # [tiles] int32, first row
    tile_end,  # [tiles] int32, row after the last
    out,  # [R, N] in sorted order
    N: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    LIMIT: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    FP8: tl.constexpr,
    VENDOR: tl.constexpr,
):
    NT: tl.constexpr = N // BN
    KT: tl.constexpr = K // 128
    tile, block = tl.program_id(0) // NT, tl.program_id(0) % NT
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    rows = tl.load(tile_start + tile) + tl.arange(0, BT)
    real = rows < tl.load(tile_end + tile)
    pair = tl.load(order + rows, mask=real, other=0)
    token = (pair // CHOICES).to(tl.int64)

    code, multiplier = _tile_at(expert, block, N, K, BN)
    x_at = x + token[:, None] * K + tl.arange(0, 128)[None, :]
    scale_at = x_scale + token * KT

    gate = tl.zeros((BN, BT), tl.float32)
    up = tl.zeros((BN, BT), tl.float32)
    for k in range(KT):
        scale = tl.full((BT,), 1.0, tl.float32)
        if FP8:
            scale = _power_of_two(tl.load(scale_at + k, mask=real, other=0))
        xk = tl.load(x_at + k * 128, mask=real[:, None], other=0.0)
        gate += _tile_product(
            tl.load(w1 + code + k * 8192), tl.load(m1 + multiplier + k * 512), xk, scale, BN, VENDOR, FP8
        )
        up += _tile_product(
            tl.load(w3 + code + k * 8192), tl.load(m3 + multiplier + k * 512), xk, scale, BN, VENDOR, FP8
        )

    # The row's scale is that of its largest group, which has multiplier 11: 2^(11 - 5) too much.
    columns = block * BN + tl.arange(0, BN)
    row_at = expert.to(tl.int64) * N + columns
    gate *= (_power_of_two(tl.load(r1 + row_at)) * 0.015625)[:, None]
    up *= (_power_of_two(tl.load(r3 + row_at)) * 0.015625)[:, None]
    gate = tl.minimum(gate.to(tl.bfloat16).to(tl.float32), LIMIT)
    up = tl.minimum(tl.maximum(up.to(tl.bfloat16).to(tl.float32), -LIMIT), LIMIT)
    share = tl.load(weight + pair, mask=real, other=0.0)
    inner = gate / (1.0 + tl.exp(-gate)) * up * share[None, :]
    out_at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out_at, tl.trans(inner).to(tl.bfloat16), mask=real[:, None])


@triton.jit
def _down(
    x,  # [R, K] in sorted order
    x_scale,  # [R, K/128] uint8
    w2,
    m2,
    r2,
    order,
    tile_expert,
    tile_start,
    tile_end,
    out,  # [R, N] in (token, choice) order
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    FP8: tl.constexpr,
    VENDOR: tl.constexpr,
):
    NT: tl.constexpr = N // BN
    KT: tl.constexpr = K // 128
    tile, block = tl.program_id(0) // NT, tl.program_id(0) % NT
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    rows = tl.load(tile_start + tile) + tl.arange(0, BT)
    real = rows < tl.load(tile_end + tile)
    row = rows.to(tl.int64)

    code, multiplier = _tile_at(expert, block, N, K, BN)
    x_at = x + row[:, None] * K + tl.arange(0, 128)[None, :]
    scale_at = x_scale + row * KT

    total = tl.zeros((BN, BT), tl.float32)
    for k in range(KT):
        scale = tl.full((BT,), 1.0, tl.float32)
        if FP8:
            scale = _power_of_two(tl.load(scale_at + k, mask=real, other=0))
        xk = tl.load(x_at + k * 128, mask=real[:, None], other=0.0)
        total += _tile_product(
            tl.load(w2 + code + k * 8192), tl.load(m2 + multiplier + k * 512), xk, scale, BN, VENDOR, FP8
        )

    columns = block * BN + tl.arange(0, BN)
    total *= (_power_of_two(tl.load(r2 + expert.to(tl.int64) * N + columns)) * 0.015625)[:, None]
    pair = tl.load(order + rows, mask=real, other=0).to(tl.int64)
    out_at = out + pair[:, None] * N + columns[None, :]
    tl.store(out_at, tl.trans(total).to(tl.bfloat16), mask=real[:, None])


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of a launch: `rows` of weights a program takes, and Triton's own two."""

    rows: int
    num_warps: int
    num_stages: int


# By the number of (token, choice) rows up to which it holds: tokens in a tile; gate and up; down.
TILINGS = (
    (2048, 16, Tiling(128, 4, 4), Tiling(128, 4, 4)),
    (6144, 32, Tiling(128, 4, 4), Tiling(128, 4, 4)),
    (2**31, 64, Tiling(128, 4, 3), Tiling(128, 4, 3)),
)


def tilings_for(rows: int) -> tuple[int, Tiling, Tiling]:
    """Tokens in a tile, and the tilings of both products, for so many (token, choice) rows."""
    return next(tuple(sizes) for most, *sizes in TILINGS if rows <= most)  # type: ignore[return-value]


def expert_mlp(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    w1: ExpertTiles,
    w2: ExpertTiles,
    w3: ExpertTiles,
    limit: float,
    activation: str | None,
) -> jax.Array:
    sizes = tilings_for(experts.size)
    planned = plan(experts, w1.shape[0], sizes[0])
    return planned_mlp(x, planned, weights, w1, w2, w3, limit, activation, sizes)


def planned_mlp(
    x: jax.Array,
    planned: Plan,
    weights: jax.Array,
    w1: ExpertTiles,
    w2: ExpertTiles,
    w3: ExpertTiles,
    limit: float,
    activation: str | None,
    sizes: tuple[int, Tiling, Tiling],
) -> jax.Array:
    """`expert_mlp` once its plan is made."""
    tokens, choices = weights.shape
    inner = gate_up(x, planned, weights, w1, w3, limit, activation, sizes[0], sizes[1])
    out = down(inner, planned, w2, activation, sizes[0], sizes[2])
    return out.reshape(tokens, choices, -1).astype(jnp.float32).sum(1)


def gate_up(
    x: jax.Array,
    planned: Plan,
    weights: jax.Array,
    w1: ExpertTiles,
    w3: ExpertTiles,
    limit: float,
    activation: str | None,
    tile_rows: int,
    tiling: Tiling,
) -> jax.Array:
    """[R, F] bfloat16 in sorted order: weight * silu(gate) * up."""
    rows, (_, inner, hidden) = weights.size, w1.shape
    return triton_call(
        _gate_up,
        *_values_and_scale(x, activation),
        *(w1.codes, w1.multipliers, w1.row_exponent),
        *(w3.codes, w3.multipliers, w3.row_exponent),
        weights.reshape(-1),
        *(planned.order, planned.expert, planned.start, planned.end),
        out=jax.ShapeDtypeStruct((rows, inner), jnp.bfloat16),
        grid=(planned.expert.size * (inner // tiling.rows),),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        N=inner,
        K=hidden,
        CHOICES=weights.shape[1],
        LIMIT=limit,
        BN=tiling.rows,
        BT=tile_rows,
        FP8=activation is not None,
    )


def down(
    inner: jax.Array,
    planned: Plan,
    w2: ExpertTiles,
    activation: str | None,
    tile_rows: int,
    tiling: Tiling,
) -> jax.Array:
    """[R, M] bfloat16 in (token, choice) order."""
    _, hidden, columns = w2.shape
    return triton_call(
        _down,
        *_values_and_scale(inner, activation),
        *(w2.codes, w2.multipliers, w2.row_exponent),
        *(planned.order, planned.expert, planned.start, planned.end),
        out=jax.ShapeDtypeStruct((inner.shape[0], hidden), jnp.bfloat16),
        grid=(planned.expert.size * (hidden // tiling.rows),),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        N=hidden,
        K=columns,
        BN=tiling.rows,
        BT=tile_rows,
        FP8=activation is not None,
    )


def _values_and_scale(x: jax.Array, activation: str | None) -> tuple[jax.Array, jax.Array]:
    """Activations as the kernels take them; without quantisation the scales are never read."""
    if activation is None:
        return x, jnp.zeros((1,), jnp.uint8)
    quantised: QuantArray = activation_quant(x)
    return quantised.values, quantised.scale
