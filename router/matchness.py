"""How often a draft plan's first token is the model's own, over recorded greedy answers.

For answer token i of a trace:  argmax planned_model(token i | past) == token i + 1, where the keys
and values of the past are the model's own and those of token i are the draft's, which is what the
first draft token of a round sees. No row reads what another computes, so all positions of all
traces are rows of the same passes: a plan is measured in one reading of the traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from kernels.operands import LayerCache, Rows
from models.llama import Llama, forward, full_precisions, logits, precision_table
from models.plan import SKIP, DraftPlan

PREFILL_TOKENS = 512  # rows of a full-precision pass
PASS_ROWS = 256  # rows of a draft pass
SPAN_ROWS = 64  # rows of one attention product: its scores are [H, SPAN_ROWS, S]
LOGIT_ELEMENTS = 1 << 24  # 64 MiB of float32


@dataclass(frozen=True)
class Trace:
    """A prompt and the model's own greedy answer. Raises ValueError if either is empty."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "token_ids"):
            if not getattr(self, name):
                raise ValueError(f"trace: got no {name}, expected one or more; leave it out")

    @property
    def inputs(self) -> tuple[int, ...]:
        """Every token that is ever given to the model: the answer's last one is not."""
        return self.prompt_ids + self.token_ids[:-1]


class _Span(NamedTuple):
    """Consecutive rows of a pass that belong to one trace, at consecutive positions."""

    slot: int
    rows: slice
    end: int  # position of the last row


