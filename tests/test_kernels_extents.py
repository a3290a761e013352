"""No number reaches a CPU kernel's pointers unchecked: one value beyond each extent of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operands import qkv_layer, rows_at

from kernels.cpu.table import layer_table
from kernels.operands import LayerCache, ModelOperands, RotaryTable, RoundBuffers
from kernels.ops_cpu import NUMBA
from kernels.round.sample import SampleParams
from kernels.weight import Dense, Int8, LayerWeights, Weight

C, H, H_KV, D, F, V = 24, 4, 2, 8, 20, 37
SLOTS, S, B, T, L, W = 3, 16, 2, 4, 2, 6
U8 = torch.uint8
NUM_QKV = (H + 2 * H_KV) * D


def ints(*values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def rows(first: tuple[int, ...] = (0, 12), slots: tuple[int, ...] = (2, 0)) -> dict[str, Any]:
    """T tokens of two sequences; by default the second ends at the cache's last position."""
    return {
        "positions": ints(*first)[:, None] + torch.arange(T, dtype=torch.int32),
        "num_tokens": ints(T, T),
        "slots": ints(*slots),
    }


def dense(*shape: int, dtype: torch.dtype = torch.float32) -> Weight:
    return Weight(Dense(torch.randn(*shape, dtype=dtype)))


def cache(*lead: int) -> dict[str, Any]:
    return {name: torch.zeros(*lead, SLOTS, H_KV, S, D) for name in ("k_cache", "v_cache")}


def precisions() -> torch.Tensor:
    return torch.full((B, 2 * L + 1), 16, dtype=torch.uint8)


def layer(**changes: Any) -> LayerWeights:
    tensors = {
        "attn_norm": torch.ones(C), "qkv": dense(NUM_QKV, C),
        "qkv_bias": torch.randn(NUM_QKV), "q_norm": torch.ones(D), "k_norm": torch.ones(D),
        "attn_out": dense(C, H * D), "mlp_norm": torch.ones(C),
        "gate_up": dense(2 * F, C), "down": dense(C, F),
    }  # fmt: skip
    return LayerWeights(**tensors | changes)


