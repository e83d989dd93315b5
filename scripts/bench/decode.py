#!/usr/bin/env python3
"""Times whole decode steps and prefills at full width with made-up weights.

The released 43 or 61 layers do not fit one GPU, so a model of a few layers of each kind (SWA, CSA, HCA) is
measured, and one of two of each. Each layer that lacks is taken to cost what their difference is in the mean:
from two layers of each kind on, the released models are pairs of CSA and HCA. The row says so. A step is the
engine's: layers, head, the choice of the next token, drafts. As in the engine, a program takes several steps
(`--steps-at-once`), and is started without waiting for the one before; what is told is the time of one step.
Caches are donated. Prefills are read in pieces, as the engine reads them, and end with the logits of the last
token.

Drafts: a step of k drafts reads 1 + k tokens a sequence and drafts k again. Made-up drafts never stand, which
costs the same; a row gives the tokens per second if none stands and if all do.

Modes: "default"; "invariant" takes steps as engines of that name do; "serialized" lets no kernels of a CUDA
graph run side by side, and must give the bits of "default".

Layers (`--kinds`): one of each kind costs what the model does not take that lacks the last one of them.

A case that does not fit is named and left out. Everything is compiled before anything is timed. On one H200:

  python scripts/bench/decode.py --results scripts/bench/results/h200.json
  python scripts/bench/decode.py --cases "decode B="{1,8,32,128}" ctx=4k"
  python scripts/bench/decode.py --cases "decode B="{1,8}" ctx=32k k="{1,2,3} --profile
  python scripts/bench/decode.py --cases "decode B="{1,128}" ctx=1M" --layers-of-each 1
  python scripts/bench/decode.py --cases "decode B="{1,8,32,128}" ctx=4k" --modes default invariant
  python scripts/bench/decode.py --cases "decode B="{1,32}" ctx=32k" --modes default serialized
  python scripts/bench/decode.py --cases "prefill 4k" --piece 4096
  python scripts/bench/decode.py --cases "decode B="{1,8,32,128}" ctx=32k" --kinds SWA CSA HCA
  python scripts/bench/decode.py --model pro --layers-of-each 3 --cases "decode B=1 ctx=32k"

Without a GPU `--model tiny --cases "decode B=2 ctx=64 k=1"` tries it out.
"""

import argparse
import dataclasses
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")  # by default JAX takes three quarters

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from floors import Reads, layer_us, step_us
from harness import facts, median_us, save
from made_up import made_up_like, made_up_params
from profile_kernels import kernel_times, print_kernel_times

from dsv4_jax.cache import make_cache
from dsv4_jax.config import PRESETS, Config
from dsv4_jax.decode import GRAPHS, MOST_DRAFTS, Caches, Models, Requests, Sequences, steps
from dsv4_jax.engine import PIECES_ON_GPU, STEPS_ON_GPU
from dsv4_jax.model import bind
from dsv4_jax.mtp import bind_mtp, make_mtp_cache
from dsv4_jax.numerics import OFFICIAL
from dsv4_jax.sampling import SamplingArrays, SamplingParams
from pallas_kernels.dispatch import choose

