"""An engine's passes and rounds over random weights, ready to be timed, and whether they may be.

Three checks come before the clock:

    rows     a token's logits, and the keys, values and state that its pass leaves, have the same
             bits alone and among 2, 8 or 16 rows
    replay   a pass that runs through a graph leaves the bits of its eager twin
    draft    what is drafted with everything at full precision is what the verification makes

Each check looks at the last positions of a context, whose earlier part is in the cache. What a pass
must write holds NaN before, so neither a value that was left unwritten nor one read too early
passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch

from bench.report import CheckError
from bench.shapes import kv_bytes, random_tokens, skip_plan, textless
from engine.controller import PLAIN, Choice
from engine.graphs import run_eagerly
from engine.kv_cache import KVCache, make_kv_cache
from engine.loading import choose_forms, choose_ops
from engine.params import SamplingParams
from engine.passes import Passes, Runner
from engine.round import run_round
from engine.round_buffers import MAX_WIDTH, RoundRow
from engine.sequence import RunningSequence
from engine.stream import TextStream
from models.config import LlamaConfig
from models.llama import Llama, make_llama
from models.plan import FULL, INT8, MAX_DRAFT, SKIP, DraftPlan
from models.quantise import int8_bytes
from models.weights import random_weights, sublayer_bytes

SKIPPED = (0.0, 0.25, 0.5, 0.75)  # shares of the weight bytes that draft steps leave out
WIDTHS = (1, 2, 8, 16)  # tokens of a verify pass that is checked
NUM_CHECKED = 4  # draft steps that are replayed
VERIFIED = (2, 4, 8, 16)  # rows of the verify passes beside plain decoding's one
NUM_DRAFTED = 4  # tokens of the speculative round
REPLAYS = 5

Action = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """What is timed: the passes of one sequence, over a cache of random numbers.

    model: as it verifies, without int8 forms; int8_model: the same with them. twin: the same
    passes without graphs. token_ids: random, as many as the cache has positions. sizes: bytes of
    the 2L sub-layers and of the LM head.
    """

    model: Llama
    int8_model: Llama
    passes: Passes
    twin: Passes
    token_ids: Sequence[int]
    sizes: Sequence[int]

    @property
    def cache(self) -> KVCache:
        return self.passes.cache

    @property
    def int8_plan(self) -> DraftPlan:
        return DraftPlan.int8(self.model.config.num_layers)

    @property
    def plans(self) -> Mapping[DraftPlan, Llama]:
        """What is drafted with, and the model that runs it."""
        plans = {skip_plan(self.sizes, share): self.model for share in SKIPPED}
        return plans | {self.int8_plan: self.int8_model}

    def read_bytes(self, context: int) -> int:
        """Bytes of the matrices, keys and values that plain decoding reads for a token."""
        return sum(self.sizes) + context * kv_bytes(self.model.config, self.model.kv_dtype)

    def kept(self, plan: DraftPlan, context: int) -> float:
        """What a draft step reads of `read_bytes`, as a share; 8-bit plans leave K and V alone."""
        int8 = int8_bytes(self.int8_model.weights) / sum(self.sizes)
        shares = {SKIP: 0.0, INT8: int8, FULL: 1.0}
        precisions = zip((*plan.sublayers, plan.head_precision), self.sizes, strict=True)
        matrices = sum(shares[p] * size for p, size in precisions)
        attending = [how != SKIP for how in plan.sublayers[::2]]
        past = self.read_bytes(context) - sum(self.sizes)
        return (matrices + past * sum(attending) / len(attending)) / self.read_bytes(context)

    def fill_cache(self) -> None:
        """Numbers like real ones in every position."""
        for part in self.cache:
            part.normal_()


def random_model(config: LlamaConfig, num_positions: int, device: torch.device) -> Llama:
    """A model of random weights, in the dtype and with the operations of the engine there."""
    dtype = choose_forms("auto", device).dtype
    weights = random_weights(config, seed=0, device=device, dtype=dtype)
    return make_llama(config, weights, num_positions, *choose_ops(device))


def make_subject(
    model: Llama, int8_model: Llama, max_context: int, run: Runner | None = None
) -> Subject:
    """The subject around two forms of a model. run: how its passes run, as `Passes` takes it."""
    assert max_context <= model.num_positions, (max_context, model.num_positions)
    # No sequence reaches the last position: it is for what pads a pass.
    cache = make_kv_cache(model, 1, max_context + 1)
    passes, twin = Passes(model, cache, 1, run), Passes(model, cache, 1, run_eagerly)
    token_ids = random_tokens(model.config, max_context, seed=0)
    sizes = sublayer_bytes(model.weights)
    subject = Subject(model, int8_model, passes, twin, token_ids, sizes)
    subject.fill_cache()
    return subject


class Arm(NamedTuple):
    """A pass or a round. set_up: before a turn. reset: before every run, not timed."""

    set_up: Action
    reset: Action
    run: Action
    is_round: bool = False


def event_timer(reset: Action, run: Action, count: int) -> list[float]:
    """Seconds as the device sees them, between CUDA events around each of `count` runs.

    reset: before every run, not timed. All runs are queued before the first ends.
    """
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(count)]
    reset()
    run()  # warms up, and keeps the device busy while the others are queued
    for before, after in events:
        reset()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def wall_timer(reset: Action, run: Action, count: int) -> list[float]:
    """Seconds as a caller sees them, of runs at whose end the host knows their result."""
    seconds = []
    reset()
    run()
    for _ in range(count):
        reset()
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds


def device_timer(device: torch.device) -> Callable[[Action, Action, int], list[float]]:
    return event_timer if device.type == "cuda" else wall_timer


def nothing() -> None:
    pass


def verify_arm(subject: Subject, context: int, width: int) -> Arm:
    """A pass of the model itself over the last `width` tokens; one is plain decoding."""
    passes, tokens = subject.passes, subject.token_ids[context - width : context]
    return Arm(
        lambda: passes.stage([RoundRow(tokens, context - width)]),
        nothing,
        lambda: passes.verify(1, width),
    )


def draft_arm(subject: Subject, context: int, plan: DraftPlan) -> Arm:
    """A draft step whose token is the last one of the context."""
    passes, newest = subject.passes, subject.token_ids[context - 1 : context]

    def set_up() -> None:
        passes.drafter = subject.plans[plan]
        passes.stage([RoundRow(newest, context - 1, num_wanted=1)])
        passes.set_plan(0, plan)

    # A step counts its token, and the next one would find that it has enough.
    return Arm(set_up, passes.buffers.num_drafted.zero_, lambda: passes.draft_step(1))


def round_arm(subject: Subject, context: int, choice: Choice) -> Arm:
    """A greedy request's round that ends, if all is accepted, with the context full."""
    passes = subject.passes
    params = SamplingParams(temperature=0, ignore_eos=True).with_defaults({})
    text = TextStream(textless(subject.model.config))
    tokens, length = subject.token_ids[: context - choice.num_tokens], len(subject.token_ids)
    sequence = RunningSequence(tokens, params, 0, text, frozenset(), length)
    sequence.slot = 0

    def run() -> None:
        if choice.plan is not None:
            passes.drafter = subject.plans[choice.plan]
        run_round(passes, [sequence], [choice])

    return Arm(nothing, nothing, run, is_round=True)


