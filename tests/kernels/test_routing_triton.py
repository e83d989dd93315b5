"""The Triton kernels of routing and of its plan: they compile for every chip, and are right on one."""

import dataclasses
import functools
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import COMPILED_ARCH

from pallas_kernels import Target
from pallas_kernels.expert_mlp import plan as planning
from pallas_kernels.expert_mlp.plan import plan
from pallas_kernels.routing import BY_ID, BY_SCORE, route_by_id, route_by_score
from pallas_kernels.routing.reference import choose_experts, gate_scores, routing_weights

kernels = pytest.importorskip("pallas_kernels.routing.triton")
plan_kernels = pytest.importorskip("pallas_kernels.expert_mlp.plan_triton")
triton_call = pytest.importorskip("pallas_kernels.triton_call")

F32, I32 = jnp.float32, jnp.int32
FLASH, PRO = 256, 384  # experts
TOP_K, SCALING = 6, 1.5
H200, CPU = Target("cuda", "sm_90"), Target("cpu", "")
TOKENS = [1, 3, 17, 127, 129, 1000]


def shape(*sizes: int, dtype=F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def assert_compiles(launch, arch: str) -> None:
    binary = triton_call.compile_offline(launch, arch)
    (machine,) = struct.unpack_from("<H", binary.code, 18)
    assert binary.code[:4] == b"\x7fELF"
    assert machine == (190 if arch.startswith("sm_") else 224)
    assert binary.shared_bytes <= 64 * 1024


def requests(tokens: int, experts: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Logits, bias, token ids and a table of 50 ids."""
    keys = jax.random.split(jax.random.key(tokens), 4)
    logits, bias = 3 * jax.random.normal(keys[0], (tokens, experts)), jax.random.normal(keys[1], (experts,))
    table = jax.lax.top_k(jax.random.uniform(keys[2], (50, experts)), min(TOP_K, experts))[1]
    return logits, bias, jax.random.randint(keys[3], (tokens,), 0, 50), table


# --- routing, anywhere


def test_routing_by_score_is_score_choice_and_weights():
    logits, bias, _, _ = requests(9, 32)

    experts, weights = route_by_score(logits, bias, TOP_K, SCALING)

    scores = gate_scores(logits)
    np.testing.assert_array_equal(experts, choose_experts(scores, bias, TOP_K))
    np.testing.assert_array_equal(weights, routing_weights(scores, experts, SCALING))


def test_routing_by_id_looks_experts_up_and_weighs_them_by_score():
    logits, _, ids, table = requests(9, 32)

    experts, weights = route_by_id(logits, ids, table, SCALING)

    np.testing.assert_array_equal(experts, np.asarray(table)[np.asarray(ids)])
    np.testing.assert_array_equal(weights, routing_weights(gate_scores(logits), experts, SCALING))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route_by_score(jnp.ones((2, 8)), jnp.ones(7), 2, 1.0), r"\(2, 8\), bias \(7,\)"),
        (lambda: route_by_score(jnp.ones((2, 8)), jnp.ones(8), 9, 1.0), "top_k=9"),
        (lambda: route_by_id(jnp.ones((2, 8)), jnp.ones(3, I32), jnp.ones((5, 2), I32), 1.0), r"ids \(3,\)"),
    ],
    ids=["another number of experts", "more choices than experts", "another number of tokens"],
)
def test_what_does_not_belong_together_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("target", "logits", "top_k", "fits"),
    [
        (H200, shape(3, FLASH), 6, True),
        (Target("rocm", "gfx942"), shape(3, PRO), 6, True),
        (CPU, shape(3, FLASH), 6, False),
        (H200, shape(0, FLASH), 6, False),
        (H200, shape(3, FLASH, dtype=jnp.bfloat16), 6, False),
        (H200, shape(3, 2048), 6, False),
        (H200, shape(3, FLASH), 33, False),
    ],
    ids=["Flash", "Pro on CDNA3", "a CPU", "no tokens", "bfloat16", "too many experts", "too many choices"],
)
def test_the_kernels_take(target, logits, top_k, fits):
    ids, table = shape(logits.shape[0], dtype=I32), shape(50, top_k, dtype=I32)

    assert BY_SCORE[0].fits(target, logits, shape(logits.shape[1]), top_k, SCALING) is fits
    assert BY_ID[0].fits(target, logits, ids, table, SCALING) is fits


@COMPILED_ARCH
@pytest.mark.parametrize("experts", [FLASH, PRO], ids="experts={}".format)
def test_the_kernels_compile_for(experts, arch):
    scored = triton_call.launches(
        lambda logits, bias: kernels.route_by_score(logits, bias, TOP_K, SCALING),
        shape(128, experts),
        shape(experts),
    )
    hashed = triton_call.launches(
        lambda *arrays: kernels.route_by_id(*arrays, SCALING),
        *(shape(128, experts), shape(128, dtype=I32), shape(129280, TOP_K, dtype=I32)),
    )

    assert len(scored) == len(hashed) == 1
    for launch in (*scored, *hashed):
        assert_compiles(launch, arch)


# --- the plan, anywhere


@pytest.mark.parametrize("tokens", [1, 17, 129], ids="tokens={}".format)
def test_the_plan_knows_the_row_of_each_pair(tokens):
    experts = jax.random.randint(jax.random.key(tokens), (tokens, TOP_K), 0, 32)

    found = plan(experts, 32, 16)

    np.testing.assert_array_equal(found.row[found.order], np.arange(tokens * TOP_K))
    absent = np.asarray(found.expert) < 0
    assert (np.diff(absent.astype(int)) >= 0).all()
    assert (np.asarray(found.start)[absent] == tokens * TOP_K).all()
    assert (np.asarray(found.end)[absent] == tokens * TOP_K).all()


def test_the_plan_of_no_tokens_is_empty():
    found = plan(jnp.zeros((0, TOP_K), I32), FLASH, 16)

    assert found.count.tolist() == [0]
    assert {leaf.size for leaf in jax.tree.leaves(found)} == {0, 1}


@pytest.mark.parametrize(
    ("target", "experts", "count", "fits"),
    [
        (H200, shape(8, 6, dtype=I32), PRO, True),
        (CPU, shape(8, 6, dtype=I32), PRO, False),
        (H200, shape(0, 6, dtype=I32), PRO, False),
        (H200, shape(8, 6, dtype=I32), 1025, False),
    ],
    ids=["Pro", "a CPU", "no tokens", "too many experts"],
)
def test_the_plans_kernels_take(target, experts, count, fits):
    assert planning.IMPLEMENTATIONS[0].fits(target, experts, count, 16) is fits


@COMPILED_ARCH
@pytest.mark.parametrize(
    ("tokens", "names"), [(1, ["_plan_few"]), (341, ["_plan_few"]), (8192, ["_count", "_plan_many"])]
)
def test_the_plans_kernels_compile_for(tokens, names, arch):
    for experts in (FLASH, PRO):
        run = functools.partial(plan_kernels.plan, n_routed_experts=experts, tile_rows=16)
        found = triton_call.launches(run, shape(tokens, TOP_K, dtype=I32))

        assert [launch.kernel.fn.__name__ for launch in found] == names
        for launch in found:
            assert_compiles(launch, arch)


# --- on a GPU


def assert_same_choice(found: jax.Array, expected: jax.Array, affinity: np.ndarray) -> None:
    """The same experts but for those whose affinities differ by less than two of them round."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert all(len(set(row)) == len(row) for row in found.tolist())
    got, wanted = (np.take_along_axis(affinity, chosen, 1) for chosen in (found, expected))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=4 * np.spacing(np.abs(affinity).max()))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [*TOKENS, 8192], ids="tokens={}".format)
