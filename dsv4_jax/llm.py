"""Text or token ids in, text and token ids out: the model with its tokenizer and its engine."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh

from dsv4_jax.answers import ChatOutput, Collected, GenerationOutput, Timings, ended, until
from dsv4_jax.chat import Effort, Release, encode_chat, parse_completion
from dsv4_jax.checkpoint.load import LoadedModel, Verify, load
from dsv4_jax.checkpoint.names import parameters
from dsv4_jax.compiles import count_compiles
from dsv4_jax.config import Config
from dsv4_jax.decode import MOST_DRAFTS
from dsv4_jax.engine import Engine, Event, free_bytes
from dsv4_jax.errors import MemoryPlanError, RequestError
from dsv4_jax.numerics import OFFICIAL, Numerics
from dsv4_jax.prompts import check_prompt
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.sharding import DEFAULT_RULES, Placement, Rules, check_mesh, find_rules, placements
from dsv4_jax.stops import AnswerText
from dsv4_jax.tokenizer import Tokenizer
from pallas_kernels.dispatch import parse_choice

SHORTEST_CACHE = 128  # room in the caches is a power of two from here on, so that few programs serve all

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages


class LLM:
    """A loaded model, ready to answer.

    Attributes:
      model: parameters and config.
      numerics: the arithmetic it runs in.
      implementation: of its ops, as `pallas_kernels.dispatch.parse_choice` reads it; None: the fastest.
      tokenizer: None if the checkpoint folder has none; prompts are then token ids.
      max_len: tokens that a prompt and its answer may have together.
      max_batch: prompts that run together; another starts when one of them ends.
      draft_tokens: tokens that the MTP head drafts for each step; 0 for none.
      prefix_bytes: memory for the beginnings of prompts, which are then read once; 0 keeps none.
      invariant: whether a request's bits are the same in any batch and, where it is greedy, with any number
        of drafts; from the first request on there is then room for `max_batch` requests of `max_len` tokens.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        numerics: Numerics = OFFICIAL,
        implementation: str | None = None,
        tokenizer: Tokenizer | None = None,
        max_len: int | None = None,
        max_batch: int = 32,
        draft_tokens: int = 0,
        prefix_bytes: int = 0,
        invariant: bool = False,
    ):
        longest = model.config.max_position_embeddings
        if max_len is not None and not 1 <= max_len <= longest:
            raise RequestError(f"max_len must be in [1, {longest}] (max_position_embeddings), got {max_len}.")
        if max_batch < 1:
            raise RequestError(f"max_batch must be at least 1, got {max_batch}.")
        if prefix_bytes < 0:
            raise RequestError(f"prefix_bytes must be at least 0, got {prefix_bytes}.")
        _check_implementation(implementation)
        _check_draft_tokens(draft_tokens)
        if draft_tokens and model.mtp_params is None:
            raise RequestError(
                f"draft_tokens={draft_tokens} needs the MTP head, which was not loaded", hint="load(mtp=True)"
            )
        self.draft_tokens, self.prefix_bytes, self.invariant = draft_tokens, prefix_bytes, invariant
        self.model, self.numerics, self.tokenizer = model, numerics, tokenizer
        self.implementation = implementation
        self.max_len, self.max_batch = max_len or longest, max_batch
        self._engine: Engine | None = None
        self._warm = False

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        numerics: Numerics = OFFICIAL,
        implementation: str | None = None,
        mesh: Mesh | None = None,
        rules: Rules | str = DEFAULT_RULES,
        verify: Verify = "header",
        strict: bool = False,
        progress: bool = False,
        max_len: int | None = None,
        max_batch: int = 32,
        draft_tokens: int = 0,
        prefix_bytes: int = 0,
        invariant: bool = False,
    ) -> Self:
        """Loads a checkpoint in the official format, and its tokenizer.json if there is one.

        Raises:
          RequestError: there is no such implementation, or it cannot draft so many tokens. Nothing has been
            read then.
          MemoryPlanError: the parameters do not fit the device. None has been read then.
          DSV4Error: see `checkpoint.load.load` and `Tokenizer.from_pretrained`.
        """
        _check_implementation(implementation)
        _check_draft_tokens(draft_tokens)
        _check_room(Config.from_pretrained(folder), mesh, rules, mtp=draft_tokens > 0)
        model = load(
            folder,
            mtp=draft_tokens > 0,
            mesh=mesh,
            rules=rules,
            verify=verify,
            strict=strict,
            progress=progress,
        )
        has_text = Tokenizer.exists(folder)
        tokenizer = Tokenizer.from_pretrained(folder, model.config.vocab_size) if has_text else None
        return cls(
            model,
            numerics=numerics,
            implementation=implementation,
            tokenizer=tokenizer,
            max_len=max_len,
            max_batch=max_batch,
            draft_tokens=draft_tokens,
            prefix_bytes=prefix_bytes,
            invariant=invariant,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> list[GenerationOutput]:
        """Continues each prompt; what one gets depends on no other in its batch, but for rounding.

        With `invariant` it does not depend on them at all.

        Args:
          prompts: a text, a list of token ids, a conversation as a list of messages, or a list of these.
            Texts are raw: no chat template and no beginning-of-sentence token is added.
          sampling: for all prompts, or one for each.
          names: how an error speaks of each prompt; "prompt 0" and so on by default.

        Raises:
          RequestError: a prompt cannot be served, or their numbers differ. Nothing has run then.
        """
        prompts = [prompts] if _is_one(prompts) else list(prompts)  # type: ignore[arg-type]
        if not prompts:
            raise RequestError("prompts is empty: nothing to generate")
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        if len(sampling) != len(prompts):
            raise RequestError(f"{len(sampling)} sampling parameters for {len(prompts)} prompts")
        names = names or [f"prompt {number}" for number in range(len(prompts))]
        requests = [
            (self._token_ids(prompt, params, name), params)
            for prompt, params, name in zip(prompts, sampling, names, strict=True)
        ]
        found = dict(self._answers(requests))
        timings = next(reversed(found.values())).timings  # of the last, and so of the whole batch
        return [dataclasses.replace(found[place], timings=timings) for place in range(len(requests))]

    def each(
        self, requests: Sequence[tuple[list[int], SamplingParams]], room: tuple[int, int]
    ) -> Iterator[tuple[int, GenerationOutput]]:
        """Answers with the places of their requests, each as soon as it is there; for long runs.

        Args:
          requests: token ids as `encode` gives them, with their sampling parameters.
          room: slots and tokens in each, whatever is asked now. A request's bits are those of every other run
            with the same room, whichever requests share it.
        """
        slots, longest = room
        if self._engine is None or (self._engine.slots, self._engine.max_len) != room:
            self._engine = self._new_engine(slots, longest)
        return self._answers(requests)

    def encode(
        self, prompt: Prompt, sampling: SamplingParams, name: str = "prompt", **chat: Any
    ) -> list[int]:
        """Token ids of a prompt, if it can be served.

        Args:
          chat: what else `encode_chat` is to know of messages.

        Raises:
          RequestError: it cannot; the message begins with `name`.
        """
        return self._token_ids(prompt, sampling, name, **chat)

    def room_for(self, requests: Sequence[tuple[list[int], SamplingParams]]) -> tuple[int, int]:
        """Slots for these requests, up to `max_batch`, and tokens for the longest, as powers of two.

        All that there may be, if this `LLM` is `invariant` or has been warmed up.
        """
        if self.invariant or self._warm:
            return self._most
        longest = max(len(ids) + params.max_tokens for ids, params in requests)
        slots = min(_power_of_two(len(requests), 1), self.max_batch)
        return slots, min(_power_of_two(longest, SHORTEST_CACHE), self._most[1])

    def chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        tools: Messages = (),
        thinking: bool = False,
        effort: Effort = "auto",
    ) -> ChatOutput:
        """Answers a conversation; arguments as of `encode_chat`.

        Raises:
          RequestError: a message is not one, or the last is the assistant's and has no `"prefix": true`.
        """
        ids = self.encode_chat(messages, tools=tools, thinking=thinking, effort=effort)
        output = self.generate(ids, sampling)[0]
        assert self.tokenizer is not None
        answer = output.token_ids
        stage = None
        if messages[-1].get("prefix"):
            stage = "content" if messages[-1].get("content") else "reasoning"
        completion = parse_completion(self.tokenizer, answer, thinking=thinking, stage=stage)
        if output.stop_string is not None:
            content = completion.content.partition(output.stop_string)[0]
            completion = dataclasses.replace(completion, content=content)
        return ChatOutput(completion, output)

    def encode_chat(
        self, messages: Messages, *, tools: Messages = (), thinking: bool = False, effort: Effort = "auto"
    ) -> list[int]:
        """Token ids of a conversation that the model is to answer; see `chat.encode_chat`.

        Raises:
          RequestError: a message is not one, or the last is the assistant's and has no `"prefix": true`.
        """
        return self._chat_ids(messages, "messages", tools=tools, thinking=thinking, effort=effort)

    @property
    def release(self) -> Release:
        """Which of the released chat encoders the checkpoint came with."""
        return "later" if self.model.config.draft == "dspark" else "first"

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, name: str = "prompt"
    ) -> Generator[Event]:
        """Continues one prompt and gives each step's tokens as they come; the last event has a finish_reason.

        Whoever stops listening ends the request. Until then nothing else can be asked of this `LLM`; an
        `Engine` serves many at a time.

        Raises:
          RequestError: the prompt cannot be served. Nothing has run then.
        """
        sampling = sampling or SamplingParams()
        request = self._token_ids(prompt, sampling, name), sampling
        return (event for _, event in self._run([request]))

    def score(self, ids: str | Sequence[int], start: int = 1) -> list[float]:
        """Log-probabilities, in nats, of `ids[start:]`, each after all tokens before it.

        Tokens before `start` are read as a prompt, those after one at a time, by the very programs that
        generate. What `generate` reported for an answer is what this gives for it, bit for bit, if this `LLM`
        is `invariant`; else without drafts, at the same number of slots and room in the caches.

        Raises:
          RequestError: the tokens cannot be served, or nothing lies before or after `start`.
        """
        if isinstance(ids, str):
            ids = self._token_ids(ids, SamplingParams(max_tokens=1), "the text")
        if not 1 <= start < len(ids):
            raise RequestError(f"start must be in [1, {len(ids) - 1}] for {len(ids)} tokens, got {start}.")
        sampling = SamplingParams(max_tokens=len(ids) - start, temperature=0.0, ignore_eos=True)
        whole = check_prompt(
            ids, vocab_size=self.model.config.vocab_size, max_len=self.max_len, max_tokens=0, name="ids"
        )
        events = self._run([(whole[:start], sampling)], whole[start:])
        return [logprob for _, event in events for logprob in event.logprobs]

    def warm_up(self) -> None:
        """Makes room for `max_batch` requests of `max_len` tokens and compiles all that serving them needs.

        From then on no request waits for the compiler.

        Raises:
          MemoryPlanError: so much room there is not.
        """
        self._engine = self._new_engine(*self._most)
        self._engine.warm_up()
        self._warm = True

    def _answers(
        self, requests: Sequence[tuple[list[int], SamplingParams]]
    ) -> Iterator[tuple[int, GenerationOutput]]:
        """Each answer, with its request's place, as soon as it is there."""
        collected: dict[int, Collected] = collections.defaultdict(Collected)
        started, tokens = time.perf_counter(), 0
        with count_compiles() as compiles:

            def clock() -> float:  # stands still while something is compiled
                return time.perf_counter() - compiles.seconds

            for one, event in self._run(requests, clock=clock):
                found = collected[one.place]
                found.take(event, clock())
                tokens += len(event.token_ids)
                if event.finish_reason is not None:
                    del collected[one.place]
                    seconds = time.perf_counter() - started
                    timings = Timings(seconds, min(compiles.seconds, seconds), compiles.count, tokens)
                    yield one.place, self._output(requests[one.place], one, found, timings)

    def _run(
        self,
        requests: Sequence[tuple[list[int], SamplingParams]],
        forced: Sequence[int] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> Iterator[tuple["_Asked", Event]]:
        """The events of these requests, each with what was asked; `forced` as in `Engine.add`."""
        if self._engine is not None and self._engine.busy:
            raise RequestError("a stream is under way", hint="read it to its end or close it first")
        engine = self._engine_for(requests)
        waiting = collections.deque(enumerate(requests))
        asked: dict[int, _Asked] = {}  # those under way, by the engine's number
        try:
            while waiting or engine.busy:
                while waiting and len(asked) < engine.slots:
                    place, (ids, params) = waiting.popleft()
                    number = engine.add(ids, params, forced)
                    # A prompt with stop strings has been refused where there is no tokenizer.
                    stop = AnswerText(self.tokenizer, params.stop) if self.tokenizer and params.stop else None
                    asked[number] = _Asked(place, clock(), stop)
                for event in engine.step():
                    one = asked.get(event.request)
                    if one is None:
                        continue  # it has ended at a stop string
                    if one.stop and (count := until(one.stop, event.token_ids)) is not None:
                        if event.finish_reason is None:
                            engine.cancel(event.request)
                        event = ended(event, count)
                    if event.finish_reason is not None:
                        del asked[event.request]
                    yield one, event
        finally:
            if asked:  # interrupted, or nobody listens any more: its slots are in the middle of this
                self._engine = None
            else:
                collections.deque(engine.run(), maxlen=0)  # what the engine says of those that stopped

    def _engine_for(self, requests: Sequence[tuple[list[int], SamplingParams]]) -> Engine:
        """With a slot for each of these, up to `max_batch`, and room for the longest; kept for the next."""
        slots, longest = self.room_for(requests)
        if self._engine is None or self._engine.slots < slots or self._engine.max_len < longest:
            self._engine = self._new_engine(slots, longest)
        return self._engine

    @property
    def _most(self) -> tuple[int, int]:
        """Slots that there may be, and room in each."""
        return self.max_batch, max(self.max_len, SHORTEST_CACHE)

    def _new_engine(self, slots: int, max_len: int) -> Engine:
        self._engine = None  # frees its caches before there are new ones
        return Engine(
            self.model,
            numerics=self.numerics,
            slots=slots,
            max_len=max_len,
            draft_tokens=self.draft_tokens,
            implementation=self.implementation,
            prefix_bytes=self.prefix_bytes,
            invariant=self.invariant,
        )

    def _token_ids(self, prompt: Any, params: SamplingParams, name: str, **chat: Any) -> list[int]:
        if params.stop and self.tokenizer is None:
            raise RequestError(f"{name} has stop strings, and the checkpoint has no tokenizer.json")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    f"{name} is text, and the checkpoint has no tokenizer.json", hint="give token ids"
                )
            if not prompt:
                raise RequestError(f"{name} is empty", hint="give at least one character")
            if (fewest := self.tokenizer.fewest_tokens(prompt)) >= self.max_len:
                raise RequestError(
                    f"{name} has {fewest} tokens at least and leaves no room to answer within max_len"
                    f" {self.max_len}",
                    hint="shorten the prompt or raise max_len",
                )
            prompt = self.tokenizer.encode(prompt)
        elif _is_conversation(prompt):
            prompt = self._chat_ids(prompt, name, **chat)
        return check_prompt(
            prompt,
            vocab_size=self.model.config.vocab_size,
            max_len=self.max_len,
            max_tokens=params.max_tokens,
            name=name,
        )

    def _chat_ids(self, messages: Messages, where: str, **how: Any) -> list[int]:
        if self.tokenizer is None:
            raise RequestError(
                f"{where}: chat needs a tokenizer, and the checkpoint has no tokenizer.json",
                hint="take the tokenizer.json of the same checkpoint",
            )
        ids = encode_chat(self.tokenizer, messages, release=self.release, where=where, **how)
        if messages[-1]["role"] == "assistant" and not messages[-1].get("prefix"):
            raise RequestError(
                f"{where}: the last message is the assistant's, so there is nothing to answer",
                hint='"prefix": true lets the answer go on where it ends',
            )
        return ids

    def _output(
        self,
        request: tuple[list[int], SamplingParams],
        one: "_Asked",
        found: Collected,
        timings: Timings,
    ) -> GenerationOutput:
        prompt, params = request
        assert found.finish_reason is not None
        at_eos = found.finish_reason == "stop" and found.token_ids[-1] == self.model.config.eos_token_id
        text = None
        if self.tokenizer:
            read = AnswerText(self.tokenizer, params.stop)
            text = read.put(found.token_ids[:-1] if at_eos else found.token_ids) + read.end()
        return GenerationOutput(
            prompt_token_ids=prompt,
            token_ids=found.token_ids,
            text=text,
            logprobs=found.logprobs if params.logprobs else None,
            logprob_sum=float(sum(found.logprobs)),
            finish_reason=found.finish_reason,
            stop_string=one.stop.found if one.stop else None,
            accepted_at=tuple(sum(n > place for n in found.stood) for place in range(self.draft_tokens)),
            draft_steps=len(found.stood),
            first_token_seconds=found.first_at - one.started,
            seconds=found.last_at - one.started,
            timings=timings,
        )