FEW = 2  # layers of each kind of the smaller model
KINDS = {"SWA": 0, "CSA": 4, "HCA": 128}  # compress_ratios
MODES = ("default", "invariant", "serialized")
SERIALIZED = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
CASES = ("decode B=1 ctx=32k", "decode B=32 ctx=32k", "decode B=128 ctx=32k", "prefill 4k")
STAGGER = 128  # sequences stand at so many different positions, so that not all complete an entry at once
ROOM = 128  # tokens of the caches beyond the context: more than one program generates
MEASURE_S = 0.15  # about how long one of the three measurements of a program is to take
TRACED_CALLS = 3

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step of `batch` sequences at a context, verifying `drafts` each; or a prefill of `context`."""

    mode: Literal["decode", "prefill"]
    batch: int
    context: int
    drafts: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "decode B=1 ctx=32k", "decode B=1 ctx=32k k=2", "prefill 4k".

        Raises:
          argparse.ArgumentTypeError: it is none of these.
        """
        if found := re.fullmatch(r"decode B=(\d+) ctx=(\d+[kM]?)(?: k=(\d))?", text):
            batch, context, drafts = found.groups(default="0")
            return cls("decode", int(batch), _number(context), int(drafts))
        if found := re.fullmatch(r"prefill (\d+[kM]?)", text):
            return cls("prefill", 1, _number(found[1]), 0)
        raise argparse.ArgumentTypeError(f"{text!r} is not like {CASES[0]!r} or {CASES[-1]!r}")

    @property
    def _size(self) -> str:
        drafts = f" k={self.drafts}" if self.drafts else ""
        return (
            f"B={self.batch} ctx={_short(self.context)}{drafts}"
            if self.mode == "decode"
            else _short(self.context)
        )

    @property
    def of_model(self) -> str:
        return f"decode step {self._size}" if self.mode == "decode" else f"prefill {self._size}"

    @property
    def of_layer(self) -> str:
        return f"{self.mode} {self._size}"

    @property
    def reads(self) -> Reads:
        if self.mode == "prefill":
            return Reads(1, self.context, 0)
        return Reads(self.batch, 1 + self.drafts, self.context - 1)


def _number(text: str) -> int:
    unit = {"k": 2**10, "M": 2**20}.get(text[-1])
    return int(text[:-1]) * unit if unit else int(text)


def _short(number: int) -> str:
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


@dataclasses.dataclass(frozen=True)
class Model:
    """A released model, of which `config` keeps a few layers of each kind; with numbers in its parameters."""

    name: str
    whole: Config
    config: Config
    params: Any
    mtp_params: Any

    @classmethod
    def made_up(cls, name: str, layers_of_each: int, *, mtp: bool) -> Self:
        whole = PRESETS[name]
        config = few_layers(whole, layers_of_each)
        return cls(name, whole, config, *made_up_params(config, mtp=mtp))

    def smaller(self) -> Self:
        """Its first layers, two of each kind; the very same numbers."""
        config = few_layers(self.whole, FEW)
        layers = {place: self.params["layers"][place] for place in range(config.num_hidden_layers)}
        return dataclasses.replace(self, config=config, params=self.params | {"layers": layers})

    def without(self, kind: str) -> Self:
        """But for its last layer of a kind."""
        ratios = self.config.main_ratios
        last = max(place for place, ratio in enumerate(ratios) if ratio == KINDS[kind])
        kept = [place for place in range(len(ratios)) if place != last]
        config = dataclasses.replace(
            self.config,
            num_hidden_layers=len(kept),
            compress_ratios=(*(ratios[place] for place in kept), *self.config.compress_ratios[len(ratios) :]),
            num_hash_layers=sum(place < self.config.num_hash_layers for place in kept),
        )
        layers = {place: self.params["layers"][old] for place, old in enumerate(kept)}
        return dataclasses.replace(self, config=config, params=self.params | {"layers": layers})


def few_layers(whole: Config, of_each: int) -> Config:
    """The first `of_each` layers of each kind, as many as there are, in the order in which they stand."""
    ratios = whole.main_ratios
    kept = [ratio for place, ratio in enumerate(ratios) if ratios[:place].count(ratio) < of_each]
    hashed = min(whole.num_hash_layers, len(kept))
    drafts = whole.compress_ratios[len(ratios) :]
    return dataclasses.replace(
        whole, num_hidden_layers=len(kept), compress_ratios=(*kept, *drafts), num_hash_layers=hashed
    )


# --- what is run: programs that take parameters and a state, and give a result and the state that follows


@dataclasses.dataclass(frozen=True)
class Work:
    """A case of a model, in a mode.

    Attributes:
      params: what the program takes.
      advance: from these and a state, which it may reuse, a result and the next state.
      state: makes the first state; also traced, for its shapes.
      calls: of `advance`, that make one run: the pieces of a prefill.
      steps: decode steps that a run takes.
      finish: makes a run's last result into its logits; None: that is all.
      lacks: the kind of which the model has one layer less than the one that is measured.
    """

    case: Case
    mode: str
    config: Config
    params: Any
    advance: Callable[[Any, State], tuple[Any, State]]
    state: Callable[[], State]
    calls: int = 1
    steps: int = 1
    finish: Callable[[Any, Any], Any] | None = None
    lacks: str = ""

    @property
    def name(self) -> str:
        mode = "" if self.mode == "default" else f", {self.mode}"
        lacks = f" (one {self.lacks} less)" if self.lacks else ""
        return f"{self.config.num_hidden_layers} layers{lacks} {self.case.of_model}{mode}"


