"""Choosing implementations for a whole model: what is understood, what runs, what jit keeps apart."""

import functools
import inspect
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from dsv4_jax import OFFICIAL, LoadedModel, decode_step, engine, make_cache
from dsv4_jax.errors import RequestError
from dsv4_jax.llm import LLM
from pallas_kernels import Target, activation_quant, block_matmul, dispatch, quantize
from pallas_kernels.block_matmul import triton as block_matmul_triton
from pallas_kernels.dispatch import (
    Choice,
    Implementation,
    choose,
    known_implementations,
    parse_choice,
    select,
)
from pallas_kernels.triton_call import launches

MI350 = Target("rocm", "gfx950")


@pytest.fixture
def on_mi350(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes tracing believe in an MI350, whose kernels are all Triton's; leaves other tests no such trace."""
    monkeypatch.setattr(dispatch, "current_target", lambda: MI350)
    monkeypatch.setattr(block_matmul_triton, "current_target", lambda: MI350)
    monkeypatch.setattr(dispatch, "_said", set())
    yield
    jax.clear_caches()


# What is understood.


def test_every_function_that_takes_an_implementation_belongs_to_an_op():
    public = [getattr(pallas_kernels, name) for name in pallas_kernels.__all__]
    takes = [
        each for each in public if callable(each) and "implementation" in inspect.signature(each).parameters
    ]

    assert {each.__module__.split(".")[1] for each in takes} == set(known_implementations())
    assert "triton" in known_implementations()["block_matmul"]
    assert all(names[-1] == "reference" for names in known_implementations().values())


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        (None, Choice()),
        ("triton", Choice("triton")),
        ("expert_mlp=reference", Choice(ops=(("expert_mlp", "reference"),))),
        (
            "reference, expert_mlp=triton,block_matmul=triton",
            Choice("reference", (("block_matmul", "triton"), ("expert_mlp", "triton"))),
        ),
    ],
)
def test_a_choice_is_one_name_or_op_by_op_or_both(on_mi350, text, choice):
    assert parse_choice(text) == choice


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cutlass", "no op has an implementation 'cutlass', have .*reference"),
        ("", "no op has an implementation ''"),
        ("reference,", "no op has an implementation ''"),
        ("moe=triton", "no op is called 'moe', have activation_quant, attention_inputs, block_matmul, "),
        ("=triton", "no op is called ''"),
        ("expert_mlp=cutlass", "expert_mlp has no implementation 'cutlass', have .*reference"),
        ("expert_mlp=", "expert_mlp has no implementation ''"),
        ("reference,triton", "chooses twice for all ops"),
        ("swiglu=reference,swiglu=reference", "chooses twice for swiglu"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(on_mi350, text, said):
    with pytest.raises(ValueError, match=f"implementation='{text}'.*{said}") as refused:
        parse_choice(text)

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["triton", "reference,block_matmul=triton"])
def test_a_kernel_is_refused_where_there_is_no_gpu(text):
    with pytest.raises(NotImplementedError, match="triton needs a GPU"):
        parse_choice(text)


# What runs.


def fits_rows_of(columns: int):
    return lambda target, x: target.vendor != "cpu" and x.shape[-1] == columns


def first(x):
    return "first"


def second(x):
    return "second"


def reference(x):
    return "reference"


reference.__module__ = "pallas_kernels.swiglu.reference"
THREE = (
    Implementation("mosaic", first, fits_rows_of(2)),
    Implementation("triton", second, fits_rows_of(2)),
    Implementation("reference", reference),
)
TAKEN, NOT_TAKEN = jnp.ones((1, 2)), jnp.ones((1, 3))


@pytest.fixture
def three(on_mi350, monkeypatch):
    """swiglu with two kernels."""
    known = {"swiglu": ("mosaic", "triton", "reference"), "routing": ("reference",)}
    monkeypatch.setattr(dispatch, "known_implementations", lambda: known)


@pytest.mark.parametrize(
    ("text", "ran"),
    [
        (None, "first"),
        ("mosaic", "first"),
        ("triton", "second"),
        ("reference", "reference"),
        ("swiglu=triton", "second"),
        ("reference,swiglu=triton", "second"),
        ("triton,swiglu=reference", "reference"),
        ("routing=reference", "first"),
    ],
)
def test_what_is_chosen_runs_and_the_call_itself_goes_first(three, text, ran):
    with choose(text):
        assert select(THREE, None, TAKEN) == ran
        assert select(THREE, "triton", TAKEN) == "second"
    assert select(THREE, None, TAKEN) == "first"


def test_the_innermost_choice_counts_and_none_leaves_the_outer_one(three):
    with choose("reference"):
        with choose("triton"):
            assert select(THREE, None, TAKEN) == "second"
        with choose(None):
            assert select(THREE, None, TAKEN) == "reference"