def make_arms(subject: Subject, context: int) -> dict[str, Arm]:
    return {
        "plain": verify_arm(subject, context, 1),
        **{plan.name: draft_arm(subject, context, plan) for plan in subject.plans},
        **{f"verify-{width}": verify_arm(subject, context, width) for width in VERIFIED},
        "plain-round": round_arm(subject, context, PLAIN),
        "int8-round": round_arm(subject, context, Choice(subject.int8_plan, NUM_DRAFTED)),
    }


def time_arms(subject: Subject, context: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of every arm, turn by turn."""
    arms = make_arms(subject, context)
    turns: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            arm.set_up()
            timer = wall_timer if arm.is_round else device_timer(subject.model.device)
            turns[name].append(median(timer(arm.reset, arm.run, REPLAYS)))
    return turns


def check(subject: Subject, contexts: Sequence[int]) -> None:
    """Raises CheckError where the passes must not be timed."""
    for context in contexts:
        check_rows(subject, context)
        check_replay(subject, context)
        check_draft(subject, context)
        subject.fill_cache()  # each poisons what follows its context


def check_rows(subject: Subject, context: int) -> None:
    """Raises CheckError where a token's bits depend on the width of its pass."""
    alone = verify_all(subject, subject.passes, context, 1)
    for width in WIDTHS:  # 1 once more: a pass must repeat itself
        if not _same(alone, verify_all(subject, subject.passes, context, width)):
            raise CheckError(
                f"rows: at context {context} a token has other bits among {width} rows than alone; "
                "nothing was timed"
            )


def check_replay(subject: Subject, context: int) -> None:
    """Raises CheckError where the passes leave other bits than their twin, which runs eagerly."""
    both = (subject.passes, subject.twin)
    for width in WIDTHS:
        replayed, eager = (verify_all(subject, passes, context, width) for passes in both)
        if not _same(replayed, eager):
            raise CheckError(
                f"replay: at context {context} a replayed pass over {width} rows has other bits "
                "than the eager one; nothing was timed"
            )
    for plan in subject.plans:
        replayed, eager = (draft_all(subject, p, plan, context, NUM_CHECKED) for p in both)
        if not _same(replayed, eager, skips=True):
            raise CheckError(
                f"replay: at context {context} replayed draft steps of {plan.name} have other bits "
                "than eager ones; nothing was timed"
            )


def check_draft(subject: Subject, context: int) -> None:
    """Raises CheckError unless a draft with everything at full precision is accepted whole."""
    passes, plan = subject.passes, next(iter(subject.plans))
    assert set(plan.sublayers) == {FULL}, plan
    drafted = draft_all(subject, passes, plan, context, MAX_DRAFT)[0].tolist()
    poison(passes, context - MAX_WIDTH)
    passes.stage([RoundRow(drafted, context - MAX_WIDTH)])
    num_accepted = int(passes.verify(1, MAX_WIDTH).result[0, 0])
    if num_accepted != MAX_DRAFT:
        raise CheckError(
            f"draft: at context {context} verification accepts {num_accepted} of {MAX_DRAFT} "
            "tokens drafted at full precision, expected all; nothing was timed"
        )


def verify_all(subject: Subject, passes: Passes, context: int, width: int) -> list[torch.Tensor]:
    """Verify MAX_WIDTH tokens, `width` to a pass, the last at the end of the context.

    Returns their logits [MAX_WIDTH, V] and what the passes wrote.
    """
    first = context - MAX_WIDTH
    poison(passes, first)
    logits = []
    for i in range(0, MAX_WIDTH, width):
        passes.stage([RoundRow(subject.token_ids[i : i + width], first + i)])
        logits.append(_copy(passes.verify(1, width).logits[0][:width]))
    return [torch.cat(logits), *map(_copy, parts_of(passes.cache, first, context))]


def draft_all(
    subject: Subject, passes: Passes, plan: DraftPlan, context: int, count: int
) -> list[torch.Tensor]:
    """Draft `count` tokens after one; return all of them and the keys and values written."""
    first = context - MAX_WIDTH
    poison(passes, first)
    passes.stage([RoundRow(subject.token_ids[:1], first, num_wanted=count)])
    passes.drafter = subject.plans[plan]
    passes.set_plan(0, plan)
    for _ in range(count):
        passes.draft_step(1)
    keys, values, _ = parts_of(passes.cache, first, first + count)
    return [_copy(part) for part in (passes.buffers.token_ids[0, : count + 1], keys, values)]


def poison(passes: Passes, first: int) -> None:
    """NaN from position `first` of the cache on."""
    for part in parts_of(passes.cache, first, None):
        part.fill_(float("nan"))


def parts_of(cache: KVCache, first: int, end: int | None) -> list[torch.Tensor]:
    """The keys, values and states at positions `first` to `end` - 1."""
    k, v, states = cache
    return [k[:, 0, :, first:end], v[:, 0, :, first:end], states[0, first:end]]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """What it holds now, in the host's memory."""
    return tensor.to("cpu", copy=True)


def _same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], skips: bool = False) -> bool:
    """Whether all tensors have the same bits, and no NaN unless sub-layers were skipped."""
    is_written = skips or not any(x.is_floating_point() and x.isnan().any() for x in a)
    # As bytes a NaN is equal to itself.
    pairs = ((x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))
    return is_written and all(torch.equal(x, y) for x, y in pairs)