def works(
    model: Model, case: Case, piece: int, count: int, mode: str = "default", kinds: Sequence[str] = ()
) -> list[Work]:
    """The model, the smaller one if it is one, those that lack a layer; decoding, `count` steps at once."""
    models = {"": [model]}
    if model.config.num_hidden_layers > few_layers(model.whole, FEW).num_hidden_layers:
        models[""].append(model.smaller())
    models |= {kind: [model.without(kind)] for kind in kinds}
    decodes = case.mode == "decode"
    return [
        dataclasses.replace(
            _decode_steps(each, case, mode, count) if decodes else _prefill(each, case, mode, piece),
            lacks=kind,
        )
        for kind, those in models.items()
        for each in those
    ]


def _decode_steps(model: Model, case: Case, mode: str, count: int) -> Work:
    config, drafts, invariant = model.config, case.drafts, mode == "invariant"

    def advance(params: Any, state: State) -> tuple[Any, State]:
        main, mtp = params
        models = Models(bind(config, OFFICIAL, main), bind_mtp(config, OFFICIAL, mtp) if drafts else None)
        # Every run begins where the first one did, and so needs no more room.
        start = dataclasses.replace(state["sequences"], position=_positions(case))
        what = state["requests"], start, config.eos_token_id, state["forced"], state["most"]
        added, after = steps(models, *what, invariant=invariant)
        return added.logprobs, state | {"sequences": after}

    def state() -> State:
        max_draft = MOST_DRAFTS if invariant else drafts
        sizes = {"batch": case.batch, "max_len": case.context + ROOM, "max_draft": max_draft}
        greedy = SamplingArrays.stack([SamplingParams(temperature=0.0)] * case.batch)
        endless = jnp.full(case.batch, 2**30), jnp.zeros(case.batch, bool)
        sequences = Sequences(
            token=_tokens(config, case.batch),
            position=_positions(case),
            drafts=_tokens(config, case.batch, drafts),
            drawn_from=jnp.zeros((case.batch, drafts, config.vocab_size), jnp.float32),
            count=jnp.zeros(case.batch, jnp.int32),
            done=jnp.zeros(case.batch, bool),
            caches=_made_up_caches(
                lambda: Caches(
                    make_cache(config, OFFICIAL, **sizes),
                    make_mtp_cache(config, OFFICIAL, **sizes) if drafts else None,
                )
            ),
        )
        # Every row is told its tokens, so that all rows read different ones and experts stay random.
        told = {"forced": _tokens(config, count, case.batch), "most": jnp.int32(count)}
        return {"requests": Requests(greedy, *endless), "sequences": sequences} | told

    mtp_params = model.mtp_params if drafts else None
    return Work(case, mode, config, (model.params, mtp_params), advance, state, steps=count)