def test_an_op_that_lacks_what_is_chosen_for_all_runs_its_default(three, caplog):
    with choose("triton"):
        assert select(THREE[::2], None, TAKEN) == "first"

    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "x", "said"),
    [
        (None, TAKEN, []),
        ("reference", TAKEN, []),
        ("swiglu=reference", NOT_TAKEN, []),
        (None, NOT_TAKEN, ["swiglu runs its reference on gfx950: no kernel takes reference(float32[1, 3])"]),
        (
            "triton",
            NOT_TAKEN,
            ["swiglu runs its reference on gfx950: no kernel takes reference(float32[1, 3])"],
        ),
        (
            "swiglu=triton",
            NOT_TAKEN,
            [
                "swiglu runs its reference on gfx950: "
                "triton, which was chosen, does not take reference(float32[1, 3])"
            ],
        ),
    ],
)
def test_the_log_says_once_why_what_was_wanted_does_not_run(three, caplog, text, x, said):
    with caplog.at_level(logging.WARNING), choose(text):
        for _ in range(2):
            select(THREE, None, x)

    assert [record.getMessage() for record in caplog.records] == said


def test_the_log_names_quantised_arguments_and_an_op_without_kernels(on_mi350, caplog):
    weight = quantize(jnp.ones((128, 256)), "fp8_block128")

    block_matmul(jnp.ones((1, 256)), weight)
    swiglu_without_kernel = (Implementation("reference", reference),)
    select(swiglu_without_kernel, None, TAKEN)

    call = "block_matmul(float32[1, 256], QuantArray[128, 256], bfloat16, None)"
    assert [record.getMessage() for record in caplog.records] == [
        f"block_matmul runs its reference on gfx950: no kernel takes {call}",
        "swiglu runs its reference on gfx950: reference has no proven kernel yet",
    ]


# What jit keeps apart.

X = jnp.ones((4, 256), jnp.bfloat16)
WEIGHT = quantize(jnp.ones((128, 256)), "fp8_block128")


def kernels_of(function, *arguments) -> list[str]:
    return [launch.kernel.__name__ for launch in launches(function, *arguments)]


def test_one_jitted_function_is_traced_again_for_each_choice(on_mi350):
    @jax.jit
    def inner(x, weight):
        return block_matmul(activation_quant(x), weight)

    outer = jax.jit(lambda x, weight: inner(x, weight))
    found = {}
    for text in (None, "reference", "block_matmul=reference", "triton", None, "reference"):
        with choose(text):
            found.setdefault(text, []).append(len(kernels_of(outer, X, WEIGHT)))

    assert found == {None: [2, 2], "reference": [0, 0], "block_matmul=reference": [1], "triton": [2]}


def test_compiled_programs_of_two_choices_are_two(monkeypatch):
    ran = []
    ops = tuple(
        Implementation(name, functools.partial(lambda name, x: ran.append(name) or x, name)) for name in "ab"
    )
    ops += (Implementation("reference", reference),)
    monkeypatch.setattr(dispatch, "known_implementations", lambda: {"swiglu": ("a", "b", "reference")})
    monkeypatch.setattr(dispatch, "current_target", lambda: MI350)
    run = jax.jit(lambda x: select(ops, None, x))

    for text in ("a", "b", "a", "b"):
        with choose(text):
            run(X)

    assert ran == ["a", "b"]  # traced once each, and never one for the other


def test_the_model_traces_what_is_chosen(on_mi350, tiny_fp4, shallow):
    model: LoadedModel = shallow(tiny_fp4.loaded, 0, 1, 2, quantised=True)
    cache = make_cache(model.config, OFFICIAL, batch=1, max_len=128)
    step = functools.partial(decode_step, model.config, OFFICIAL)
    arguments = (model.params, jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32), cache)

    def traced(text: str | None) -> set[str]:
        with choose(text):
            return set(kernels_of(step, *arguments))

    everything = traced(None)
    assert {"_activation_quant"} < everything
    assert traced("reference") == set()
    assert traced("activation_quant=reference") == everything - {"_activation_quant"}
    assert traced("triton") == everything


def test_a_model_runs_under_its_own_choice_and_leaves_none_behind(tiny_fp4, monkeypatch):
    seen = []

    def read(*_, **__):
        seen.append(dispatch._chosen.value)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "read_piece", read)
    with pytest.raises(KeyboardInterrupt):
        LLM(tiny_fp4.loaded, implementation="reference").generate([[1, 2]])

    assert seen == [Choice("reference")]
    assert dispatch._chosen.value == Choice()


def test_a_model_refuses_a_choice_that_does_not_exist_before_it_reads_anything():
    with pytest.raises(RequestError, match="no op is called 'moe'"):
        LLM.from_pretrained("/no such folder", implementation="moe=reference")


def test_an_unproven_implementation_runs_only_if_asked_for(on_mi350):
    tried = (
        Implementation("triton", lambda: "tried", proven=False),
        Implementation("reference", lambda: "definition"),
    )

    assert select(tried, None) == "definition"
    assert select(tried, "triton") == "tried"