def angles() -> dict[str, Any]:
    return {"cos": torch.ones(S, D // 2), "sin": torch.zeros(S, D // 2)}


def qkv_operands() -> dict[str, Any]:
    w = layer()
    return {
        "x": torch.randn(B * T, C), "norm_weight": w.attn_norm, "eps": 1e-5, "qkv": w.qkv,
        "qkv_bias": w.qkv_bias, "q_norm": w.q_norm, "k_norm": w.k_norm, **angles(), **rows(),
        **cache(), "precisions": precisions(), "sublayer": 0,
    }  # fmt: skip


def attention_operands() -> dict[str, Any]:
    counters = torch.zeros(1, dtype=torch.int32)
    return {"q": torch.randn(B * T, H, D), **cache(), **rows(), "precisions": precisions(),
            "sublayer": 0, "counters": counters}  # fmt: skip


def residual_operands() -> dict[str, Any]:
    counters = torch.zeros(1, dtype=torch.int32)
    return {"x": torch.randn(B * T, F), "weight": layer().down, "residual": torch.randn(B * T, C),
            "precisions": precisions(), "sublayer": 1, "counters": counters}  # fmt: skip


def mlp_operands() -> dict[str, Any]:
    return {"x": torch.randn(B * T, C), "norm_weight": torch.ones(C), "eps": 1e-5,
            "gate_up": layer().gate_up, "precisions": precisions(), "sublayer": 1}  # fmt: skip


def head_operands() -> dict[str, Any]:
    return {"x": torch.randn(B * T, C), "norm_weight": torch.ones(C), "eps": 1e-5,
            "lm_head": dense(V, C), "precisions": precisions(), "sublayer": 2 * L}  # fmt: skip


def layer_of(dtype: torch.dtype) -> LayerWeights:
    tensors = layer()._asdict()
    return LayerWeights(**{
        name: Weight(Dense(t.own.values.to(dtype))) if isinstance(t, Weight) else t.to(dtype)
        for name, t in tensors.items()
    })  # fmt: skip


def layers_operands(**changes: Any) -> dict[str, Any]:
    layers = [layer(**changes) for _ in range(L)]
    return {"x": torch.randn(B * T, C), "layers": layers, "table": layer_table(layers),
            "eps": 1e-5, **angles(), **rows(), **cache(L), "precisions": precisions()}  # fmt: skip


def sample_operands() -> dict[str, Any]:
    return {"logits": torch.randn(B, V), "position": ints(3, 4, dtype=torch.int64),
            "params": sample_params()}  # fmt: skip


def sample_params(**changes: torch.Tensor) -> SampleParams:
    return SampleParams(
        temperature=torch.ones(B), top_k=ints(0, 0), top_p=torch.ones(B), min_p=torch.zeros(B),
        seed=ints(1, 2, dtype=torch.int64), end_ids=ints((V - 1,), (-1,)), min_position=ints(9, 9),
        repetition_penalty=torch.ones(B), presence_penalty=torch.zeros(B),
        frequency_penalty=torch.zeros(B),
    )._replace(**changes)  # fmt: skip


def verify_operands(**changes: Any) -> dict[str, Any]:
    """Of a round of two sequences: three drafted tokens and one; more are wanted."""
    layers = [layer() for _ in range(L)]
    return {
        "embedding": torch.randn(V, C), "layers": layers, "table": layer_table(layers),
        "final_norm": torch.ones(C), "lm_head": dense(V, C), "eps": 1e-5, **angles(), **cache(L),
        "states": torch.zeros(SLOTS, S, C), "token_ids": torch.full((B, W), V - 1),
        "first": ints(0, 12), "slots": ints(2, 0), "num_drafted": ints(3, 1),
        "num_wanted": ints(W - 1, 3), "stop_probability": torch.zeros(B),
        "sampling": sample_params(),
        "slot_precisions": torch.full((SLOTS, 2 * L + 1), 16, dtype=U8),
        "width": T, "precisions": precisions(),
    } | changes  # fmt: skip


def round_operands(given: dict[str, Any]) -> tuple[ModelOperands, RoundBuffers]:
    given = given | {"rotary": RotaryTable(given["cos"], given["sin"])}
    return tuple(
        kind(**{name: given[name] for name in kind._fields})
        for kind in (ModelOperands, RoundBuffers)
    )


def verify(**given: Any) -> None:
    NUMBA.verify_round(*round_operands(given), given["width"], given["precisions"])


def draft(**given: Any) -> None:
    NUMBA.draft_round(*round_operands(given))


LAUNCHERS = {
    "qkv": (NUMBA.norm_qkv_rope_append, qkv_operands),
    "attention": (NUMBA.attention, attention_operands),
    "residual": (NUMBA.linear_residual, residual_operands),
    "mlp": (NUMBA.norm_gated_mlp, mlp_operands),
    "head": (NUMBA.norm_lm_head, head_operands),
    "layers": (NUMBA.run_layers, layers_operands),
    "sample": (NUMBA.sample, sample_operands),
    "verify": (verify, verify_operands),
    "draft": (draft, verify_operands),
}
HALF = torch.float16
OUTSIDE_THE_CACHE = [
    rows(first=(0, 13)), rows(first=(-1, 0)), rows(first=(2**31 - 5, 0)),
    rows(slots=(3, 0)), rows(slots=(0, -1)),
    rows() | {"num_tokens": ints(T, T + 1)}, rows() | {"num_tokens": ints(T)},
    rows() | {"slots": ints(0)}, rows() | {"positions": rows()["positions"].flip(1)},
    rows() | {"positions": ints((0, 1, 2, 15), (0, 1, 2, 3))},  # of which a tile is read to 19
    rows() | {"positions": ints((0, 1, 2, 3))}, rows() | {"slots": ints(0, 1, dtype=torch.int64)},
]  # fmt: skip
PRECISIONS = [
    {"precisions": precisions()[:1].repeat(3, 1)}, {"precisions": precisions().int()},
    {"precisions": precisions().T.contiguous().T},
]  # fmt: skip
SUBLAYERS = [{"sublayer": 2 * L + 1}, {"sublayer": -1}]
NO_INT8 = {"precisions": torch.full((B, 2 * L + 1), 8, dtype=torch.uint8)}
NORMS = [{"norm_weight": torch.ones(C - 1)}, {"norm_weight": torch.ones(C, dtype=HALF)}]
CACHES = [
    {"v_cache": torch.zeros(SLOTS, H_KV, S - 1, D)}, {"v_cache": cache()["v_cache"].to(HALF)},
    {"k_cache": cache()["k_cache"].transpose(1, 2)},
]  # fmt: skip
# Of both passes of a round; what a layer's tensors are is the table's affair.
ROUNDS = [
    {"token_ids": torch.full((B, W), V)}, {"token_ids": torch.full((B, W), -1)},
    {"token_ids": torch.full((W, B), V - 1).T}, {"token_ids": ints((1,), (1,))},
    {"token_ids": torch.full((B + 1, W), V - 1)}, {"first": ints(-9, 12)}, {"first": ints(0)},
    {"slots": ints(3, 0)}, {"slots": ints(0, -1)}, {"slots": ints(0, 1, dtype=torch.int64)},
    {"num_drafted": ints(3)}, {"num_wanted": ints(5, 3, 3)},
    {"stop_probability": torch.zeros(B, dtype=torch.float64)},
    {"sampling": sample_params(top_k=ints(1))}, {"sampling": sample_params(seed=ints(1, 2))},
    {"sampling": sample_params(end_ids=ints(1, 2))}, {"states": torch.zeros(SLOTS, S - 1, C)},
    {"states": torch.zeros(SLOTS - 1, S, C)}, {"embedding": torch.randn(V - 1, C)},
    {"embedding": torch.randn(C, V).T}, {"lm_head": dense(V, C + 1)},
    {"final_norm": torch.ones(C + 1)}, {"table": layer_table([layer()])}, cache(L + 1),
    {"v_cache": cache(L + 1)["v_cache"]}, {"k_cache": cache(L)["k_cache"].to(HALF)},
    {"cos": torch.ones(S - 3, D // 2), "sin": torch.ones(S - 3, D // 2)},
    {"sin": torch.ones(S, D // 2 - 1)},
]  # fmt: skip
BEYOND: dict[str, list[dict[str, Any]]] = {
    "qkv": [
        *OUTSIDE_THE_CACHE, *PRECISIONS, *SUBLAYERS, NO_INT8, *NORMS, *CACHES,
        {"cos": torch.ones(S - 1, D // 2), "sin": torch.ones(S - 1, D // 2)},
        {"cos": torch.ones(S - 1, D // 2)}, {"q_norm": torch.ones(D - 1)},
        {"qkv_bias": torch.ones(NUM_QKV - 1)}, {"qkv": dense(NUM_QKV, C - 1)},
        {"qkv": dense(2 * H_KV * D, C)}, {"x": torch.randn(B * T - 1, C)},
    ],
    "attention": [
        *OUTSIDE_THE_CACHE, *PRECISIONS, *SUBLAYERS, *CACHES, {"q": torch.randn(B * T + 1, H, D)},
        {"q": torch.randn(B * T, 3, D)}, {"q": torch.randn(B * T, H, D + 1)},
    ],
    "residual": [
        *PRECISIONS, *SUBLAYERS, NO_INT8, {"residual": torch.randn(B * T - 1, C)},
        {"residual": torch.randn(B * T, C - 1)}, {"x": torch.randn(B * T, F + 1)},
        {"residual": torch.randn(C, B * T).T}, {"x": torch.randn(B * T, F, dtype=HALF)},
    ],
    "mlp": [
        *PRECISIONS, *SUBLAYERS, NO_INT8, *NORMS, {"x": torch.randn(B * T, C + 1)},
        {"gate_up": dense(2 * F + 1, C)},
    ],
    "head": [*PRECISIONS, *SUBLAYERS, NO_INT8, *NORMS, {"x": torch.randn(B * T, C - 1)}],
    "layers": [
        *OUTSIDE_THE_CACHE, *PRECISIONS, NO_INT8, {"precisions": precisions()[:, :-1].contiguous()},
        {"layers": [layer()]}, {"table": layer_table([layer()])}, {"x": torch.randn(B * T + B, C)},
        {"x": torch.randn(B * T, C + 1)}, {"x": torch.randn(C, B * T).T},
        {"cos": torch.ones(S - 1, D // 2), "sin": torch.ones(S - 1, D // 2)},
        *({name: layers_operands(**changes)[name] for name in ("layers", "table")}
          for changes in ({"k_norm": torch.ones(D - 1)}, {"q_norm": torch.ones(D + 1)})),
        {"layers": (halves := [layer_of(HALF) for _ in range(L)]), "table": layer_table(halves)},
        {"sin": torch.ones(S, D // 2 - 1)}, {"v_cache": cache(L + 1)["v_cache"]}, cache(L - 1),
        {"k_cache": torch.zeros(L, SLOTS, 3, S, D), "v_cache": torch.zeros(L, SLOTS, 3, S, D)},
    ],
    "sample": [
        {"logits": torch.randn(3, V)}, {"logits": torch.randn(B, 0)},
        {"position": ints(3, 4, 5, dtype=torch.int64)},
        *({"params": sample_params(**changes)} for changes in (
            {"top_k": ints(1)}, {"seed": ints(1, 2)}, {"min_p": torch.zeros(B + 1)},
            {"top_p": torch.ones(B, dtype=torch.float64)}, {"end_ids": ints(V, -1)},
        )),
    ],
    "verify": [
        *ROUNDS, {"width": 0}, {"width": W + 1}, {"num_drafted": ints(T, 1)},
        {"first": ints(0, 15)}, *PRECISIONS, NO_INT8,
        {"precisions": precisions()[:, :-1].contiguous()},
    ],
    "draft": [
        *ROUNDS, {"num_wanted": ints(W, 3)}, {"num_drafted": ints(W, 1), "num_wanted": ints(W, W)},
        {"first": ints(0, 14)}, {"slot_precisions": torch.full((SLOTS, 2 * L + 1), 8, dtype=U8)},
        {"slot_precisions": torch.full((SLOTS - 1, 2 * L + 1), 16, dtype=U8)},
        {"slot_precisions": torch.full((SLOTS, 2 * L), 16, dtype=U8)},
        {"slot_precisions": torch.full((SLOTS, 2 * L + 1), 16)},
    ],
}  # fmt: skip
CASES = [(name, i) for name, changes in BEYOND.items() for i in range(len(changes))]


def launch(name: str, operands: dict[str, Any]) -> None:
    """Call a launcher: what a record holds is given here by the names of its tensors."""
    given = dict(operands)

    def take(names: str) -> list[Any]:
        return [given.pop(name) for name in names.split()]

    if name in ("verify", "draft"):
        LAUNCHERS[name][0](**given)
        return
    if "positions" in given:
        given["rows"] = rows_at(*take("positions num_tokens slots"))
    if "cos" in given:
        given["rotary"] = RotaryTable(*take("cos sin"))
    if "qkv" in given:
        given["layer"] = qkv_layer(*take("norm_weight qkv qkv_bias q_norm k_norm"))
    if "k_cache" in given and name != "layers":
        given["cache"] = LayerCache(*take("k_cache v_cache"))
    LAUNCHERS[name][0](**given)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_operands_at_the_very_end_are_taken(name):
    launch(name, LAUNCHERS[name][1]())


@pytest.mark.parametrize(("name", "i"), CASES)
def test_one_value_beyond_is_refused(name, i):
    operands = LAUNCHERS[name][1]() | BEYOND[name][i]
    # An index that torch itself looks up is refused by torch.
    with pytest.raises((AssertionError, IndexError)):
        launch(name, operands)


OWN = Dense(torch.randn(C, F))
CODES, SCALE = torch.zeros(C, F, dtype=torch.int8), torch.ones(C)


@pytest.mark.parametrize(
    "changes",
    [
        {"down": Weight(OWN, Int8(CODES, SCALE))}, {"k_norm": None}, {"q_norm": None},
        {"attn_norm": torch.ones(C, dtype=HALF)},
        {"down": Weight(OWN, Int8(torch.zeros(C, F), SCALE))},
    ],
)  # fmt: skip
def test_a_layer_that_is_no_whole_is_in_no_table(changes):
    with pytest.raises(AssertionError):
        layer_table([layer(**changes), layer(**changes)])


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_norm": torch.ones(C - 1)}, {"mlp_norm": torch.ones(C + 1)}, {"qkv_bias": None},
        {"qkv_bias": torch.ones(NUM_QKV - 1)}, {"q_norm": torch.ones(D + 1)}, {"k_norm": None},
        {"qkv": dense(NUM_QKV - 1, C)},
        {"attn_out": dense(C, H * D - 1)},
        {"gate_up": dense(2 * F - 1, C)},
        {"down": dense(C - 1, F)}, {"down": Weight(Dense(torch.randn(F, C).T))},
        {"down": Weight(OWN, Int8(CODES, SCALE))},
    ],
)  # fmt: skip
def test_a_layer_unlike_the_first_is_in_no_table(changes):
    with pytest.raises(AssertionError):
        layer_table([layer(), layer(**changes)])
