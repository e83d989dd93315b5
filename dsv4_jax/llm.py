"""Text or token ids in, text and token ids out: the model with its tokenizer and its batches."""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsv4_jax.checkpoint.load import LoadedModel, Verify, load
from dsv4_jax.compiles import count_compiles
from dsv4_jax.decode import Requests
from dsv4_jax.errors import RequestError
from dsv4_jax.generate import generate
from dsv4_jax.numerics import OFFICIAL, Numerics
from dsv4_jax.prompts import check_prompt
from dsv4_jax.sampling import SamplingArrays, SamplingParams
from dsv4_jax.tokenizer import Tokenizer
from pallas_kernels.dispatch import choose, parse_choice

# Shapes are rounded up to powers of two from these on, so that few programs serve all requests.
SHORTEST_PROMPT = 64
FEWEST_NEW = 32
SHORTEST_CACHE = 128
MOST_DRAFTS = 4  # of one step: the head, trained for one, guesses worse with each

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Timings:
    """How long a batch took; all of its requests share one of these.

    Attributes:
      seconds: from the first prompt in to the last token out.
      compile_seconds: of these, spent on tracing and compiling.
      compiles: programs compiled.
      tokens: generated in the whole batch.
    """

    seconds: float
    compile_seconds: float
    compiles: int
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch, prefill included and compiling left out."""
        return self.tokens / max(self.seconds - self.compile_seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class GenerationOutput:
    """The answer to one prompt.

    Attributes:
      prompt_token_ids: the prompt as the model read it.
      token_ids: the answer, with the EOS that ended it.
      text: the answer as text, without EOS; None if the folder has no tokenizer.
      logprobs: of each token of the answer under the model; None if not asked for.
      logprob_sum: of the whole answer.
      finish_reason: "stop" at an EOS, "length" at max_tokens, "error" where logits were not finite.
      drafted: tokens that the MTP head drafted for it.
      accepted: tokens of the answer that were such drafts.
      timings: of the batch it was in.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    logprobs: list[float] | None
    logprob_sum: float
    finish_reason: Literal["stop", "length", "error"]
    drafted: int
    accepted: int
    timings: Timings


