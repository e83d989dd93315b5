"""Which implementation of an op runs: the one asked for, or the fastest that fits.

An op is a folder of `pallas_kernels`. A call may name its implementation itself (`implementation=`), or
whoever runs a whole model chooses for all calls of it (`choose`).
"""

import dataclasses
import functools
import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.target import Target, current_target

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      name: "reference", "triton", "mosaic", or "xla" for what XLA makes of another form of the definition.
      run: the function; all implementations of an op share one signature.
      fits: whether `run` works on a target, given the op's own arguments.
      proven: whether it was held against the definition on a device; until then it runs only if asked for.
    """

    name: str
    run: Callable[..., Any]
    fits: Callable[..., bool] = lambda target, *args, **kwargs: True
    proven: bool = True


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `parse_choice` understood.

    Attributes:
      everywhere: the implementation that every op is to run if it can; None leaves them their default.
      ops: (op, implementation) pairs, which go before `everywhere`.
    """

    everywhere: str | None = None
    ops: tuple[tuple[str, str], ...] = ()

    def of(self, op: str) -> str | None:
        return dict(self.ops).get(op, self.everywhere)


# Part of the key of every cache of jax.jit: a program traced under one choice never serves another.
_chosen = jax.make_user_context(Choice())


def choose(text: str | None) -> AbstractContextManager[None]:
    """In a `with`, makes ops called or traced inside it run what `parse_choice` reads in `text`.

    What a call names by `implementation=` goes first. A call that the chosen implementation does not take
    runs the op's default: block_matmul, say, multiplies unquantised weights too, which no kernel takes.
    If the choice was for this op in particular, the log says so once. None leaves an outer choice in place.

    Raises:
      ValueError, NotImplementedError: as `parse_choice`.
    """
    return nullcontext() if text is None else _chosen(parse_choice(text))


def parse_choice(text: str | None) -> Choice:
    """Reads "triton" (all ops that have it), "expert_mlp=reference,swiglu=triton" (these ops), or both.

    "reference,expert_mlp=triton" runs one kernel and the definitions of all else. None chooses nothing.

    Raises:
      ValueError: there is no such op or implementation, or something is chosen twice.
      NotImplementedError: a kernel is chosen and there is no GPU.
    """
    if text is None:
        return Choice()
    known, everywhere, ops = known_implementations(), [], {}
    for part in text.split(","):
        op, equals, name = part.strip().rpartition("=")
        if equals and op not in known:
            raise ValueError(f"implementation={text!r}: no op is called {op!r}, have {', '.join(known)}")
        names = known[op] if equals else dict.fromkeys(each for names in known.values() for each in names)
        if name not in names:
            has = f"{op} has no" if equals else "no op has an"
            raise ValueError(
                f"implementation={text!r}: {has} implementation {name!r}, have {', '.join(names)}"
            )
        if op in ops or (not equals and everywhere):
            raise ValueError(f"implementation={text!r} chooses twice for {op or 'all ops'}")
        if name != "reference" and current_target().vendor == "cpu":
            raise NotImplementedError(f"implementation={text!r}: {name} needs a GPU, JAX runs on a CPU here")
        if equals:
            ops[op] = name
        else:
            everywhere.append(name)
    return Choice(*everywhere, ops=tuple(sorted(ops.items())))


@functools.cache
def known_implementations() -> Mapping[str, tuple[str, ...]]:
    """Names of the implementations of each op, fastest first: those of all functions in its folder."""
    known = {}
    for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if found.ispkg:
            declared = vars(importlib.import_module(f"pallas_kernels.{found.name}")).values()
            tuples = [each for each in declared if isinstance(each, tuple)]
            names = [each.name for group in tuples for each in group if isinstance(each, Implementation)]
            if names:
                known[found.name] = tuple(sorted(dict.fromkeys(names), key="reference".__eq__))
    return known