class _Asked(NamedTuple):
    """A request under way."""

    place: int
    started: float  # when it was given to the engine, which has a slot for it
    stop: AnswerText | None  # what it has said so far, if that may end it


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)


def _check_implementation(implementation: str | None) -> None:
    try:
        parse_choice(implementation)
    except (ValueError, NotImplementedError) as error:
        raise RequestError(str(error)) from None


def _check_room(config: Config, mesh: Mesh | None, rules: Rules | str, *, mtp: bool) -> None:
    """Refuses parameters that do not fit a device, in the formats that the released checkpoints have."""
    needed, free = 0, free_bytes()
    if mesh is not None:
        check_mesh(config, mesh.shape, find_rules(rules))
    for parameter in parameters(config, mtp=mtp):
        leaves = jax.tree.leaves(parameter.value)
        shapes = [leaf.shape for leaf in leaves]
        if mesh is not None:
            places = placements(config, mesh, find_rules(rules), parameter.axes, parameter.value)
            found = jax.tree.leaves(places, is_leaf=lambda each: isinstance(each, Placement))
            shapes = [place.sharding.shard_shape(place.shape) for place in found]
        pairs = zip(leaves, shapes, strict=True)
        needed += sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in pairs)
    if free is not None and needed > free:
        raise MemoryPlanError(
            f"parameters take {needed / 2**30:.2f} GiB of each device, {free / 2**30:.2f} GiB are free",
            hint="spread them over a mesh of more devices",
        )


def _check_draft_tokens(draft_tokens: int) -> None:
    if not 0 <= draft_tokens <= MOST_DRAFTS:
        raise RequestError(f"draft_tokens must be in [0, {MOST_DRAFTS}], got {draft_tokens}.")


def _is_one(prompts: Any) -> bool:
    """Whether this is a single prompt, a text or token ids, and not a list of prompts."""
    if isinstance(prompts, str):
        return True
    return len(prompts) > 0 and not isinstance(prompts[0], str | list | tuple | np.ndarray)


def _power_of_two(number: int, least: int) -> int:
    """The smallest power of two times `least` that is not below `number`."""
    size = least
    while size < number:
        size *= 2
    return size
