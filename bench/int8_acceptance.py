"""What quantising activations costs a draft in 8 bits: acceptance and expected speed-up.

    python -m bench.int8_acceptance [--model M] [--prompts DIR] [--domains A,B] [--per-domain N]

All schemes have the engine's int8 weights, one scale a row. Activations stay float32, or become
int8 with one scale a row, or one a group along K as in kernels/gpu/tiles_int8.py. A draft token is
right where its argmax is the next token of the model's own greedy answer (router/matchness.py: the
past is the model's own, as for the first token of a draft). From that acceptance a follows

    max over g of  (1 - a^(g+1)) / ((1 - a) (g R + V))

Acceptance is measured here, on the CPU. R and V are assumptions: what prototypes of the kernels
took on an H100, in plain decode steps. Their int8 dot had one scale a row: R is taken to be the
same with groups, though small groups mean small tiles. Later tokens of a draft are taken to be
accepted as often as the first. No clock is in it, so runs repeat.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.arms import read_prompts
from bench.decode import DOMAINS
from bench.harness import print_machine, print_result
from engine import LLM, SamplingParams
from engine.costs import PassCosts
from kernels.gpu.tiles_int8 import SMALLEST
from kernels.layer.norm_qkv_rope import rope_ref
from kernels.layer.planned_linear import LEVELS
from kernels.layer.rms_norm import rms_norm_ref
from kernels.ops import TORCH, Ops
from kernels.weight import Weight
from models.llama import Llama
from models.plan import FULL, MAX_DRAFT, DraftPlan
from models.quantise import matrices, with_int8
from router.matchness import Matchness, Trace, acceptance

VERIFY_COST = 1.05  # V on a GPU, whatever the draft's length
MIN_SOUND = 0.995  # share of positions in which two ways to compute the same must agree
MAX_LENGTH = 2048

Flags = list[torch.Tensor]  # for each trace whether its tokens 1, 2, .. are named


class Cost(NamedTuple):
    """R, a draft step in plain decode steps: the range over matrix shapes, and a typical value."""

    low: float
    likely: float
    high: float


INT8_DOT = Cost(0.50, 0.53, 0.57)  # int8 weights x int8 activations
CONVERTED = Cost(0.57, 0.63, 0.70)  # int8 weights converted to bfloat16 before the dot


class Scheme(NamedTuple):
    """How a draft computes its matrix products.

    group: activations along K that share a scale; 0 is all of a row, None leaves them in float32.
    """

    name: str
    group: int | None
    cost: Cost
    has_int8_head: bool = True


FLOAT = Scheme("float", None, CONVERTED)
SCHEMES = (
    FLOAT,
    Scheme("row", 0, INT8_DOT),
    *(Scheme(f"group-{group}", group, INT8_DOT) for group in (256, 128, 64, 32)),
)


def quantised(x: torch.Tensor, group: int) -> torch.Tensor:
    """x [R, K] float32, rounded to 8 bits as kernels/gpu/tiles_int8.py does and multiplied back."""
    groups = F.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    largest = groups.abs().amax(2, keepdim=True).clamp(min=SMALLEST)
    inverse = torch.full_like(largest, LEVELS) / largest
    rounded = (groups.double() * inverse.double() + 0.5).float().floor()  # rounds once: an FMA
    quotient: torch.Tensor = rounded * (largest / LEVELS)
    return quotient.flatten(1)[:, : x.shape[1]]


def project(x: torch.Tensor, weight: Weight, group: int | None) -> torch.Tensor:
    """x [R, K] @ W^T [R, N] with the weight's 8-bit form, activations as `Scheme.group` says."""
    assert weight.int8 is not None and weight.scale is not None, "the weights have no int8 form"
    if group is not None:
        x = quantised(x, group or x.shape[1])
    return F.linear(x, weight.int8.float()) * weight.scale