class LLM:
    """A loaded model, ready to answer.

    Attributes:
      model: parameters and config.
      numerics: the arithmetic it runs in.
      implementation: of its ops, as `pallas_kernels.dispatch.parse_choice` reads it; None: the fastest.
      tokenizer: None if the checkpoint folder has none; prompts are then token ids.
      max_len: tokens that a prompt and its answer may have together.
      max_batch: prompts that run together; more are answered in turns.
      draft_tokens: tokens that the MTP head drafts for each step; 0 for none.
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
    ):
        longest = model.config.max_position_embeddings
        if max_len is not None and not 1 <= max_len <= longest:
            raise RequestError(f"max_len must be in [1, {longest}] (max_position_embeddings), got {max_len}.")
        if max_batch < 1:
            raise RequestError(f"max_batch must be at least 1, got {max_batch}.")
        _check_implementation(implementation)
        _check_draft_tokens(draft_tokens)
        if draft_tokens and model.mtp_params is None:
            raise RequestError(
                f"draft_tokens={draft_tokens} needs the MTP head, which was not loaded", hint="load(mtp=True)"
            )
        self.draft_tokens = draft_tokens
        self.model, self.numerics, self.tokenizer = model, numerics, tokenizer
        self.implementation = implementation
        self.max_len, self.max_batch = max_len or longest, max_batch

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        numerics: Numerics = OFFICIAL,
        implementation: str | None = None,
        mesh: Mesh | None = None,
        verify: Verify = "header",
        strict: bool = False,
        progress: bool = False,
        max_len: int | None = None,
        max_batch: int = 32,
        draft_tokens: int = 0,
    ) -> Self:
        """Loads a checkpoint in the official format, and its tokenizer.json if there is one.

        Raises:
          RequestError: there is no such implementation, or it cannot draft so many tokens. Nothing has been
            read then.
          DSV4Error: see `checkpoint.load.load` and `Tokenizer.from_pretrained`.
        """
        _check_implementation(implementation)
        _check_draft_tokens(draft_tokens)
        model = load(folder, mtp=draft_tokens > 0, mesh=mesh, verify=verify, strict=strict, progress=progress)
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
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> list[GenerationOutput]:
        """Continues each prompt; what one gets depends on no other in its batch but for rounding.

        Args:
          prompts: a text, a list of token ids, or a list of either. Texts are raw: no chat template and no
            beginning-of-sentence token is added.
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
        outputs: list[GenerationOutput] = []
        for start in range(0, len(requests), self.max_batch):
            outputs += self._run(requests[start : start + self.max_batch])
        return outputs

    def _token_ids(self, prompt: Any, params: SamplingParams, name: str) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    f"{name} is text, and the checkpoint has no tokenizer.json", hint="give token ids"
                )
            prompt = self.tokenizer.encode(prompt)
        return check_prompt(
            prompt,
            vocab_size=self.model.config.vocab_size,
            max_len=self.max_len,
            max_tokens=params.max_tokens,
            name=name,
        )

    def _run(self, requests: list[tuple[list[int], SamplingParams]]) -> list[GenerationOutput]:
        """One batch, padded up to a shape that other batches share."""
        idle = ([0], SamplingParams(temperature=0.0))
        rows = requests + [idle] * (_power_of_two(len(requests), 1) - len(requests))
        length = np.array([len(ids) for ids, _ in rows], np.int32)
        max_tokens = np.array(
            [params.max_tokens for _, params in requests] + [0] * (len(rows) - len(requests))
        )
        ids = np.zeros((len(rows), _power_of_two(int(length.max()), SHORTEST_PROMPT)), np.int32)
        for row, (prompt, _) in enumerate(rows):
            ids[row, : len(prompt)] = prompt

        model = self.model
        started = time.perf_counter()
        with (
            count_compiles() as compiles,
            jax.set_mesh(model.mesh) if model.mesh else nullcontext(),
            choose(self.implementation),
        ):
            written = generate(
                model.config,
                self.numerics,
                model.params,
                jnp.asarray(ids),
                jnp.asarray(length),
                Requests(
                    SamplingArrays.stack([params for _, params in rows]),
                    jnp.asarray(max_tokens, jnp.int32),
                    jnp.asarray([not params.ignore_eos for _, params in rows]),
                ),
                mtp_params=model.mtp_params if self.draft_tokens else None,
                draft_tokens=self.draft_tokens,
                max_new=_power_of_two(int(max_tokens.max()), FEWEST_NEW),
                max_len=_power_of_two(int((length + max_tokens).max()), SHORTEST_CACHE),
            )
            written = jax.device_get(written)
        seconds = time.perf_counter() - started
        tokens = int(written.count[: len(requests)].sum())
        timings = Timings(seconds, min(compiles.seconds, seconds), compiles.count, tokens)
        return [self._output(request, written, row, timings) for row, request in enumerate(requests)]

    def _output(
        self, request: tuple[list[int], SamplingParams], written: Any, row: int, timings: Timings
    ) -> GenerationOutput:
        prompt, params = request
        count = int(written.count[row])
        tokens, logprobs = written.tokens[row, :count].tolist(), written.logprobs[row, :count].tolist()
        reason = "error" if written.not_finite[row] else "stop" if written.stopped[row] else "length"
        shown = tokens[:-1] if reason == "stop" else tokens
        return GenerationOutput(
            prompt_token_ids=prompt,
            token_ids=tokens,
            text=self.tokenizer.decode(shown) if self.tokenizer else None,
            logprobs=logprobs if params.logprobs else None,
            logprob_sum=float(sum(logprobs)),
            finish_reason=reason,
            drafted=int(written.drafted[row]),
            accepted=int(written.accepted[row]),
            timings=timings,
        )


def _check_implementation(implementation: str | None) -> None:
    try:
        parse_choice(implementation)
    except (ValueError, NotImplementedError) as error:
        raise RequestError(str(error)) from None


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
