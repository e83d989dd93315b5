"""Faults that are planted on purpose: each is felt, and none stays."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache import make_cache
from dsv4_jax.checkpoint.load import LoadedModel
from dsv4_jax.evaluation import faults
from dsv4_jax.generate import prefill
from dsv4_jax.numerics import PLAIN

LENGTH = 300  # tokens: more entries than the indexer may choose


@pytest.fixture(scope="module")
def model(tiny_fp4, shallow) -> LoadedModel:
    loaded = shallow(tiny_fp4.loaded, 0, 1, 2, quantised=True)
    return dataclasses.replace(loaded, mtp_params=None)


def logits(model: LoadedModel) -> np.ndarray:
    ids = np.random.default_rng(0).integers(2, 512, (1, LENGTH), dtype=np.int32)
    cache = make_cache(model.config, PLAIN, batch=1, max_len=LENGTH)
    start, length = jnp.zeros(1, jnp.int32), jnp.full(1, LENGTH, jnp.int32)
    return np.asarray(prefill(model.config, PLAIN, model.params, ids, start, length, cache)[0])


@pytest.fixture(scope="module")
def whole(model) -> np.ndarray:
    return logits(model)


@pytest.mark.slow  # each compiles the model anew
@pytest.mark.parametrize("name", [*faults.PLANTED, "random choice"])
def test_a_fault_is_felt_and_does_not_stay(model, whole, name):
    with faults.PLANTED.get(name, faults.random_choice)():
        faulty = logits(model)

    # Two ways to run the model differ by up to 1.4e-5.
    assert np.abs(faulty - whole).max() > 1e-2
    np.testing.assert_array_equal(logits(model), whole)


def test_shifted_scale_bytes_are_felt(model, whole):
    assert np.abs(logits(faults.scale_bytes_shifted(model)) - whole).max() > 1e-2