def norm_project(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: Weight, group: int | None
) -> torch.Tensor:
    """rms_norm(x) @ W^T [R, N]: the norm weight before the rounding, the row's scale after it."""
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return project(x * norm_weight, weight, group) * rstd


def _norm_qkv_rope_append(
    group: int | None, x: torch.Tensor, norm_weight: torch.Tensor, eps: float, qkv: Weight,
    qkv_bias: torch.Tensor | None, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None,
    cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, _num_tokens: torch.Tensor,
    slots: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *_plan: Any,
) -> torch.Tensor:  # fmt: skip
    """See norm_qkv_rope.py; every row is a sequence of its own."""
    assert positions.shape == (x.shape[0], 1), positions.shape
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    y = norm_project(x, norm_weight, eps, qkv, group)
    y = (y if qkv_bias is None else y + qkv_bias).unflatten(-1, (-1, head_dim))
    q, k, v = y.split((y.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_ref(q, q_norm, eps), rms_norm_ref(k, k_norm, eps)
    here, rows = positions[:, 0].long(), slots.long()
    q, k = (rope_ref(part, cos[here], sin[here]) for part in (q, k))
    k_cache[rows, :, here], v_cache[rows, :, here] = k, v
    return q


def _linear_residual(
    group: int | None, x: torch.Tensor, weight: Weight, residual: torch.Tensor, *_plan: Any
) -> None:
    residual += project(x, weight, group)


def _norm_gated_mlp(
    group: int | None, x: torch.Tensor, norm_weight: torch.Tensor, eps: float, gate_up: Weight,
    *_plan: Any,
) -> torch.Tensor:  # fmt: skip
    gate, up = norm_project(x, norm_weight, eps, gate_up, group).chunk(2, dim=-1)
    return F.silu(gate) * up


def _norm_lm_head(
    scheme: Scheme, x: torch.Tensor, norm_weight: torch.Tensor, eps: float, lm_head: Weight,
    *_plan: Any,
) -> torch.Tensor:  # fmt: skip
    if scheme.has_int8_head:
        return norm_project(x, norm_weight, eps, lm_head, scheme.group)
    return F.linear(rms_norm_ref(x, norm_weight, eps), lm_head.full)


def draft_ops(scheme: Scheme) -> Ops:
    """Operations of the draft pass in float32: every row runs in the scheme, whatever its plan."""
    return replace(
        TORCH,
        name=scheme.name,
        norm_qkv_rope_append=partial(_norm_qkv_rope_append, scheme.group),
        linear_residual=partial(_linear_residual, scheme.group),
        norm_gated_mlp=partial(_norm_gated_mlp, scheme.group),
        norm_lm_head=partial(_norm_lm_head, scheme),
    )


class Answers(Matchness):
    """The model's own answers, on which any operations can draft; the model has its int8 form."""

    def agreement_of(self, scheme: Scheme) -> Flags:
        """`agreement` of a draft that the scheme computes: it shares the recorded past."""
        drafting = copy(self)
        drafting._model = replace(self._model, decode_ops=draft_ops(scheme))
        return drafting.agreement(DraftPlan.int8(self._model.config.num_layers))


def record(
    llm: LLM, prompts: Mapping[str, Sequence[str]], new_tokens: int
) -> list[tuple[str, Trace]]:
    """The domain and the greedy answer of each prompt, but for answers of a single token.

    Raises ValueError for prompts that do not fit the context, and if no answer is left.
    """
    params = SamplingParams(temperature=0, max_tokens=new_tokens, speculative="off")
    found = []
    for domain, texts in prompts.items():
        for text in texts:
            token_ids = llm.encode_chat([{"role": "user", "content": text}])
            answer = llm.generate([token_ids], params)[0].outputs[0].token_ids
            if len(answer) > 1:
                found.append((domain, Trace(tuple(token_ids), tuple(answer))))
    if not found:
        raise ValueError("answers: got a single token in each, expected two or more; give other "
                         "prompts or more --new-tokens")  # fmt: skip
    return found


def check(answers: Answers, num_layers: int, drafted: Flags) -> dict[str, float]:
    """Shares of positions in which the engine's own passes agree: with the answers, with `float`.

    drafted: the agreement of the scheme `float`, which is what the engine's int8 plan computes.
    """
    itself = DraftPlan("full", "self", (FULL,) * (2 * num_layers))
    own = torch.cat(answers.agreement(DraftPlan.int8(num_layers)))
    return {
        "full_precision_agrees": round(acceptance(answers.agreement(itself)), 5),
        "float_is_the_engines_int8": round(acceptance([own == torch.cat(drafted)]), 5),
    }


def best_length(rate: float, cost: float) -> tuple[int, float]:
    """The draft length with the largest expected speed-up, and that."""
    passes = PassCosts(((1, 1.0), (2, VERIFY_COST), (MAX_DRAFT + 1, VERIFY_COST)))
    return passes.best_length(cost, rate, rate, MAX_DRAFT)


def with_full_head(scheme: Scheme, model: Llama) -> Scheme:
    """The scheme with the LM head as it is, at a cost of 1 for the head's part of the weights."""
    share = head_share(model)
    cost = Cost(*(value * (1 - share) + share for value in scheme.cost))
    return scheme._replace(name=f"{scheme.name}-full-head", cost=cost, has_int8_head=False)


def head_share(model: Llama) -> float:
    weights = model.weights
    return weights.lm_head.full.numel() / sum(w.full.numel() for w in matrices(weights))


def summarise(
    scheme: Scheme, domains: Sequence[str], flags: Flags, drafted: Flags
) -> dict[str, Any]:
    """Acceptance and expected speed-ups at each cost of the range, by domain and in the mean.

    domains: that of each trace. drafted: the agreement of the scheme `float` on the same traces.
    """
    by_domain = {
        name: acceptance([part for d, part in zip(domains, flags, strict=True) if d == name])
        for name in dict.fromkeys(domains)
    }
    best = {name: [best_length(rate, cost) for cost in scheme.cost]
            for name, rate in by_domain.items()}  # fmt: skip
    speed_ups = {name: [value for _, value in values] for name, values in best.items()}
    hits, base = torch.cat(flags).double(), torch.cat(drafted).double()
    num_positions = hits.numel()
    return {
        "cost": [round(value, 3) for value in scheme.cost],
        "acceptance": {name: round(rate, 4) for name, rate in by_domain.items()},
        "acceptance_mean": round(fmean(by_domain.values()), 4),
        "minus_float": round(float((hits - base).mean()), 4),  # over all positions
        "minus_float_error": round(float((hits - base).std() / num_positions**0.5), 4),
        "draft_length": {name: values[1][0] for name, values in best.items()},
        "speedup": {name: [round(v, 3) for v in values] for name, values in speed_ups.items()},
        "speedup_mean": [round(fmean(v), 3) for v in zip(*speed_ups.values(), strict=True)],
    }


def print_tables(schemes: Mapping[str, Mapping[str, Any]]) -> None:
    domains = list(next(iter(schemes.values()))["acceptance"])
    width = max(map(len, schemes))
    header = f"{'':>{width}} " + " ".join(f"{name:>13}" for name in domains)
    print(f"\nacceptance of a draft's first token, measured\n{header} {'mean':>7}  "
          "minus float, over all positions")  # fmt: skip
    for name, row in schemes.items():
        rates = " ".join(f"{row['acceptance'][domain]:>13.3f}" for domain in domains)
        print(f"{name:>{width}} {rates} {row['acceptance_mean']:>7.4f}  "
              f"{row['minus_float']:+.4f} +- {row['minus_float_error']:.4f}")  # fmt: skip
    print(f"\nexpected speed-up (draft length) at the likely R, assumed\n{header} {'mean':>7}  "
          "R, mean over the range of R")  # fmt: skip
    for name, row in schemes.items():
        lengths = row["draft_length"]
        cells = [f"{row['speedup'][domain][1]:.2f} ({lengths[domain]})" for domain in domains]
        (low, likely, high), means = row["cost"], row["speedup_mean"]
        print(f"{name:>{width}} " + " ".join(f"{cell:>13}" for cell in cells) +
              f" {means[1]:>7.3f}  R {likely:.2f} [{low:.2f}, {high:.2f}]: "
              f"{means[2]:.2f} to {means[0]:.2f}")  # fmt: skip


def measure(answers: Answers, model: Llama, domains: Sequence[str]) -> dict[str, Any]:
    """Every scheme, then the best one with a full LM head; no speed-ups if the checks fail."""
    drafted = answers.agreement_of(FLOAT)
    checks = check(answers, model.config.num_layers, drafted)
    print(f"checks, shares of positions (1 but for near-ties): {checks}")
    result: dict[str, Any] = {"checks": checks, "sound": min(checks.values()) >= MIN_SOUND}
    if not result["sound"]:
        print("the draft computed here is not the engine's: nothing is reported")
        return result
    flags = {FLOAT: drafted} | {s: answers.agreement_of(s) for s in SCHEMES if s is not FLOAT}
    rows = {s.name: summarise(s, domains, found, drafted) for s, found in flags.items()}
    best = max(SCHEMES, key=lambda scheme: rows[scheme.name]["speedup_mean"][1])
    full_head = with_full_head(best, model)
    found = answers.agreement_of(full_head)
    rows[full_head.name] = summarise(full_head, domains, found, drafted)
    print_tables(rows)
    return result | {"best": best.name, "schemes": rows}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises ValueError for a wrong model or set of prompts."""
    prompts = read_prompts(args.prompts, args.domains.split(","), args.per_domain)
    llm = LLM(args.model, device="cpu", dtype="float32", max_length=MAX_LENGTH, speculative="off",
              router="none", profile=False)  # fmt: skip
    recorded = record(llm, prompts, args.new_tokens)
    model = with_int8(llm.model)
    answers = Answers(model, [trace for _, trace in recorded])
    share = head_share(model)
    print(f"{llm.model_name}: {len(recorded)} answers, {answers.num_positions} positions, "
          f"{len(set(prompts))} domains; the LM head has {share:.1%} of the weights\n"
          f"assumed, not measured, from kernel prototypes on an H100: R {_shown(INT8_DOT)} with "
          f"int8 activations (taken to hold for every group), {_shown(CONVERTED)} with bfloat16 "
          f"ones, V {VERIFY_COST}; a full head adds its part of the weights")  # fmt: skip
    result = {
        "model": llm.model_name,
        "answers": len(recorded),
        "positions": answers.num_positions,
        "head_share": round(share, 4),
        "assumed": {"int8_dot": INT8_DOT, "converted": CONVERTED, "verify": VERIFY_COST},
    }
    return result | measure(answers, model, [domain for domain, _ in recorded])


def _shown(cost: Cost) -> str:
    return f"{cost.likely:.2f} [{cost.low:.2f}, {cost.high:.2f}]"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="directory, .gguf file or hub id; default: default model")
    parser.add_argument("--prompts", type=Path, metavar="DIR", help="a folder of DOMAIN.jsonl")
    parser.add_argument("--domains", default=",".join(DOMAINS), help="default: %(default)s")
    parser.add_argument("--per-domain", type=_positive, default=4, help="prompts of each domain")
    parser.add_argument("--new-tokens", type=_positive, default=64)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    started = time.monotonic()
    described = print_machine()
    print(f"method: batch 1, greedy answers of up to {args.new_tokens} tokens, every position "
          "judged once by each scheme in float32")  # fmt: skip
    try:
        result = run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    minutes = round((time.monotonic() - started) / 60, 1)
    print_result(result | {"minutes": minutes, "machine": described})


if __name__ == "__main__":
    main()
