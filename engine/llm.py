"""The engine as a Python object: load a model once, answer any number of requests."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch

from engine.costs import PassCosts
from engine.generate import generate, prompt_feature
from engine.grammar_state import GrammarState
from engine.kv_cache import SlotPool
from engine.loading import Loaded, assemble, choose_device, choose_forms, choose_pool, load
from engine.order import Score, first_come
from engine.params import SamplingParams, Speculative
from engine.prepare import check_speculative, kept
from engine.request import Prompt, check_logprobs, choose_end_ids, encode_prompt
from engine.routing import check_router, make_router
from engine.scheduler import Scheduler
from engine.sequence import OnPrompt, RunningSequence, TokenStream
from engine.stream import TextStream
from engine.types import RequestOutput, TokenEvent
from models.chat_encoding import ChatEncoder
from models.llama import Llama
from models.plan import DraftPlan
from models.quantise import int8_bytes, matrices
from models.tokenizer import Tokenizer
from models.tool_calls import tool_style
from router.library import RouterLibrary
from router.route import Router

Messages = Sequence[Mapping[str, Any]]
MAX_SEED = 2**63 - 1


class LLM:
    """One model, its KV cache, and the requests that run on it.

    model: a directory, a `.gguf` file or a hub id; None is the default model.
    device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
    dtype: "auto" (bfloat16 on CUDA), "float32", "float16" or "bfloat16", to which matrices are
        converted. Activations are of it, too, on CUDA, and on a CPU always float32.
    weights: "stored" keeps matrices as the file stores them where that is a dtype of these: 16-bit
        ones are widened as they are read, so the tokens are those of "float" from half the bytes.
        "float" converts them to `dtype`, of which "auto" is float32 on a CPU. "auto" is "stored" on
        a CPU where no dtype is named, else "float".
    activations: in products with quantised weights "int16" rounds them to 16 bits, 32 to a scale,
        "int8" to 8 bits, as llama.cpp does, and "float" not at all, which gives the tokens of the
        same weights in float32. "auto" is "int16". With other weights they stay floats.
    kv_dtype: of keys and values in the cache, on a CPU: "float32", or "float16", which takes half
        the memory and half the reading. "auto" rounds them to "float16" where it rounds activations
        too, beside quantised weights; else, and always on CUDA, they are of the activations' dtype.
    max_sequences: how many requests can hold a slot of the cache at once.
    cache_tokens: how many tokens all slots together may hold in memory, remembered prefixes
        included; None is as many as the slots are long. On a CPU only: CUDA's slots have their
        memory from the start.
    max_length: tokens of context of each; None is the model's own, at most 8192.
    threads: on a CPU, the caller's one among them; None is one for each core that this process may
        use, by its affinity and its container's quota. No token depends on it.
    seed: makes the seeds of requests that name none reproducible.
    speculative: how to draft: "auto" (what the router picks for the prompt; without a router, int8
        copies of the weights and n-grams of the text, whichever pays at the moment), "off",
        "ngram", "int8", a DraftPlan, the file of one, or a tuple of plans of which the one that
        pays is used: (plan, NGRAM) is a plan beside n-grams. The tokens of an answer are the same
        whatever is chosen. "auto" and "int8" need memory for a second copy of the weights, a byte
        an element; "ngram" and "off" do not.
    router: the library by which "auto" picks plans: a file of `python -m engine.calibrate`, or
        "none". None is the library that comes with the engine, where there is one for the model.
    profile: measure what passes cost on this machine, once, in about a second (longer where a
        single pass takes that long); False estimates.
    on_progress: called with (bytes done, bytes in all) while weights load, and once more after each
        later step of the start, with all done. What it raises ends the start.

    Raises ValueError, in one line, for whatever is wrong with an argument or the model. Threads may
    share one LLM; a request that finds every slot held by others raises RuntimeError. `close()`, or
    leaving a `with` block, ends its threads.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        weights: str = "auto",
        activations: str = "auto",
        kv_dtype: str = "auto",
        max_sequences: int = 1,
        cache_tokens: int | None = None,
        max_length: int | None = None,
        threads: int | None = None,
        seed: int | None = None,
        speculative: Speculative = "auto",
        router: str | os.PathLike[str] | None = None,
        profile: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ):
        check_speculative(speculative)
        check_router(router)
        torch_device = choose_device(device)
        forms = choose_forms(dtype, torch_device, weights, activations, kv_dtype)
        pool = choose_pool(threads)
        num_bytes = 0

        def on_bytes(done: int, total: int) -> None:
            nonlocal num_bytes
            num_bytes = total
            if on_progress is not None:
                on_progress(done, total)

        loaded = load(model, revision, torch_device, forms, max_length, on_bytes, pool)
        self._start(
            loaded, (max_sequences, cache_tokens), seed, speculative, router, profile,
            after_step=lambda: on_bytes(num_bytes, num_bytes),
        )  # fmt: skip

    @classmethod
    def from_loaded(
        cls,
        loaded: Loaded,
        *,
        max_sequences: int = 1,
        cache_tokens: int | None = None,
        seed: int | None = None,
        speculative: Speculative = "auto",
        router: str | os.PathLike[str] | None = None,
        profile: bool = True,
    ) -> LLM:
        """An engine around a model that is in memory already."""
        check_router(router)
        llm = cls.__new__(cls)
        llm._start(loaded, (max_sequences, cache_tokens), seed, speculative, router, profile)
        return llm

    def _start(
        self,
        loaded: Loaded,
        room: tuple[int, int | None],
        seed: int | None,
        speculative: Speculative,
        router: str | os.PathLike[str] | None,
        profile: bool,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        model = loaded.model
        self.model_name = loaded.name
        self.generation = loaded.generation
        self.device = str(model.device)
        names = set().union(*(weight.own.names for weight in matrices(model.weights)))
        if model.kv_dtype != model.dtype:
            names.add(f"{model.kv_dtype} cache".removeprefix("torch."))
        self.dtype = "+".join(sorted(names))
        self.max_length = model.num_positions
        self._tokenizer = loaded.tokenizer
        template = loaded.chat_template
        self._chat = None if template is None else ChatEncoder(template, loaded.tokenizer)
        self._seeds = random.Random(seed)
        parts = assemble(model, *room, router, profile, after_step)
        self._cache, self._pool, self._passes, self._preparer, self._router = parts
        plans, _ = self._choose_plans(speculative)
        after_step()
        if model.device.type == "cuda":
            with torch.inference_mode():
                self._passes.warm_up(self._router)
        self._speculative = kept(speculative, plans)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Answer prompts (strings or token-id lists), decoding up to max_sequences together."""
        if not isinstance(prompts, Sequence):
            raise ValueError(f"prompts: got {prompts!r}, expected a prompt or a list of prompts")
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        batch: Sequence[Prompt] = [prompts] if single else prompts  # type: ignore[assignment, list-item]
        sequences = [self.sequence(prompt, params) for prompt in batch]
        for _ in self._generate(sequences):
            pass
        return [sequence.output() for sequence in sequences]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        on_prompt: OnPrompt | None = None,
    ) -> TokenStream:
        """Yield the answer token by token. Closing the stream ends the request.

        on_prompt: called with (tokens read, tokens in all) after each 512 tokens of the prompt that
        were not in the cache, and after the last. The first event raises what it raises, and the
        request is over. Other requests of the engine wait for it, so it must not wait for them.
        Wrong arguments raise ValueError here, not at the first event.
        """
        sequence = self.sequence(prompt, params, on_prompt)
        return TokenStream(sequence, self._generate([sequence]))

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        tools: Messages | None = None,
    ) -> RequestOutput:
        """Answer a conversation of {"role": ..., "content": ...} messages, with tools on offer.

        What the cache holds of the conversation is not computed again.
        """
        return self.generate([self.encode_chat(messages, tools)], params)[0]

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        on_prompt: OnPrompt | None = None,
        tools: Messages | None = None,
    ) -> TokenStream:
        """Yield the answer to a conversation token by token, as `stream` does."""
        return self.stream(self.encode_chat(messages, tools), params, on_prompt)

    def encode_chat(
        self, messages: Messages, tools: Messages | None = None, special_tokens: bool = False
    ) -> list[int]:
        """The conversation as the model's chat template writes it, in token ids.

        tools: what the model may call, as definitions of OpenAI's API.
        special_tokens: whether such tokens may be spelled out in messages and tools; else they are
            ordinary text there, and nobody but the template writes them.

        Raises ValueError for a model without a template, one that cannot be used or writes no
        tools, or messages that it refuses.
        """
        if self._chat is None:
            raise ValueError(
                f"{self.model_name} has no chat template; use generate() with a plain prompt"
            )
        return self._chat.encode(messages, tools, special_tokens=special_tokens)

    @property
    def tool_style(self) -> str | None:
        """How the chat template has the model write calls of tools, for `parse_tool_calls`.

        None where there is no template, it takes no tools, or its way is not known.
        """
        try:
            template = None if self._chat is None else self._chat.template
            return tool_style(template.text) if template and template.takes_tools else None
        except ValueError:  # a template that cannot be used; it says so when it is
            return None

    def feature(self, prompt: Prompt) -> torch.Tensor:
        """What a router compares of a prompt: a unit vector [C] float32, on the CPU.

        Raises RuntimeError when other requests hold every slot of the cache.
        """
        params = SamplingParams(max_tokens=1, speculative="off")
        sequence = self.sequence(prompt, params)
        return prompt_feature(self._passes, self._pool, sequence)

    @property
    def router(self) -> Router | None:
        """What picks the plans of "auto" requests, if anything does."""
        return self._router

    def use_library(self, library: RouterLibrary | None) -> None:
        """Let this library pick the plans of "auto" requests from now on; None is without one.

        Raises ValueError for a library of another model.
        """
        self._router = None if library is None else make_router(library, self.model)

    def close(self) -> None:
        """End the engine's threads, after the pass under way. Requests raise RuntimeError then."""
        self._passes.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def threads(self) -> int:
        """That compute: on a CPU as `LLM(threads=...)` says, on CUDA 0."""
        pool = self.model.decode_ops.pool
        return 0 if pool is None else pool.num_threads

    @property
    def model(self) -> Llama:
        """The model; with its int8 form from the moment that a plan needs one."""
        return self._passes.drafter

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's, for the text of single tokens and the like."""
        return self._tokenizer

    @property
    def speculative(self) -> Speculative:
        """How requests draft that do not say it themselves."""
        return self._speculative

    @property
    def costs(self) -> PassCosts:
        """What passes cost here, in plain decode steps, as the draft lengths go by."""
        return self._preparer.costs

    @property
    def int8_bytes(self) -> int:
        """Memory that drafting in 8 bits takes beside the weights; 0 while no plan needed it."""
        return int8_bytes(self.model.weights)

    @property
    def slots(self) -> SlotPool:
        """The slots of the cache, and what they hold."""
        return self._pool

    @property
    def max_sequences(self) -> int:
        """How many requests can hold a slot of the cache at once."""
        return self._cache.states.shape[0]

    def scheduler(
        self,
        score: Score = first_come,
        chunk_tokens: int | None = None,
        is_shared: bool = False,
    ) -> Scheduler:
        """A new batch of requests on this engine; see `Scheduler`."""
        return Scheduler(
            self._passes, self._pool, lambda: self.costs, score, chunk_tokens, is_shared
        )

    def let_others_in(self) -> None:
        """For a thread that steps a scheduler without a pause: other threads may have a turn."""
        self._passes.let_others_in()

    def _generate(
        self, sequences: Sequence[RunningSequence]
    ) -> Generator[tuple[RunningSequence, TokenEvent], None, None]:
        return generate(self.scheduler(), sequences)

    def sequence(
        self, prompt: Prompt, params: SamplingParams | None, on_prompt: OnPrompt | None = None
    ) -> RunningSequence:
        """A request that was found to be in order; see `LLM` for what is raised else."""
        self._passes.check_open()
        config, tokenizer = self.model.config, self._tokenizer
        token_ids = encode_prompt(prompt, tokenizer, config.vocab_size, self.max_length)
        params = (params or SamplingParams()).with_defaults(self.generation)
        end_ids = choose_end_ids(params, config)
        check_logprobs(params.logprobs, config.vocab_size)
        grammar = None
        if params.grammar is not None:
            grammar = GrammarState(params.grammar, tokenizer, config.vocab_size, end_ids)
        seed = self._seeds.randint(0, MAX_SEED) if params.seed is None else params.seed
        wanted = params.speculative
        plans, router = self._choose_plans(self._speculative if wanted is None else wanted)
        text = TextStream(
            tokenizer, params.stop or (), min_tokens=params.min_tokens, prompt=token_ids,
            is_exact=grammar is not None,
        )  # fmt: skip
        return RunningSequence(
            token_ids, params, seed, text, end_ids, self.max_length, plans, router, on_prompt,
            grammar,
        )  # fmt: skip

    def _choose_plans(
        self, speculative: Speculative
    ) -> tuple[tuple[DraftPlan, ...], Router | None]:
        """The plans of a request, or the router that will choose them; what they need is made."""
        if speculative == "auto" and self._router is not None:
            self._preparer.prepare(self._router.used_plans)
            return (), self._router
        return self._preparer.prepare(speculative), None
