"""A training run: phases one after the other, saved as they go, the same however often it is killed."""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dsv4_jax.config import Config
from dsv4_jax.errors import NumericError
from dsv4_jax.train.forward import Setting
from dsv4_jax.train.initial import initial
from dsv4_jax.train.loss import Losses
from dsv4_jax.train.step import Phase, State, begin, run_steps

_PLAN, CURVE = "plan.json", "curve.jsonl"
_FAR = 1e9  # steps in all, while nobody knows: the learning rate does not fall yet
_SAVE_EVERY = 60  # seconds


def restored(folder: Path, config: Config) -> State:
    """The last state of the run in `folder`."""
    with ocp.CheckpointManager((folder / "states").absolute()) as manager:
        wanted = jax.eval_shape(lambda: begin(initial(config, 0)))
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(wanted))


def train(
    folder: Path,
    setting: Setting,
    phases: tuple[Phase, ...],
    *,
    seconds: float,
    peak: float,
    seed: int,
    chunk: int = 50,
    report: Callable[[str], None] = print,
) -> State:
    """Trains for about `seconds` from the call on, compiling included, or goes on with the run in `folder`.

    How many steps fit is measured once and kept in the folder: a killed run goes on to the same numbers.
    Phases take `chunk` steps at a time, those with long texts fewer.

    Raises:
      NumericError: a loss is not a finite number.
    """
    begun = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    state = begin(initial(setting.config, seed))
    counts = [max(1, chunk * phases[0].tokens // phase.tokens) for phase in phases]

    def steps(number: int, state: State, total: float) -> tuple[State, Losses]:
        program = {"count": counts[number], "phase": phases[number], "setting": setting}
        return jax.block_until_ready(run_steps(state, total, peak, seed, **program))

    def on_a_copy(number: int, state: State) -> float:
        """Runs a program for the clock alone, or to have it compiled: seconds a step."""
        copy, start = jax.tree.map(jnp.copy, state), time.monotonic()
        steps(number, copy, _FAR)
        return (time.monotonic() - start) / counts[number]

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        ocp.CheckpointManager((folder / "states").absolute(), options=options) as manager,
        (folder / CURVE).open("a") as curve,
    ):

        def run(number: int, state: State, total: float) -> State:
            state, losses = steps(number, state, total)
            values = jax.tree.map(lambda each: round(float(each), 4), losses._replace(loads={}))._asdict()
            del values["loads"]
            if not all(map(math.isfinite, jax.tree.leaves(values))):
                raise NumericError(
                    f"step {int(state.step)}: a loss is not a finite number: {values}",
                    hint=f"the last good state is of step {manager.latest_step()}, in {folder / 'states'}",
                )
            line = {"step": int(state.step), "seconds": round(time.monotonic() - begun, 1), **values}
            curve.write(json.dumps(line) + "\n")
            curve.flush()
            report(json.dumps(line))
            return state

        plan_file = folder / _PLAN
        if not plan_file.exists():
            with ThreadPoolExecutor(len(phases)) as pool:
                programs = [pool.submit(on_a_copy, number, state) for number in range(len(phases))]
                programs[0].result()
                while not all(each.done() for each in programs):
                    state = run(0, state, _FAR)
            took = [on_a_copy(number, state) for number in range(len(phases))]
            left = seconds - (time.monotonic() - begun)
            ends, end = [], int(state.step)
            shares = sum(phase.share for phase in phases)
            for phase, count, each in zip(phases, counts, took, strict=True):
                end += max(1, int(left * phase.share / shares / each / count)) * count
                ends.append(end)
            plan_file.write_text(json.dumps({"ends": ends, "seconds_a_step": took}) + "\n")
            report(plan_file.read_text())
        elif (latest := manager.latest_step()) is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
        ends = json.loads(plan_file.read_text())["ends"]
        saved = time.monotonic()
        for number, end in enumerate(ends):
            while int(state.step) < end:
                state = run(number, state, float(ends[-1]))
                if time.monotonic() - saved >= _SAVE_EVERY or int(state.step) >= ends[-1]:
                    saved = time.monotonic()
                    manager.save(int(state.step), args=ocp.args.StandardSave(state))
    return state
