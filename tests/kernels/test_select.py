"""Which implementation of an op a call gets."""

import functools
import logging

import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import Target, dispatch
from pallas_kernels.dispatch import Implementation, select

CPU, GPU = Target("cpu", ""), Target("cuda", "sm_90")


def on_gpu(target, *_, **__) -> bool:
    return target.vendor != "cpu"


def fast(x, *, times=1):
    return "fast", x, times


def slow(x, *, times=1):
    return "slow", x, times


slow.__module__ = "pallas_kernels.some_op.reference"  # by which the op is named in the log
KINDS = (Implementation("fast", fast, on_gpu), Implementation("reference", slow))


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Makes `select` believe in a device."""
    monkeypatch.setattr(dispatch, "current_target", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("target", "chosen"), [(GPU, "fast"), (CPU, "slow")], indirect=["target"], ids=["gpu", "cpu"]
)
def test_the_first_implementation_that_fits_runs(target, chosen):
    assert select(KINDS, None, "x", times=3) == (chosen, "x", 3)


@pytest.mark.parametrize("target", [GPU], indirect=True, ids=["gpu"])
def test_a_named_implementation_runs_though_a_faster_one_fits(target):
    assert select(KINDS, "reference", "x") == ("slow", "x", 1)


@pytest.mark.parametrize("target", [CPU], indirect=True, ids=["cpu"])
def test_a_named_implementation_never_falls_back(target):
    with pytest.raises(NotImplementedError, match="implementation='fast' does not take these arguments"):
        select(KINDS, "fast", "x")


@pytest.mark.parametrize("op", ["swiglu", "hc_post", "hadamard"])
def test_an_unknown_implementation_is_refused_with_the_known_ones(op):
    calls = {
        "swiglu": functools.partial(pk.swiglu, jnp.ones((1, 2)), jnp.ones((1, 2)), limit=1.0),
        "hc_post": functools.partial(
            pk.hc_post, *(jnp.ones(shape) for shape in ((2,), (4, 2), (4,), (4, 4)))
        ),
        "hadamard": functools.partial(pk.hadamard, jnp.ones((1, 2))),
    }

    with pytest.raises(ValueError, match=r"implementation='cutlass' is unknown here, have .*reference"):
        calls[op](implementation="cutlass")


def test_what_fits_is_asked_with_the_arguments_of_the_call(monkeypatch):
    monkeypatch.setattr(dispatch, "current_target", lambda: GPU)
    asked = []
    picky = Implementation("fast", fast, lambda *args, **kwargs: asked.append((args, kwargs)) or False)

    chosen = select((picky, KINDS[1]), None, "x", times=2)

    assert chosen == ("slow", "x", 2)
    assert asked == [((GPU, "x"), {"times": 2})]


def test_a_gpu_left_with_its_reference_says_so_once_per_op(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "current_target", lambda: Target("rocm", "gfx0"))

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            select(KINDS[1:], None, "x")

    (record,) = [each for each in caplog.records if "gfx0" in each.getMessage()]
    assert record.getMessage().startswith("some_op runs its reference on gfx0")
