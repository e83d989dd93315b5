"""Counts what JAX compiles, so that a promise of "no compile" can be kept and a wait explained."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax.monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"
_PREPARED = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")


@dataclasses.dataclass
class Compiles:
    """How many programs were compiled, and the seconds that tracing, lowering and compiling took."""

    count: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def count_compiles() -> Iterator[Compiles]:
    """Counts the compiles of the `with` block, on any thread."""
    compiles = Compiles()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            compiles.count += 1
        if event == _COMPILED or event in _PREPARED:
            compiles.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