def _prefill(model: Model, case: Case, mode: str, piece: int) -> Work:
    config, calls = model.config, -(-case.context // piece)

    def advance(params: Any, state: State) -> tuple[Any, State]:
        place = state["number"] % calls * piece
        ids = jax.lax.dynamic_slice_in_dim(state["ids"], place, piece, axis=1)
        here = jnp.minimum(piece, case.context - place)[None]
        streams, caches = bind(config, OFFICIAL, params)(ids, place[None], here, state["caches"])
        last = jax.lax.dynamic_index_in_dim(streams, here[0] - 1, axis=1, keepdims=False)
        return last, state | {"number": state["number"] + 1, "caches": caches}

    def finish(params: Any, last: Any) -> Any:
        return bind(config, OFFICIAL, params).logits(last)

    def state() -> State:
        return {
            "number": jnp.int32(0),
            "ids": _tokens(config, 1, calls * piece),
            "caches": _made_up_caches(lambda: make_cache(config, OFFICIAL, batch=1, max_len=case.context)),
        }

    return Work(case, mode, config, model.params, advance, state, calls, finish=finish)


def _tokens(config: Config, *shape: int) -> jax.Array:
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    return jnp.asarray(ids, jnp.int32)


def _positions(case: Case) -> jax.Array:
    """Of each sequence's newest token: within `STAGGER` of the last of the context."""
    return case.context - 1 - jnp.arange(case.batch, dtype=jnp.int32) % min(STAGGER, case.context)


def _made_up_caches(make: Callable[[], Any]) -> Any:
    return made_up_like(jax.eval_shape(make))


# --- memory, compiling, timing


def size_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_bytes(work: Work) -> int:
    return size_bytes(jax.eval_shape(work.state))


def planned_bytes(work: Work) -> int:
    """What its state takes while it is made: its largest array is there twice then."""
    leaves = jax.tree.leaves(jax.eval_shape(work.state))
    return size_bytes(leaves) + max(map(size_bytes, leaves))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Compiled programs, seconds that tracing and compiling took, and bytes that runs take and copy."""

    advance: Any
    finish: Any
    trace_s: float
    compile_s: float
    temp_bytes: int
    copied_bytes: int

    def __str__(self) -> str:
        return (
            f"traced in {self.trace_s:.1f} s, compiled in {self.compile_s:.1f};"
            f" {self.temp_bytes / 1e9:.2f} GB beside the state, {self.copied_bytes / 1e6:.1f} MB copied"
        )


def prepare(work: Work, implementation: str | None) -> Prepared:
    begin = time.perf_counter()
    options = GRAPHS | (SERIALIZED if work.mode == "serialized" else {})
    with choose(implementation):  # of this thread
        shapes = jax.eval_shape(work.state)
        program = jax.jit(work.advance, donate_argnums=1, compiler_options=options)
        lowered = program.lower(work.params, shapes)
        result = lowered.out_info[0]
        traced = time.perf_counter()
        advance = lowered.compile()
        compiled = time.perf_counter()
        finish = work.finish and jax.jit(work.finish).lower(work.params, result).compile()
    memory = advance.memory_analysis()
    temp = memory.temp_size_in_bytes if memory else 0
    return Prepared(
        advance, finish, traced - begin, compiled - traced, temp, copied_bytes(advance.as_text() or "")
    )


HLO_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "f8e4m3fn": 1, "u8": 1, "s8": 1, "pred": 1}


def copied_bytes(hlo: str) -> int:
    """Bytes that a compiled program's plain copies write; of a cache that is donated there are to be none."""
    total = 0
    for dtype, shape in re.findall(r"= \(?(\w+)\[([\d,]*)\][^=\n]* copy(?:-start)?\(", hlo):
        total += HLO_BYTES.get(dtype, 8) * int(np.prod([int(size) for size in shape.split(",") if size]))
    return total


class Runner:
    """Runs a compiled `Work`, its state one run after the other."""

    def __init__(self, work: Work, prepared: Prepared):
        self.work, self.prepared, self.state = work, prepared, work.state()
        jax.block_until_ready(self.state)

    def __call__(self) -> Any:
        """One run: a decode step, or all pieces of a prompt."""
        result = None
        for _ in range(self.work.calls):
            result, self.state = self.prepared.advance(self.work.params, self.state)
        return result if self.prepared.finish is None else self.prepared.finish(self.work.params, result)


def measure(work: Work, prepared: Prepared, profile: bool) -> tuple[dict[str, float], Any]:
    """Microseconds of a step, or of a prefill, and where they go; and what the first run gives.

    `us` is of runs that are started without waiting; `us_host` is how long starting them takes, within `us`;
    `us_kernels` adds up what kernels take by themselves, and there are `launches` of them. The first run, in
    seconds, is a run of all steps.

    Raises:
      ArithmeticError: what comes out is not finite.
    """
    run = Runner(work, prepared)
    begin = time.perf_counter()
    result = jax.block_until_ready(run())
    first = time.perf_counter() - begin
    if not all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(result)):
        raise ArithmeticError("what comes out is not finite")
    once = median_us(run, repeats=1)
    inner = int(np.clip(MEASURE_S * 1e6 / once, 2, 50))
    us = median_us(run, repeats=3, inner=inner) / work.steps

    begin = time.perf_counter()
    results = [run() for _ in range(inner)]
    us_host = (time.perf_counter() - begin) / inner / work.steps * 1e6
    jax.block_until_ready(results)

    if work.steps > 1:  # of a loop in a graph the profiler tells one turn
        run.state["most"] = jnp.int32(1)
    traced = min(inner, TRACED_CALLS)
    kernels = kernel_times(lambda: [run() for _ in range(traced)], traced)
    if profile:
        print_kernel_times(work.name, kernels, most=30)
    found = {
        "us": us,
        "us_kernels": sum(us for _, us in kernels.values()),
        "us_host": us_host,
        "launches": sum(count for count, _ in kernels.values()),
        "first_run_s": first,
    }
    return found, jax.device_get(result)


