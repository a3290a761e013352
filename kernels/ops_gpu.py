"""The operations on a GPU: `TRITON` for passes of 1 to 16 new tokens a sequence, `TRITON_PREFILL`
for prompts.

Prompts have rows enough for the library's GEMM. The host waits for the device in neither record. A
token must get its key and value from the same record in plain and in speculative decoding, which
both decode with `TRITON` and prefill with `TRITON_PREFILL`.
"""

from __future__ import annotations

from dataclasses import replace

from kernels.layer.attention_decode import attention_decode
from kernels.layer.attention_prefill import attention_prefill
from kernels.layer.linear_prefill import (
    linear_residual_prefill,
    norm_gated_mlp_prefill,
    norm_lm_head_prefill,
)
from kernels.layer.linear_residual import linear_residual
from kernels.layer.norm_gated_mlp import norm_gated_mlp
from kernels.layer.norm_lm_head import norm_lm_head
from kernels.layer.norm_qkv_rope import norm_qkv_rope_append
from kernels.layer.norm_qkv_rope_prefill import norm_qkv_rope_prefill
from kernels.ops import Ops
from kernels.round.accept import accept
from kernels.round.allow import allow_ref
from kernels.round.keep_drafted import keep_drafted
from kernels.round.keep_states import keep_states
from kernels.round.rows import draft_rows, verify_rows
from kernels.round.sample import sample
from kernels.route.nearest_anchor import nearest_anchor_triton
from kernels.route.pool_states import pool_states

TRITON = Ops(
    name="triton",
    norm_qkv_rope_append=norm_qkv_rope_append,
    attention=attention_decode,
    linear_residual=linear_residual,
    norm_gated_mlp=norm_gated_mlp,
    norm_lm_head=norm_lm_head,
    sample=sample,
    keep_states=keep_states,
    draft_rows=draft_rows,
    keep_drafted=keep_drafted,
    verify_rows=verify_rows,
    accept=accept,
    allow=allow_ref,
    pool_states=pool_states,
    nearest_anchor=nearest_anchor_triton,
)

TRITON_PREFILL = replace(
    TRITON,
    name="triton-prefill",
    norm_qkv_rope_append=norm_qkv_rope_prefill,
    attention=attention_prefill,
    linear_residual=linear_residual_prefill,
    norm_gated_mlp=norm_gated_mlp_prefill,
    norm_lm_head=norm_lm_head_prefill,
)
