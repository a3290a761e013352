"""What a caller may ask of one request, checked at the border."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any, NamedTuple

from engine.grammar import Grammar
from models.messages import quoted
from models.plan import DraftPlan

Speculative = str | PathLike[str] | DraftPlan | tuple[DraftPlan, ...]
MAX_STOPS = 16
MAX_END_IDS = 128  # end-of-sequence and stop tokens of a request
MIN_TEMPERATURE = 1e-5  # below, logits / temperature leaves float32's range
MAX_LOGPROBS = 20
MAX_FLOAT = 1e38
# What the chat can be told, by flag and by /set: numbers, or None for the default.
INTEGERS = ("max_tokens", "top_k", "seed")
FLOATS = (
    "temperature", "top_p", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


class Sampling(NamedTuple):
    """How one sequence draws: what a row of kernels.round.sample.SampleParams holds, in its order.

    end_ids has MAX_END_IDS places, the last ones -1, or is -1 for none. The defaults are greedy.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    end_ids: int | array[int] = -1
    min_position: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def is_penalised(self) -> bool:
        """Whether it matters which tokens the sequence has already."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters under vLLM's names.

    temperature, top_p, top_k, min_p and the penalties left at None take the model's
    `generation_config.json`, and where that is silent 1.0, 1.0, 0, 0.0 and no penalty. A token is
    drawn from softmax(logits / temperature) restricted by top-k, then top-p, then min-p; penalties
    change the logits before that (kernels/round/penalties.py).

    max_tokens: tokens to generate at most; None runs to the end of the context.
    temperature: 0 is greedy decoding, and so is anything below 1e-5.
    top_p: in (0, 1]; 1 is off. top_k: 0 or -1 is off. min_p: in [0, 1]; 0 is off.
    seed: the same seed gives the same text; None draws one from the engine's generator.
    stop: strings that end the answer, cut from it; one that is written like a special token ends it
        where that token comes. stop_token_ids: tokens that end it.
    ignore_eos: go on past the end-of-sequence token.
    min_tokens: before so many tokens neither end-of-sequence nor `stop_token_ids` are drawn, and a
        stop string that is complete by then does not end the answer.
    logprobs: report the log-probabilities of so many top tokens beside the chosen one, under the
        model itself: without penalties, temperature and filters.
    repetition_penalty: in (0, 2], on tokens of prompt and answer; 1 is off, more discourages them.
    presence_penalty, frequency_penalty: in [-2, 2], on tokens of the answer, once or as often as
        they are there; 0 is off, more discourages them.
    speculative: how to draft, as `LLM` takes it; None is what the LLM was made with. It changes
        the speed of an answer and never its tokens.
    grammar: what the answer must be, see `Grammar`; None is anything.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    speculative: Speculative | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", ids)
        _check_int("max_tokens", self.max_tokens, 1, None)
        _check_float("temperature", self.temperature, 0.0, None)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 2.0, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_int("seed", self.seed, 0, 2**63 - 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(
                f"stop: got {quoted(stop)}, expected at most {MAX_STOPS} non-empty strings"
            )
        for token_id in ids:
            _check_int("stop_token_ids", token_id, 0, None)
        if self.speculative is not None and not is_speculative(self.speculative):
            raise ValueError(
                f"speculative: got {quoted(self.speculative)}, expected a name, a DraftPlan or a "
                "path"
            )
        if not isinstance(self.grammar, Grammar | None):
            raise ValueError(
                f"grammar: got {quoted(self.grammar)}, expected a Grammar, as Grammar.json_object()"
            )
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos: got {quoted(self.ignore_eos)}, expected True or False")
        if self.temperature is not None and self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from names and values; raises ValueError for a name that is not a parameter."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"unknown sampling parameter {', '.join(map(repr, unknown))}; "
                f"expected some of: {', '.join(known)}"
            )
        return cls(**values)

    def with_defaults(self, generation: Mapping[str, Any]) -> SamplingParams:
        """Fill what is None from a generation_config.json mapping, then from the neutral values.

        A configuration that says `do_sample: false` asks for greedy decoding; its penalties hold.
        """
        neutral = {
            "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        }  # fmt: skip
        if generation.get("do_sample") is False:
            penalties = {name: generation[name] for name in generation if name.endswith("penalty")}
            generation = {"temperature": 0.0, **penalties}
        chosen: dict[str, Any] = {
            name: generation[name] if generation.get(name) is not None else default
            for name, default in neutral.items()
            if getattr(self, name) is None
        }
        return replace(self, **chosen)

    def sampling(self, seed: int, end_ids: Collection[int], min_position: int) -> Sampling:
        """What the sampler is told, once defaults are filled in."""
        padded = array("i", [*sorted(end_ids), *[-1] * (MAX_END_IDS - len(end_ids))])
        values: tuple[Any, ...] = (
            self.temperature, self.top_k, self.top_p, self.min_p, seed, padded, min_position,
            self.repetition_penalty, self.presence_penalty, self.frequency_penalty,
        )  # fmt: skip
        assert None not in values, self
        return Sampling._make(values)


def is_speculative(value: object) -> bool:
    """Whether the value has the type of a name, a file, a plan, or several plans."""
    plans = value if isinstance(value, tuple) else ()
    return isinstance(value, (str, PathLike, DraftPlan, tuple)) and all(
        isinstance(plan, DraftPlan) for plan in plans
    )


def _as_tuple(name: str, values: object) -> tuple[Any, ...]:
    """A list or tuple as a tuple; None, which is vLLM's default, as an empty one."""
    if values is None:
        return ()
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name}: got {quoted(values)}, expected a list")
    return tuple(values)


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: got {quoted(value)}, expected an integer")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: got {quoted(value)}, expected {_range(low, high)}")


def _check_float(
    name: str, value: object, low: float, high: float | None, *, open_low: bool = False
) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: got {quoted(value)}, expected a number")
    if not -MAX_FLOAT < value < MAX_FLOAT:
        raise ValueError(f"{name}: got {quoted(value)}, expected a finite number")
    if value < low or (open_low and value == low) or (high is not None and value > high):
        raise ValueError(f"{name}: got {quoted(value)}, expected {_range(low, high, open_low)}")


def _range(low: float, high: float | None, open_low: bool = False) -> str:
    least = f"more than {low}" if open_low else f"at least {low}"
    return least if high is None else f"{least} and at most {high}"
