"""Whether the passes of an engine may be timed: that they have the bits that they must have.

    rows     a token's logits, and the keys, values and state that its pass leaves, have the same
             bits alone and among 2, 8 or 16 rows
    replay   a pass that runs through a graph leaves the bits of its eager twin
    draft    what is drafted with everything at full precision is what the verification makes

Each looks at the last positions of a context, whose earlier part is in the cache. What a pass must
write holds NaN before, so neither a value that was left unwritten nor one read too early passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.passes import Passes
from engine.round_buffers import MAX_WIDTH
from models.llama import Llama
from models.plan import FULL, MAX_DRAFT, DraftPlan

WIDTHS = (1, 2, 8, 16)  # tokens of a verify pass


class CheckError(Exception):
    """The passes do not do what the engine relies on, so no time is taken of them."""


def stage(passes: Passes, token_ids: Sequence[int], first: int, num_wanted: int = 0) -> None:
    """A round of one greedy sequence in slot 0: its newest token at position `first`, and a draft.

    Writes the host's side of the buffers, which must not be waiting to be copied any more.
    """
    inputs = passes.staging.inputs
    for values in inputs.values():
        values.fill(0)
    inputs["end_ids"].fill(-1)
    inputs["token_ids"][0, : len(token_ids)] = token_ids
    inputs["first"][0] = first
    inputs["num_drafted"][0], inputs["num_wanted"][0] = len(token_ids) - 1, num_wanted
    passes.staging.copy_over()


def poison(passes: Passes, first: int) -> None:
    """NaN from position `first` of the cache on."""
    cache = passes.cache
    for part in (cache.k[:, 0, :, first:], cache.v[:, 0, :, first:], cache.states[0, first:]):
        part.fill_(float("nan"))


def written(passes: Passes, first: int, end: int) -> list[torch.Tensor]:
    """Copies of the keys, values and states at positions `first` to `end` - 1."""
    k, v, states = passes.cache
    parts = (k[:, 0, :, first:end], v[:, 0, :, first:end], states[0, first:end])
    return [_copy(part) for part in parts]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """What it holds now, in the host's memory."""
    return tensor.to("cpu", copy=True)


def verify_all(
    passes: Passes, token_ids: Sequence[int], first: int, width: int
) -> list[torch.Tensor]:
    """Run all tokens, `width` to a pass; return their logits [n, V] and what the passes wrote."""
    poison(passes, first)
    logits = []
    for i in range(0, len(token_ids), width):
        chunk = token_ids[i : i + width]
        stage(passes, chunk, first + i)
        logits.append(_copy(passes.verify(1, width).logits[0, : len(chunk)]))
    return [torch.cat(logits), *written(passes, first, first + len(token_ids))]


def draft_all(
    model: Llama, passes: Passes, plan: DraftPlan, token_id: int, first: int, count: int
) -> list[torch.Tensor]:
    """Draft `count` tokens after `token_id`; return them and the keys and values written."""
    poison(passes, first)
    stage(passes, [token_id], first, num_wanted=count)
    passes.set_plan(0, plan)
    for _ in range(count):
        passes.draft_step(model, 1)
    keys, values, _ = written(passes, first, first + count)
    return [_copy(passes.buffers.token_ids[0, : count + 1]), keys, values]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], skips: bool = False) -> bool:
    """Whether all tensors have the same bits, and no NaN unless sub-layers were skipped."""
    pairs = list(zip(a, b, strict=True))
    is_written = skips or not any(x.is_floating_point() and x.isnan().any() for x in a)
    return is_written and all(_equal_bits(x, y) for x, y in pairs)


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """torch.equal, but for NaN being equal to itself."""
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_rows(passes: Passes, token_ids: Sequence[int], context: int) -> None:
    """Raises CheckError where a token's bits depend on the width of its pass."""
    first = context - MAX_WIDTH
    alone = verify_all(passes, token_ids[:MAX_WIDTH], first, 1)
    for width in WIDTHS:  # 1 once more: a pass must repeat itself
        if not same(alone, verify_all(passes, token_ids[:MAX_WIDTH], first, width)):
            raise CheckError(
                f"rows: at context {context} a token has other bits among {width} rows than alone; "
                "nothing was timed"
            )


def check_replay(
    passes: Passes,
    twin: Passes,
    drafts: Sequence[tuple[Llama, DraftPlan]],
    token_ids: Sequence[int],
    context: int,
) -> None:
    """Raises CheckError where `passes` leave other bits than `twin`, which runs them eagerly.

    drafts: plans, each with the model that runs it.
    """
    first = context - MAX_WIDTH
    for width in WIDTHS:
        replayed = verify_all(passes, token_ids[:MAX_WIDTH], first, width)
        if not same(replayed, verify_all(twin, token_ids[:MAX_WIDTH], first, width)):
            raise CheckError(
                f"replay: at context {context} a replayed pass over {width} rows has other bits "
                "than the eager one; nothing was timed"
            )
    for model, plan in drafts:
        replayed = draft_all(model, passes, plan, token_ids[0], first, 4)
        if not same(replayed, draft_all(model, twin, plan, token_ids[0], first, 4), skips=True):
            raise CheckError(
                f"replay: at context {context} replayed draft steps of {plan.name} have other bits "
                "than eager ones; nothing was timed"
            )


def check_draft(passes: Passes, token_ids: Sequence[int], context: int) -> None:
    """Raises CheckError unless a draft with everything at full precision is accepted whole."""
    first, model = context - MAX_WIDTH, passes.model
    plan = DraftPlan("all", "self", (FULL,) * (2 * model.config.num_layers))
    drafted = draft_all(model, passes, plan, token_ids[0], first, MAX_DRAFT)[0].tolist()
    poison(passes, first)
    stage(passes, drafted, first)
    num_accepted = int(passes.verify(1, MAX_WIDTH).result[0, 0])
    if num_accepted != MAX_DRAFT:
        raise CheckError(
            f"draft: at context {context} verification accepts {num_accepted} of {MAX_DRAFT} "
            "tokens drafted at full precision, expected all; nothing was timed"
        )
