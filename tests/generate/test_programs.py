"""Compiled programs are found again by what they are made from, and by nothing less."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import programs
from dsv4_jax.compiles import count_compiles


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def scaled(factor: float, tree: dict[str, jax.Array], more: np.ndarray) -> dict[str, jax.Array]:
    return {name: factor * leaf + more for name, leaf in tree.items()}


def arguments(size: int = 3):
    return {"one": jnp.arange(size, dtype=jnp.float32)}, np.ones(size, np.float32)


@pytest.fixture
def folder(tmp_path):
    """Of the programs that are kept."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def ready(factor: float = 2.0, size: int = 3, choice: str | None = None):
    return programs.compiled(scaled, (factor,), arguments(size), choice)


def test_a_program_is_neither_traced_nor_compiled_twice(folder):
    given = arguments()
    programs.compiled(scaled, (2.0,), given, None)
    jax.clear_caches()
    with count_compiles() as compiles:
        found = programs.compiled(scaled, (2.0,), given, None)

    assert compiles.count == 0
    assert compiles.seconds == 0
    assert found(*given)["one"].tolist() == [1, 3, 5]


def test_the_libraries_of_its_kernels_are_named_before_a_program_is_loaded(folder, monkeypatch):
    said = []
    monkeypatch.setattr(programs, "name_kernel_libraries", lambda: said.append("named"))
    load = programs.deserialize_and_load
    monkeypatch.setattr(
        programs, "deserialize_and_load", lambda *a, **k: said.append("loaded") or load(*a, **k)
    )

    ready()
    assert not said
    ready()

    assert said == ["named", "loaded"]


def test_without_a_folder_it_is_compiled(tmp_path):
    assert ready()(*arguments())["one"].tolist() == [1, 3, 5]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [{"factor": 3.0}, {"size": 4}, {"choice": "reference"}, "code", "flags"])
def test_whatever_makes_another_program_makes_another_file(folder, monkeypatch, other):
    ready()
    if other == "code":
        monkeypatch.setattr(programs, "code_fingerprint", lambda: "other")
    elif other == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")

    ready(**other) if isinstance(other, dict) else ready()

    assert len(list(folder.iterdir())) == 2


def test_a_damaged_file_is_replaced_and_said(folder, caplog):
    ready()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:100])

    with caplog.at_level(logging.WARNING):
        assert ready()(*arguments())["one"].tolist() == [1, 3, 5]

    assert str(file) in caplog.text
    assert len(file.read_bytes()) == len(whole)


def test_a_file_that_others_can_write_to_is_not_run(folder, caplog):
    ready()
    (file,) = folder.iterdir()
    file.chmod(0o666)

    with caplog.at_level(logging.WARNING):
        assert ready()(*arguments())["one"].tolist() == [1, 3, 5]

    assert "others can write to it" in caplog.text
    assert file.stat().st_mode & 0o777 == 0o600
