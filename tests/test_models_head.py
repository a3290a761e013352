"""A head stored beside the embedding where config.json says tied: kept where it differs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import (
    hf_config,
    tiny_config,
    to_hf_state_dict,
    write_hf_checkpoint,
    write_safetensors,
)
from refusals import check_words, refusal
from safetensors.torch import save_model
from tokenizers_for_tests import byte_tokenizer, write_byte_tokenizer

from engine.loading import Forms, load
from models.checkpoint import Checkpoint, open_checkpoint
from models.llama import logits
from models.weights import LlamaWeights, load_weights, random_weights

CPU = torch.device("cpu")
CONFIG = tiny_config(tie_embeddings=True, vocab_size=byte_tokenizer().vocab_size)
EMBEDDING = random_weights(CONFIG, seed=0).embedding
OTHER = EMBEDDING.roll(1, 0)


def stored(folder: Path, head: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint whose configuration says tied, with a head beside an embedding of `dtype`."""
    weights = random_weights(CONFIG, seed=0)
    write_hf_checkpoint(folder, CONFIG, weights)
    state = {name: t.to(dtype) for name, t in to_hf_state_dict(CONFIG, weights).items()}
    write_safetensors(folder, state | ({} if head is None else {"lm_head.weight": head}))
    write_byte_tokenizer(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaWeights:
    return load_weights(
        open_checkpoint(folder), device="cpu", dtype=torch.float32, matrix_dtype=dtype
    )


def test_another_head_is_kept_as_by_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = loaded(stored(tmp_path, OTHER))
    assert not weights.is_tied
    assert torch.equal(weights.lm_head.own.values, OTHER) and torch.equal(
        weights.embedding, EMBEDDING
    )
    (record,) = (record for record in caplog.records if record.name == "models.weights")
    message = record.getMessage()
    assert record.levelno == logging.WARNING and message.isprintable()
    check_words(message, str(tmp_path), "lm_head.weight differs", "tied")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(oracle.lm_head.weight, OTHER)
    assert torch.equal(oracle.model.embed_tokens.weight, EMBEDDING)


def test_the_model_says_what_it_is(tmp_path: Path) -> None:
    """The tied configuration would write or count one matrix where there are two."""
    model = load(stored(tmp_path, OTHER), None, CPU, Forms(torch.float32), None, None).model
    assert not model.config.tie_embeddings
    assert torch.equal(to_hf_state_dict(model.config, model.weights)["lm_head.weight"], OTHER)
    x = torch.randn(3, CONFIG.hidden_size)
    plan = torch.full((1, 2 * CONFIG.num_layers + 1), 16, dtype=torch.uint8)
    hf = transformers.AutoConfig.for_model(**hf_config(CONFIG))
    norm = transformers.AutoModelForCausalLM.from_config(hf).model.norm
    norm.weight.data = model.weights.final_norm
    with torch.no_grad():
        expected = norm(x) @ OTHER.T
    torch.testing.assert_close(logits(model, x, plan, model.decode_ops), expected)


@pytest.mark.parametrize("head", [EMBEDDING, None])
def test_the_same_head_or_none_stays_tied(
    head: torch.Tensor | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = loaded(stored(tmp_path, head))
    assert weights.is_tied and weights.lm_head.own.values is weights.embedding
    assert torch.equal(weights.embedding, EMBEDDING) and not caplog.records
    assert load(tmp_path, None, CPU, Forms(torch.float32), None, None).model.config.tie_embeddings


def test_a_shared_matrix_under_the_name_of_the_head(tmp_path: Path) -> None:
    """As `safetensors.torch.save_model` leaves it; transformers ties in both directions."""
    oracle = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**hf_config(CONFIG))
    )
    oracle.load_state_dict(to_hf_state_dict(CONFIG, random_weights(CONFIG, seed=0)), strict=False)
    oracle.tie_weights()
    write_hf_checkpoint(tmp_path, CONFIG, random_weights(CONFIG, seed=0))
    save_model(oracle, tmp_path / "model.safetensors")
    weights = loaded(tmp_path)
    assert weights.is_tied and torch.equal(weights.embedding, EMBEDDING)
    untied = json.dumps(hf_config(CONFIG) | {"tie_word_embeddings": False})
    (tmp_path / "config.json").write_text(untied)
    check_words(refusal(loaded, tmp_path), "has no tensor model.embed_tokens.weight")


def test_heads_are_compared_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    folder = stored(tmp_path, EMBEDDING.bfloat16())
    assert loaded(folder, torch.bfloat16).is_tied
    weights = loaded(folder)
    assert not weights.is_tied
    assert torch.equal(weights.lm_head.own.values, EMBEDDING.bfloat16().float())
    wide = stored(tmp_path / "wide", EMBEDDING.bfloat16().float(), torch.bfloat16)
    assert loaded(wide).is_tied


def test_heads_that_are_kept_as_stored_are_compared_in_float32(tmp_path: Path) -> None:
    folder = stored(tmp_path, EMBEDDING.bfloat16())
    weights = load_weights(open_checkpoint(folder), device="cpu", dtype=torch.float32)
    assert not weights.is_tied
    assert torch.equal(weights.lm_head.own.values, EMBEDDING.bfloat16())
    wide = stored(tmp_path / "wide", EMBEDDING.bfloat16().float(), torch.bfloat16)
    weights = load_weights(open_checkpoint(wide), device="cpu", dtype=torch.float32)
    assert weights.is_tied and weights.embedding.dtype == torch.bfloat16


def test_one_value_in_the_last_piece_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = EMBEDDING.clone()
    head[-1, -1] += 1
    monkeypatch.setattr("models.weights._PIECE", 3 * CONFIG.hidden_size)
    assert not loaded(stored(tmp_path, head)).is_tied
    assert loaded(stored(tmp_path, EMBEDDING.clone())).is_tied


@pytest.mark.parametrize("shape", [(5, 64), (64,), (259, 65)])
def test_a_head_of_another_shape_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = stored(tmp_path, torch.ones(shape))
    check_words(refusal(loaded, folder), "tensor lm_head.weight has shape", str(shape))


def test_a_head_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        head = EMBEDDING.clone()
        head[3, 4] = value
        check_words(refusal(loaded, stored(tmp_path, head)), "lm_head.weight", "finite")


def test_comparing_copies_neither_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared are views of the mapped file, a piece at a time."""
    folder = stored(tmp_path, EMBEDDING.clone())
    pieces: list[int] = []
    real = torch.equal

    def equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        pieces.append(len(ours))
        return real(ours, theirs)

    monkeypatch.setattr("models.weights._PIECE", 10 * CONFIG.hidden_size)
    monkeypatch.setattr("models.weights.torch.equal", equal)
    assert loaded(folder).is_tied
    assert max(pieces) == 10 and sum(pieces) == CONFIG.vocab_size


def test_a_model_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 8.00 EiB")

    checkpoint: Checkpoint = open_checkpoint(stored(tmp_path, None))
    monkeypatch.setattr("models.arena.np.empty", full)
    message = refusal(load_weights, checkpoint, device="cpu", dtype=torch.float32)
    check_words(message, "the weights need 0.0 GB", "choose a smaller model")
