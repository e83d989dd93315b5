"""The Mosaic kernel of hyper-connections: it lowers for Hopper, and its PTX computes what it should.

The PTX of all programs of a cluster runs in a small emulator, message by message.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from warpgroup import Cluster, Warpgroup

from pallas_kernels import Target, current_target
from pallas_kernels.hyper_connection import POST_PRE, hc_post_pre, reference

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
mosaic = pytest.importorskip("pallas_kernels.hyper_connection.mosaic")
ptx = pytest.importorskip("pallas_kernels.hyper_connection.mosaic_ptx")

ITERATIONS, EPS, WIDTH = 20, 1e-6, 4096
H200 = Target("cuda", "sm_90")


def made_up(tokens: int, weight_type: Any = jnp.bfloat16) -> tuple[jax.Array, ...]:
    """What `hc_post_pre` takes in its order, the norm's weight last."""
    keys = iter(jax.random.split(jax.random.key(tokens), 7))

    def normal(*sizes: int) -> jax.Array:
        return jax.random.normal(next(keys), sizes)

    return (
        normal(tokens, WIDTH).astype(jnp.bfloat16),
        normal(tokens, 4, WIDTH).astype(jnp.bfloat16),
        2 * jax.nn.sigmoid(normal(tokens, 4)),
        reference.sinkhorn(normal(tokens, 4, 4), ITERATIONS, EPS),
        normal(24, 4 * WIDTH) / 64,
        jnp.array([0.7, 1.2, 0.9]),
        normal(24),
        (1 + normal(WIDTH) / 8).astype(weight_type),
    )


def check(arguments: tuple[jax.Array, ...], found: tuple[Any, ...]) -> None:
    """Streams to a rounding; the others as the definition makes them of the streams found."""
    streams, x, post, comb = (np.asarray(each).astype(np.float32) for each in found)
    y, before, old_post, old_comb = arguments[:4]
    expected = np.float32(reference.hc_post(y, before, old_post, old_comb))
    fn, scale, base, weight = arguments[4:]
    rounded = jnp.asarray(streams, jnp.bfloat16)
    of_pre = reference.hc_pre(rounded, fn, scale, base, ITERATIONS, EPS, EPS, weight)
    for mine, theirs, most in ((streams, expected, 2**-7), (x, np.float32(of_pre[0]), 2**-6)):
        # One rounding the other way is up to 2^-7 of a number, and two of them stand behind the input.
        assert (np.abs(mine - theirs) <= most * np.abs(theirs) + 1e-6).all()
        assert np.linalg.norm(mine - theirs) <= 1e-3 * np.linalg.norm(theirs)
    np.testing.assert_allclose(post, of_pre[1], rtol=2e-5)
    np.testing.assert_allclose(comb, of_pre[2], rtol=2e-5)


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_the_kernel_lowers_for(tokens):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("unused",), abstract_device=device)
    shapes = jax.eval_shape(functools.partial(made_up, tokens))

    def run(*of: jax.Array) -> Any:
        return mosaic.hc_post_pre(*of[:-1], ITERATIONS, EPS, EPS, of[-1])

    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()

    assert text.count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("target", "width", "weight", "takes"),
    [
        (H200, WIDTH, True, True),
        (Target("cuda", "sm_100"), WIDTH, True, False),
        (Target("cpu", ""), WIDTH, True, False),
        (H200, 7168, True, False),
        (H200, WIDTH, False, False),
    ],
    ids=["Flash", "Blackwell", "a CPU", "the streams of Pro", "no norm"],
)
def test_the_kernel_takes(target, width, weight, takes):
    def shape(*sizes: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    y, streams = shape(3, width, dtype=jnp.bfloat16), shape(3, 4, width, dtype=jnp.bfloat16)
    mixed = (shape(3, 4), shape(3, 4, 4), shape(24, 4 * width), shape(3), shape(24))
    norm = shape(width, dtype=jnp.bfloat16) if weight else None

    assert POST_PRE[0].fits(target, y, streams, *mixed, ITERATIONS, EPS, EPS, norm) is takes


def emulated(tokens: int, arguments: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
    """What one cluster writes, its programs taking turns at every wait."""
    memory, end, places = np.full(1 << 23, 0xFF, np.uint8), 0, {}

    def put(name: str, array: Any) -> None:
        nonlocal end
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        places[name] = end
        memory[end : end + data.size] = data
        end = -(-(end + data.size) // 1024) * 1024

    names = ("y", "streams", "post", "comb", "weights", "scale", "base", "weight")
    for name, array in zip(names, arguments, strict=True):
        put(name, array)
    results = {"new": 1, "x": 0, "new_post": 2, "new_comb": 3}
    for name, like in results.items():
        put(name, np.full_like(np.asarray(arguments[like]), np.nan))
    sizes = {"fn": 1 << 17, "mixing": 1 << 13, "products": 1 << 15, "received": 1 << 12, "shares": 1 << 10}
    sizes |= {"squares": 1 << 11, "totals": 1 << 11, "barriers": 1 << 10}
    shared = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    wide = arguments[-1].dtype == jnp.float32
    case = ptx.Case(tokens, 1, ITERATIONS, EPS, EPS, wide)
    cluster = Cluster([np.full(1 << 18, 0xFF, np.uint8) for _ in range(ptx.TOKENS)])
    running = []
    for owns, text, count in ((True, ptx.owning_ptx(case), 128), (False, ptx.mixing_ptx(case), ptx.MIXERS)):
        operands = {"thread": np.arange(count, dtype=np.uint32), "tile": np.zeros(count, np.uint32)}
        operands |= {name: np.full(count, places[name], np.uint64) for name in mosaic.MEMORY[owns]}
        operands |= {name: np.full(count, shared[name], np.uint32) for name in mosaic.SHARED[owns]}
        for rank in range(ptx.TOKENS):
            running.append(Warpgroup(cluster, memory, count, rank).steps(text, operands))
    for _ in range(200):
        still = [one for one in running if next(one, True) is None]
        if not (running := still):
            break
    assert not running, "some wait for what never comes"

    def get(name: str) -> np.ndarray:
        like = np.asarray(arguments[results[name]])
        return memory[places[name] : places[name] + like.nbytes].view(like.dtype).reshape(like.shape)

    return tuple(get(name) for name in results)


@pytest.mark.parametrize("weight_type", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_the_ptx_computes_the_boundary(weight_type):
    """Forty tokens are three tiles: the barriers of what is brought ahead come around."""
    arguments = made_up(40, weight_type)

    check(arguments, emulated(40, arguments))


# --- on a device


@pytest.fixture
def hopper():
    if current_target().arch != "sm_90":
        pytest.skip("no Hopper GPU")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 129, 1000, 4097])
def test_the_boundary_is_that_of_the_definition(tokens):
    arguments = made_up(tokens)
    *before, weight = arguments
    settings = {"sinkhorn_iters": ITERATIONS, "eps": EPS, "norm_eps": EPS, "norm_weight": weight}
    run = jax.jit(functools.partial(hc_post_pre, **settings, implementation="mosaic"))

    found = run(*before)

    check(arguments, found)
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, run(*before), found)