# --- rows


def model_row(model: Model, config: Config, case: Case, found: dict[str, float]) -> dict[str, Any]:
    """A whole step or prefill of the layers of `config`."""
    tokens, seconds = case.reads.sequences if case.mode == "decode" else case.context, found["us"] / 1e6
    row = {"id": f"{model.name} {config.num_hidden_layers} layers {case.of_model}"} | found
    row |= {"floor_us": step_us(config, case.reads, case.drafts), "tokens_per_second": tokens / seconds}
    if case.drafts:
        row["tokens_per_second_if_all_stand"] = tokens * (1 + case.drafts) / seconds
    return row


def layer_row(
    model: Model, case: Case, kind: str, found: dict[str, float], without: dict[str, float]
) -> dict[str, Any]:
    """A layer of a kind: what the model takes beyond the one that lacks it."""
    name = "" if model.name == "flash" else f"{model.name} "
    each = {name: found[name] - without[name] for name in ("us", "us_kernels", "launches")}
    floor = layer_us(model.config, KINDS[kind], case.reads)
    return {"id": f"layer {name}{kind} {case.of_layer}"} | each | {"floor_us": floor}


def scaled(model: Model, found: dict[str, float], fewer: dict[str, float]) -> tuple[dict[str, float], str]:
    """All layers of the released model, and in words how that follows from those measured."""
    layers, few = model.config.num_hidden_layers, few_layers(model.whole, FEW).num_hidden_layers
    lacking = model.whole.num_hidden_layers - layers
    each = {name: (found[name] - fewer[name]) / (layers - few) for name in ("us", "us_kernels", "launches")}
    total = {name: found[name] + lacking * one for name, one in each.items()}
    words = f"{layers} layers took {found['us']:.0f} us, {few} of them {fewer['us']:.0f}"
    return total, f"{words}; +{lacking} of {each['us']:.1f}"


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()}


def shown(row: dict[str, Any]) -> str:
    us, kernels, floor = row["us"], row["us_kernels"], row["floor_us"]
    return (
        f"{row['id']}: {us:.1f} us, floor {floor:.1f} ({floor / us:.0%}); kernels {kernels:.1f} in"
        f" {row['launches']:.0f} launches, outside {us - kernels:.1f}"
    )


@dataclasses.dataclass(frozen=True)
class Budget:
    """Seconds from `begun` on, and bytes of device memory beside the parameters.

    Compiling has 60% of the seconds: what has not begun by then is left out.
    """

    seconds: float
    nbytes: float
    begun: float

    @property
    def passed(self) -> float:
        return time.perf_counter() - self.begun

    def fits(self, work: Work, nbytes: int) -> bool:
        """Whether there is room for it; says so if not."""
        if nbytes > self.nbytes:
            gb = f"{nbytes / 1e9:.1f} GB beside the parameters, {max(self.nbytes, 0) / 1e9:.1f} are free"
            print(f"{work.name}: left out, takes {gb}", flush=True)
        return nbytes <= self.nbytes

    def prepare(self, work: Work, implementation: str | None) -> Prepared | None:
        """None if time is up."""
        return prepare(work, implementation) if self.passed < 0.6 * self.seconds else None


Jobs = list[tuple[Work, Future[Prepared | None]]]


