"""The passes and rounds that bench/passes.py times, and the clocks that it times them with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

import torch

from bench.pass_checks import stage
from bench.subject import Subject, textless
from engine.accept import accept
from engine.controller import PLAIN, Choice
from engine.draft import draft
from engine.params import SamplingParams
from engine.sequence import RunningSequence
from engine.stream import TextStream
from engine.verify import verify
from models.plan import DraftPlan

VERIFIED = (2, 4, 8, 16)  # rows of the verify passes beside plain decoding's one
NUM_DRAFTED = 4  # tokens of the speculative round
REPLAYS = 5

Action = Callable[[], object]
# (what comes before every run and is not timed, the run, how many) -> seconds of each
Timer = Callable[[Action, Action, int], list[float]]


class Clocks(NamedTuple):
    """device: for passes, as the device sees them. wall: for rounds, as a caller sees them."""

    device: Timer
    wall: Timer


class Arm(NamedTuple):
    """A pass or a round. set_up: before a turn. reset: before every run, not timed."""

    set_up: Action
    reset: Action
    run: Action
    is_round: bool = False


def event_timer(reset: Action, run: Action, count: int) -> list[float]:
    """Seconds between CUDA events around each run, all of them queued before the first ends."""
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
    """Seconds of runs at whose end the host knows their result."""
    seconds = []
    reset()
    run()
    for _ in range(count):
        reset()
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds


def nothing() -> None:
    pass


def verify_arm(subject: Subject, context: int, width: int) -> Arm:
    """A pass of the model itself over the last `width` tokens; one is plain decoding."""
    passes, tokens = subject.passes, subject.token_ids[context - width : context]
    return Arm(
        lambda: stage(passes, tokens, context - width),
        nothing,
        lambda: passes.verify(1, width),
    )


def draft_arm(subject: Subject, context: int, plan: DraftPlan) -> Arm:
    """A draft step whose token is the last one of the context."""
    passes, model = subject.passes, subject.plans[plan]
    newest = subject.token_ids[context - 1 : context]

    def set_up() -> None:
        stage(passes, newest, context - 1, num_wanted=1)
        passes.set_plan(0, plan)

    # A step counts its token, and the next one would find that it has enough.
    return Arm(set_up, passes.buffers.num_drafted.zero_, lambda: passes.draft_step(model, 1))


def round_arm(subject: Subject, context: int, choice: Choice) -> Arm:
    """A round of the engine that ends, if all is accepted, with the context full."""
    passes = subject.passes
    model = subject.model if choice.plan is None else subject.plans[choice.plan]
    sequence = _running(subject, context - choice.num_tokens)

    def run() -> None:
        drafted = draft(model, passes, [sequence], [choice])
        accept(drafted, verify(passes, drafted))

    return Arm(nothing, nothing, run, is_round=True)


def _running(subject: Subject, num_tokens: int) -> RunningSequence:
    """A greedy request whose tokens are all in the cache but the newest."""
    params = SamplingParams(temperature=0, ignore_eos=True).with_defaults({})
    text = TextStream(textless(subject.model.config))
    tokens, length = subject.token_ids[:num_tokens], len(subject.token_ids)
    sequence = RunningSequence(tokens, params, 0, text, frozenset(), length)
    sequence.slot = 0
    return sequence


def make_arms(subject: Subject, context: int) -> dict[str, Arm]:
    speculative = Choice(subject.int8_plan, NUM_DRAFTED)
    return {
        "plain": verify_arm(subject, context, 1),
        **{plan.name: draft_arm(subject, context, plan) for plan in subject.plans},
        **{f"verify-{width}": verify_arm(subject, context, width) for width in VERIFIED},
        "plain-round": round_arm(subject, context, PLAIN),
        "int8-round": round_arm(subject, context, speculative),
    }


def take_turns(arms: Mapping[str, Arm], clocks: Clocks, repeats: int) -> dict[str, list[float]]:
    """Seconds of every arm, turn by turn."""
    turns: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            arm.set_up()
            timer = clocks.wall if arm.is_round else clocks.device
            turns[name].append(median(timer(arm.reset, arm.run, REPLAYS)))
    return turns