class Matchness:
    """Traces with their full-precision keys and values, to measure draft plans on.

    Takes 2 * L * H_kv * D elements for each of (number of traces) * (longest trace) positions; on
    a CPU only for those that there are. The model must have its int8 form for plans with int8.
    """

    def __init__(self, model: Llama, traces: Sequence[Trace], pass_rows: int = PASS_ROWS):
        """Run the model over all traces.

        Raises ValueError for no traces, and for traces that are not this model's: of tokens that
        it does not have or with more positions than it has.
        """
        assert pass_rows > 0, pass_rows
        _check_traces(model, traces)
        config, self._model, self._pass_rows = model.config, model, pass_rows
        longest = max(len(trace.inputs) for trace in traces)
        # Layers take turns in the draft's own part: a row's key is read right after it is written.
        one_layer = (1, len(traces), config.num_kv_heads, longest, config.head_dim)
        shape = (config.num_layers, *one_layer[1:])
        self._k, self._v = (_empty(model, shape) for _ in range(2))
        self._draft_k, self._draft_v = (_empty(model, one_layer).expand(shape) for _ in range(2))
        for slot, trace in enumerate(traces):
            self._record(slot, trace)
        self._counts = [len(trace.token_ids) - 1 for trace in traces]
        self._starts = [len(trace.prompt_ids) for trace in traces]
        places = list(zip(self._starts, self._counts, strict=True))

        def column(values: list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=model.device)

        self._inputs = column([t for trace in traces for t in trace.token_ids[:-1]], torch.int64)
        self._answers = column([t for trace in traces for t in trace.token_ids[1:]], torch.int64)
        positions = [start + i for start, count in places for i in range(count)]
        self._positions = column(positions, torch.int32)
        slots = [slot for slot, count in enumerate(self._counts) for _ in range(count)]
        self._slots = column(slots, torch.int32)

    @property
    def num_positions(self) -> int:
        """Draft tokens that `agreement` judges, of all traces together."""
        return sum(self._counts)

    @torch.inference_mode()
    def agreement(self, plan: DraftPlan) -> list[torch.Tensor]:
        """For each trace whether the planned model names its tokens 1, 2, ..: bool, on the CPU."""
        assert plan.kind == "self", plan
        plan.check(self._model.config.num_layers)
        has_int8 = self._model.weights.lm_head.draft is not None
        assert has_int8 or not plan.uses_int8, "the weights have no int8 form"
        total = self.num_positions
        steps = range(0, total, self._pass_rows)
        parts = [self._pass(plan, first, min(first + self._pass_rows, total)) for first in steps]
        flags = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)
        return list(flags.split(self._counts))

    @torch.inference_mode()
    def _record(self, slot: int, trace: Trace) -> None:
        """Write the model's keys and values of a trace into its slot."""
        model, inputs = self._model, torch.tensor([trace.inputs], device=self._model.device)
        precisions = full_precisions(model.config, 1, model.device)

        def int32(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=model.device)

        for first in range(0, inputs.shape[1], PREFILL_TOKENS):
            token_ids = inputs[:, first : first + PREFILL_TOKENS].contiguous()
            count = token_ids.shape[1]
            positions = int32(list(range(first, first + count)))[None]
            rows = Rows(token_ids, positions, int32([count]), int32([slot]))
            forward(model, rows, self._k, self._v, precisions, model.prefill_ops)

    def _pass(self, plan: DraftPlan, first: int, last: int) -> torch.Tensor:
        """Flags of the positions [first, last), each a sequence of its own with one new token."""
        model, count = self._model, last - first
        precisions = precision_table([plan], model.device).repeat(count, 1)
        attention = partial(_attention, plan, self._k, self._v, self._spans(first, last))
        ops = replace(model.decode_ops, attention=attention, run_layers=None)
        rows = Rows(
            token_ids=self._inputs[first:last, None],
            positions=self._positions[first:last, None],
            num_tokens=torch.ones(count, dtype=torch.int32, device=model.device),
            slots=self._slots[first:last],
        )
        x = forward(model, rows, self._draft_k, self._draft_v, precisions, ops)
        step = max(1, LOGIT_ELEMENTS // model.config.vocab_size)
        pieces = zip(x.split(step), precisions.split(step), strict=True)
        best = torch.cat([logits(model, *piece, ops).argmax(-1) for piece in pieces])
        return (best == self._answers[first:last]).cpu()

    def _spans(self, first: int, last: int) -> list[_Span]:
        """The rows of a pass by trace, in pieces of at most SPAN_ROWS."""
        spans, begin = [], 0
        for slot, (count, position) in enumerate(zip(self._counts, self._starts, strict=True)):
            end = min(begin + count, last)
            for row in range(max(begin, first), end, SPAN_ROWS):
                stop = min(row + SPAN_ROWS, end)
                rows = slice(row - first, stop - first)
                spans.append(_Span(slot, rows, position + stop - 1 - begin))
            begin += count
        return spans


def acceptance(flags: Sequence[torch.Tensor]) -> float:
    """The share of all positions that agree. Raises ValueError if there is no position."""
    total = sum(part.numel() for part in flags)
    if total == 0:
        raise ValueError("acceptance: got no position, expected one or more; give longer answers")
    return sum(int(part.sum()) for part in flags) / total


def _empty(model: Llama, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=model.kv_dtype, device=model.device)


def _check_traces(model: Llama, traces: Sequence[Trace]) -> None:
    if not traces:
        raise ValueError("traces: got none, expected one or more; record some answers first")
    limit, vocab_size = model.num_positions, model.config.vocab_size
    for index, trace in enumerate(traces):
        if len(trace.inputs) > limit:
            raise ValueError(
                f"trace {index}: got {len(trace.inputs)} positions, expected at most the model's "
                f"{limit}; record a shorter answer, or load the model for more positions"
            )
        ids = (*trace.prompt_ids, *trace.token_ids)
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(
                f"trace {index}: got token ids from {min(ids)} to {max(ids)}, expected 0 to "
                f"{vocab_size - 1}; record it with this model"
            )


def _attention(
    plan: DraftPlan,
    full_k: torch.Tensor,  # [L, slots, H_kv, S, D]
    full_v: torch.Tensor,  # [L, slots, H_kv, S, D]
    spans: Sequence[_Span],
    q: torch.Tensor,  # [R, H, D], any row stride
    draft: LayerCache,
    rows: Rows,  # one for each sequence
    _precisions: torch.Tensor,
    sublayer: int,
    _counters: torch.Tensor,
) -> torch.Tensor:
    """`Ops.attention` over the model's past and the draft's own position; return o [R, H*D]."""
    out = q.new_zeros(q.shape)
    if plan.sublayers[sublayer] != SKIP:
        k, v = full_k[sublayer // 2], full_v[sublayer // 2]
        here, slots = rows.positions[:, 0].long(), rows.slots.long()
        own_k, own_v = draft.k[slots, :, here], draft.v[slots, :, here]
        for slot, part, end in spans:
            past = k[slot, :, :end], v[slot, :, :end]
            out[part] = _attend(q[part], *past, own_k[part], own_v[part], here[part])
    return out.flatten(1)


def _attend(
    q: torch.Tensor,  # [T, H, D]
    k: torch.Tensor,  # [H_kv, S, D]
    v: torch.Tensor,  # [H_kv, S, D]
    own_k: torch.Tensor,  # [T, H_kv, D]
    own_v: torch.Tensor,  # [T, H_kv, D]
    positions: torch.Tensor,  # [T]
) -> torch.Tensor:
    """o [T, H, D]: a row attends to the keys before its position and to its own key."""
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    (num_rows, _, head_dim), num_kv_heads = q.shape, k.shape[0]
    # Query heads of one key head are rows of the same product.
    queries = (
        q.to(acc_dtype).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    )  # [H_kv, G, T, D]
    k, v, own_k, own_v = (part.to(acc_dtype) for part in (k, v, own_k, own_v))
    own_k, own_v = own_k.transpose(0, 1)[:, None], own_v.transpose(0, 1)[:, None]  # [H_kv, 1, T, D]
    scores = (queries.flatten(1, 2) @ k.transpose(1, 2)).unflatten(1, (-1, num_rows))
    is_ahead = torch.arange(k.shape[1], device=q.device) >= positions[:, None]
    scores = scores.masked_fill(is_ahead, float("-inf"))
    own_score = (queries * own_k).sum(-1, keepdim=True)
    probs = (torch.cat((scores, own_score), -1) * head_dim**-0.5).softmax(-1)
    o = (probs[..., :-1].flatten(1, 2) @ v).unflatten(1, (-1, num_rows)) + probs[..., -1:] * own_v
    rows: torch.Tensor = o.permute(2, 0, 1, 3).flatten(1, 2)
    return rows.to(q.dtype)