@pytest.mark.parametrize("experts", [5, FLASH, PRO], ids="experts={}".format)
def test_routing_by_score_gives_what_the_definition_gives(experts, tokens):
    logits, bias, _, _ = requests(tokens, experts)
    top_k = min(TOP_K, experts)

    found, weights = route_by_score(logits, bias, top_k, SCALING, implementation="triton")

    expected, _ = route_by_score(logits, bias, top_k, SCALING, implementation="reference")
    scores = gate_scores(logits)
    assert_same_choice(found, expected, np.asarray(scores + bias))
    shares = routing_weights(scores, found, SCALING)
    np.testing.assert_allclose(weights, shares, rtol=1e-6)


@pytest.mark.gpu
def test_equal_scores_go_to_the_smaller_index_at_the_edges_too():
    logits = jnp.stack([jnp.zeros(PRO), jnp.arange(PRO) // 4 % 3 * 1.0, jnp.arange(PRO)[::-1] // 200 * 1.0])

    found, _ = route_by_score(logits, jnp.zeros(PRO), TOP_K, SCALING, implementation="triton")

    assert found.tolist() == [[0, 1, 2, 3, 4, 5], [8, 9, 10, 11, 20, 21], [0, 1, 2, 3, 4, 5]]


@pytest.mark.gpu
def test_scores_hold_at_every_magnitude_up_to_the_edges_of_float32():
    logits = jnp.asarray([[-80.0, -20.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 1e4]])
    order = jnp.arange(8, dtype=I32)[None]

    experts, weights = route_by_score(logits, jnp.zeros(8), 8, 1.0, implementation="triton")
    _, by_id = route_by_id(logits, jnp.zeros(1, I32), order, 1.0, implementation="triton")

    assert experts.tolist() == [[7, 6, 5, 4, 3, 2, 1, 0]]
    scores = np.sqrt(np.logaddexp(np.float64(logits[0]), 0))
    np.testing.assert_allclose(by_id[0], scores / scores.sum(), rtol=1e-6)
    np.testing.assert_allclose(weights[0, ::-1], scores / scores.sum(), rtol=1e-6)


@pytest.mark.gpu
def test_not_a_number_comes_out_as_such_with_experts_that_are_there_at_the_edges():
    experts, weights = route_by_score(
        jnp.full((3, PRO), jnp.nan), jnp.zeros(PRO), TOP_K, SCALING, implementation="triton"
    )

    assert ((np.asarray(experts) >= 0) & (np.asarray(experts) < PRO)).all()
    assert np.isnan(weights).all()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [*TOKENS, 8192], ids="tokens={}".format)
@pytest.mark.parametrize("experts", [FLASH, PRO], ids="experts={}".format)
def test_routing_by_id_gives_what_the_definition_gives(experts, tokens):
    logits, _, ids, table = requests(tokens, experts)

    found, weights = route_by_id(logits, ids, table, SCALING, implementation="triton")

    expected, shares = route_by_id(logits, ids, table, SCALING, implementation="reference")
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(weights, shares, rtol=1e-6)


def routings(tokens: int, count: int) -> dict[str, jax.Array]:
    """[tokens, TOP_K] experts; tokens need not choose different ones. `count` stands for none."""
    experts = np.random.default_rng(tokens).integers(0, count, (tokens, TOP_K), dtype=np.int32)
    elsewhere = np.random.default_rng(1).random(experts.shape) < 0.9
    return {
        "even": jnp.asarray(experts),
        "all on the first": jnp.zeros_like(experts),
        "all on the last": jnp.full_like(experts, count - 1),
        "few experts": jnp.asarray(experts // 50 * 50),
        "most of no expert": jnp.asarray(np.where(elsewhere, count, experts)),
        "all of no expert": jnp.full_like(experts, count),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [*TOKENS, 341, 342, 8192, 20000], ids="tokens={}".format)
@pytest.mark.parametrize(
    ("count", "tile_rows"),
    [(FLASH, 16), (PRO, 64), (1, 32), (128, 16)],
    ids=["Flash", "Pro", "one expert", "half of Flash"],
)
def test_the_plans_kernels_give_what_the_definition_gives(count, tile_rows, tokens):
    run, define = (
        jax.jit(functools.partial(plan, n_routed_experts=count, tile_rows=tile_rows, implementation=name))
        for name in ("triton", "reference")
    )

    for name, experts in routings(tokens, count).items():
        found, expected = run(experts), define(experts)

        for field in dataclasses.fields(expected):
            wanted = getattr(expected, field.name)
            np.testing.assert_array_equal(getattr(found, field.name), wanted, err_msg=f"{name}: {field.name}")


@pytest.mark.gpu
def test_no_tokens_are_routed_to_nothing():
    experts, weights = route_by_score(jnp.zeros((0, FLASH)), jnp.zeros(FLASH), TOP_K, SCALING)

    assert experts.shape == weights.shape == (0, TOP_K)
    assert plan(experts, FLASH, 16).order.shape == (0,)