def select(implementations: Sequence[Implementation], name: str | None, *args: Any, **kwargs: Any) -> Any:
    """Runs the implementation called `name`, or with None the chosen or first proven that fits.

    `implementations` go from fastest to slowest and end with the reference. A named one never falls back.
    A GPU that is left with the reference, though nobody chose it, logs it once per function.

    Raises:
      ValueError: no implementation has this name.
      NotImplementedError: the named implementation does not take this device or these arguments.
    """
    target = current_target()
    if name is not None:
        named = [each for each in implementations if each.name == name]
        if not named:
            known = ", ".join(dict.fromkeys(each.name for each in implementations))
            raise ValueError(f"implementation={name!r} is unknown here, have {known}")
        for each in named:
            if each.fits(target, *args, **kwargs):
                return each.run(*args, **kwargs)
        raise NotImplementedError(f"implementation={name!r} does not take these arguments on {target}")
    op = op_of(implementations)
    wanted, chosen = _chosen.value.of(op), default_of(implementations, *args, **kwargs)
    if chosen.name != wanted:
        _say_why(op, implementations, chosen, target, (*args, *kwargs.values()))
    if (calls := _recorded.get()) is None:
        return chosen.run(*args, **kwargs)
    calls.append(Call(implementations, args, kwargs))
    with _recording(None):  # what an implementation calls itself is part of it
        return chosen.run(*args, **kwargs)


def default_of(implementations: Sequence[Implementation], *args: Any, **kwargs: Any) -> Implementation:
    """The one that a call takes here which names none: the chosen or first proven that fits."""
    wanted, target = _chosen.value.of(op_of(implementations)), current_target()
    eligible = [each for each in implementations if each.proven or each.name == wanted]
    wanted_first = sorted(eligible, key=lambda each: each.name != wanted)
    return next(each for each in wanted_first if each.fits(target, *args, **kwargs))


def op_of(implementations: Sequence[Implementation]) -> str:
    """The folder of the op."""
    return implementations[-1].run.__module__.split(".")[-2:][0]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an op, as `record` notes it: its implementations, and what it was called with."""

    implementations: Sequence[Implementation]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


_recorded: ContextVar[list[Call] | None] = ContextVar("recorded", default=None)


def record() -> AbstractContextManager[list[Call]]:
    """In a `with`, lists all calls of ops that name no implementation, in their order."""
    return _recording([])


@contextmanager
def _recording(calls: Any) -> Iterator[Any]:
    before = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(before)


_said: set[tuple[str, str, str | None, Target]] = set()


def _say_why(
    op: str,
    implementations: Sequence[Implementation],
    chosen: Implementation,
    target: Target,
    arguments: Sequence[Any],
) -> None:
    """Logs, once per function, why the implementation chosen for this op does not run, or no kernel does."""
    asked, function = dict(_chosen.value.ops).get(op), implementations[-1].run.__name__
    call = f"{function}({', '.join(map(_shown, arguments))})"
    if asked in [each.name for each in implementations]:
        why = f"{asked}, which was chosen, does not take {call}"
    elif chosen.name != "reference" or target.vendor == "cpu":
        return
    else:
        kernels = [each for each in implementations[:-1] if each.proven]
        why = f"no kernel takes {call}" if kernels else f"{function} has no proven kernel yet"
    if (op, function, asked, target) not in _said:
        _said.add((op, function, asked, target))
        _log.warning("%s runs its %s on %s: %s", op, chosen.name, target.arch or target.vendor, why)


def _shown(argument: Any) -> str:
    """An array by dtype and shape, what is made of arrays by class and shape, anything else as it is."""
    if isinstance(argument, type):
        return argument.__name__
    if isinstance(argument, np.dtype) or not hasattr(argument, "shape"):
        return str(argument)
    what = argument.dtype if isinstance(argument, jax.Array) else type(argument).__name__
    return f"{what}{list(argument.shape)}"