def measure_case(
    model: Model, case: Case, jobs: Jobs, budget: Budget, profile: bool, first: dict[Any, Any]
) -> tuple[list[dict[str, Any]], int]:
    """The rows of a case in one mode, whose programs these are, and how many of them failed.

    Args:
      first: what programs of the default mode gave; filled here.
    """
    rows, layers, whole, wrong = [], [], {}, 0
    for work, future in jobs:
        try:
            prepared = future.result()
            if prepared is None or budget.passed > budget.seconds:
                print(f"{work.name}: left out, {budget.passed:.0f} s have passed", flush=True)
                continue
            if not budget.fits(work, state_bytes(work) + prepared.temp_bytes):
                continue
            found, result = measure(work, prepared, profile)
            expected = first.setdefault((case, work.config), result)
            if work.mode == "serialized" and not np.array_equal(result, expected):
                raise ArithmeticError("the bits are not those of the first mode")
        except Exception as error:  # one program's failure leaves the others their turn
            wrong += 1
            print(f"{work.name}: {type(error).__name__} {str(error)[:300]}", flush=True)
            continue
        if work.lacks:
            if whole:
                layers.append(layer_row(model, case, work.lacks, whole, found))
                print(shown(layers[-1]), flush=True)
            continue
        whole = whole if rows else found
        seconds = {"trace_s": prepared.trace_s, "compile_s": prepared.compile_s}
        rows.append(model_row(model, work.config, case, found | seconds))
        print(f"{shown(rows[-1])}\n  {prepared}, first run {found['first_run_s']:.1f} s", flush=True)
    if len(rows) == 2:
        total, words = scaled(model, *rows)
        rows.append(model_row(model, model.whole, case, total) | {"scaled": words})
        print(f"{shown(rows[-1])}\n  {words}", flush=True)
    return rows + layers, wrong


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    begun = time.perf_counter()
    cases = list(dict.fromkeys(options.cases))
    turns = list(itertools.product(cases, options.modes))
    model = Model.made_up(options.model, options.layers_of_each, mtp=any(case.drafts for case in cases))
    weights = size_bytes(jax.block_until_ready((model.params, model.mtp_params)))
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))
    budget = Budget(options.seconds, min(limit, options.memory_gb * 1e9) - weights, begun)
    count = model.config.num_hidden_layers
    print(f"# {count} layers, {weights / 1e9:.2f} GB of parameters; {budget.passed:.0f} s", flush=True)

    # All are compiled before any is timed: a compiling host disturbs the clock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            (work, pool.submit(budget.prepare, work, options.implementation))
            for case, mode in turns
            for work in works(
                model,
                case,
                min(options.piece, case.context),
                options.steps_at_once,
                mode,
                options.kinds,
            )
            if budget.fits(work, planned_bytes(work))
        ]
    print(f"# compiled; {budget.passed:.0f} s", flush=True)

    here, first, wrong = facts(), {}, 0
    for case, mode in turns:
        here["implementation"] = options.implementation or "default" if mode == "default" else mode
        of_case = [job for job in jobs if (job[0].case, job[0].mode) == (case, mode)]
        rows, failed = measure_case(model, case, of_case, budget, options.profile, first)
        wrong += failed
        prefill = case.mode == "prefill"
        more = {"piece": min(options.piece, case.context)} if prefill else {"steps": options.steps_at_once}
        if options.results:
            save([rounded(row) | here | more for row in rows], options.results)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(f"# done; {budget.passed:.0f} s, peak {peak / 1e9:.1f} GB", flush=True)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(PRESETS), default="flash")
    parser.add_argument("--layers-of-each", type=int, default=4, help="as many as there are, at most")
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=[Case.parse(each) for each in CASES])
    parser.add_argument(
        "--piece", type=int, default=PIECES_ON_GPU[-1], help="tokens of a prompt that are read at once"
    )
    parser.add_argument("--steps-at-once", type=int, default=STEPS_ON_GPU, help="decode steps of one program")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=MODES[:1], help="see above")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=[], help="of layers; see above")
    parser.add_argument("--implementation", help="as the command line's option; by default the fastest")
    parser.add_argument("--seconds", type=float, default=300, help="begin no new case after so long")
    parser.add_argument(
        "--memory-gb", type=float, default=float("inf"), help="plan with no more than so much"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of each program")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
