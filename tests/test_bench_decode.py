"""The decoding benchmark: its flags, peers at a shape, and the arms on a widened model."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import to_hf_state_dict
from tiny import family_config, tiny_llama
from tokenizers_for_tests import CHAT_TEMPLATE, byte_tokenizer
from transformers import GenerationMixin

import bench.decode as decode
import bench.passes as passes
import bench.peers as peers
from bench.report import CheckError
from engine.loading import Loaded
from models.chat_template import ChatTemplate
from models.widen import WIDENINGS, Widening

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (passes, "--device cpu", "--shape is for --device cuda, got cpu"),
        (passes, "--device cpu --peer transformers", "is for --device cuda, got cpu"),
        (decode, "--peer transformers --device cuda", "--peer is for --device cpu"),
        (decode, "--peer transformers --prompts x", "--prompts does not go with --peer"),
        (decode, "--peer transformers --widen 6b", "--widen does not go with --peer"),
        (passes, "--new-tokens 9", "--new-tokens does not go with"),
        (passes, "--peer transformers --contexts 256", "--contexts does not go with --peer"),
        (passes, "--contexts 256,8", "got '8', expected a number from 64"),
        (passes, "--contexts 256,", "got '', expected a number from 64"),
        (decode, "--repeats 0", "got '0', expected a number from 1"),
        (decode, "--new-tokens 1", "got '1', expected a number from 2"),
        (passes, "--shape gpt-2", "invalid choice: 'gpt-2'"),
        (decode, "--widen 7x", "invalid choice: '7x'"),
    ],
)
def test_flags_that_do_not_go_together(command, argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(argv.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in error and message in error, error


def test_defaults_of_the_modes():
    args = decode.parse([])
    assert (args.repeats, args.new_tokens, args.per_domain) == (3, 128, 4)
    assert args.domains.split(",") == list(decode.DOMAINS)
    assert decode.parse(["--peer", "transformers"]).repeats == 5
    shape = ["--device", "cuda", "--shape", "llama-3-8b"]
    args = passes.parse(shape)
    assert (args.repeats, args.contexts) == (7, [256, 4096, 32768])
    assert passes.parse([*shape, "--contexts", "4096,64"]).contexts == [4096, 64]
    assert passes.parse([*shape, "--peer", "transformers"]).repeats == 3


def test_quick_changes_what_was_not_asked_for():
    args = decode.parse(["--quick", "--repeats", "2"])
    assert (args.repeats, args.new_tokens, args.per_domain) == (2, 16, 1)
    assert decode.parse(["--quick", "--peer", "transformers"]).repeats == 1
    assert passes.parse(["--quick"]).contexts == [256]


@no_gpu
@pytest.mark.parametrize(
    ("command", "rest"),
    [
        (decode, ""),
        (passes, "--shape llama-2-7b"),
        (decode, "--widen 6b"),
        (passes, "--shape llama-3-8b --peer transformers"),
    ],
)
def test_without_a_gpu_one_line_says_so(command, rest, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--device", "cuda", *rest.split()])
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert (
        error.startswith("error: device: got 'cuda', but 0 CUDA devices")
        and len(error.splitlines()) == 1
    )


def test_failed_checks_end_the_command_with_1(monkeypatch, capsys):
    def fail(_args):
        raise CheckError("rows: differ")

    monkeypatch.setattr(decode, "run", fail)
    with pytest.raises(SystemExit) as stopped:
        decode.main([])
    assert stopped.value.code == 1 and capsys.readouterr().err == "error: rows: differ\n"


def test_a_wide_model_is_not_for_a_cpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        decode.main(["--device", "cpu", "--widen", "6b"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: widen: 6b has a hidden size of 4096, expected at most 1024 on a CPU; "
        "use --device cuda\n"
    )


def test_arms_on_a_widened_model(monkeypatch, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    config = family_config("llama2", vocab_size=tokenizer.vocab_size, max_positions=2048)
    template = ChatTemplate(CHAT_TEMPLATE, "test")
    loaded = Loaded("tiny", tiny_llama(config), tokenizer, template, {})
    monkeypatch.setattr(decode, "load", lambda *_: loaded)
    monkeypatch.setattr("engine.prepare.profile_path", lambda _: tmp_path / "profile.json")
    monkeypatch.setitem(WIDENINGS, "small", Widening(96, 2, 2))
    few = ["--per-domain", "1", "--new-tokens", "6", "--repeats", "1"]
    decode.main(["--widen", "small", "--domains", "math,code", *few])
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert result["identical"] and result["widening"] == "small"
    assert list(result["domains"]) == ["math", "code"]
    assert result["auto_speedup_total"] > 0 and result["auto_speedup_mean"] > 0
    assert any(line.startswith("tiny as small: ") for line in out)


@pytest.mark.parametrize("family", ["llama2", "qwen2-group1"])
@pytest.mark.parametrize("free", [1 << 40, peers.MARGIN + (1 << 20)], ids=["both", "one"])
def test_peers_at_a_shape(family, free, monkeypatch, capsys):
    config = family_config(family, bos_token_id=None, eos_token_ids=())
    monkeypatch.setattr(peers, "free_bytes", lambda _: free)
    modes = []
    generate = GenerationMixin.generate

    def noting(*args, **kwargs):
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return generate(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", noting)
    result = peers.compare_shape("tiny", config, 6, 2, torch.device("cpu"))
    assert result["alternated"] == (free == 1 << 40)
    assert list(result["peer_tokens_per_second"]) == ["eager", "static_compile"]
    assert all(ratio > 0 for ratio in result["ratio"].values())
    assert "ratio: " in capsys.readouterr().out.splitlines()[-1]
    assert set(modes) == {(False, False)}
    with pytest.raises(ValueError, match="tiny needs 3 GB, got 0 GB"):
        monkeypatch.setattr(peers, "free_bytes", lambda _: 5)
        peers.compare_shape("tiny", config, 6, 2, torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama2", "smollm2-group3", "qwen2-group1"])
def test_peers_have_the_same_parameters(family):
    import transformers

    model = tiny_llama(family_config(family))
    peer = transformers.AutoModelForCausalLM.from_config(peers.peer_config(model.config))
    shapes = {name: p.shape for name, p in peer.named_parameters()}
    assert shapes == {
        name: tensor.shape for name, tensor in to_hf_state_dict(model.config, model.weights).items()
    }
    assert peer.config.rope_parameters["rope_theta"] == model.config.rope_theta
    assert peer.generation_config.eos_token_id is None


@pytest.mark.gpu
def test_peers_at_a_shape_on_a_gpu():
    config = family_config("llama2", hidden_size=256, head_dim=64, bos_token_id=None)
    result = peers.compare_shape("small", config, 8, 1, torch.device("cuda"))
    assert all(ratio > 0 for ratio in result["ratio"].values())
