"""Speculative decoding in the chat: /spec, /verify, and what the statistics say of drafts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pexpect
import pytest
from fake_llm import FakeLLM
from forced import force_drafts, record_streams
from test_engine_repl import PROMPT, Chat
from tiny import tiny_llm
from tokenizers_for_tests import CHAT_TEMPLATE

import engine.chat.__main__
import engine.round
from engine.chat.commands import Repl, run_command
from engine.chat.conversation import Comparison, Conversation, ask, compare_with_plain
from engine.chat.repl import handle_input
from engine.llm import LLM
from engine.params import SamplingParams, Speculative
from models.chat_template import ChatTemplate
from models.plan import NGRAM, DraftPlan

Say = Callable[[str], tuple[str, str]]
QUESTION = [{"role": "user", "content": "abcabcabcab"}]
SAMPLED = SamplingParams(temperature=0.9, max_tokens=24)
HALF = DraftPlan("half", "self", (16, 0, 8, 16))
RERUN = "re-running {} tokens without drafts; {} of them were drafted\n"


@pytest.fixture
def fake() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def repl(fake: FakeLLM) -> Repl:
    return Repl(fake, SamplingParams(), Conversation())


@pytest.fixture
def say(repl: Repl, capsys: pytest.CaptureFixture[str]) -> Say:
    """Give the chat one input; returns what it wrote to stdout and to stderr."""

    def handle(text: str) -> tuple[str, str]:
        capsys.readouterr()
        handle_input(repl, text)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return handle


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "my plan.json"
    path.write_text(HALF.to_json())
    return path


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm(chat_template=ChatTemplate(CHAT_TEMPLATE, "test"), speculative="int8")


@pytest.fixture
def liar(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """An engine that gets the first token after a draft wrong, and nothing else."""
    honest = engine.round._accept

    def accept(row):
        verdict = honest(row)
        if verdict.num_drafted:
            verdict.token_ids[-1] ^= 1
        return verdict

    monkeypatch.setattr(engine.round, "_accept", accept)
    return llm


@pytest.mark.parametrize(
    ("text", "value", "line"),
    [
        ("off", "off", "off (no drafts)"),
        ("auto", "auto", "auto (int8+ngram)"),
        ("ngram", "ngram", "ngram"),
        ("int8", "int8", "int8"),
    ],
)
def test_spec_changes_the_following_answers(
    text: str, value: Speculative, line: str, repl: Repl, fake: FakeLLM, say: Say
) -> None:
    say("hello")
    assert fake.params.speculative is None
    assert say(f"/spec {text}") == ("", f"speculative  {line}\n")
    say("/set seed 3")
    say("hello")
    assert (fake.params.speculative, fake.params.seed) == (value, 3)
    assert say("/spec") == ("", f"speculative  {line}\n")


def test_spec_keeps_the_plan_of_a_file(
    repl: Repl, fake: FakeLLM, say: Say, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(plan_file.parent))
    for name in (str(plan_file), f"~/{plan_file.name}"):
        say("/spec off")
        assert say(f"/spec {name}") == (
            "",
            f"speculative  {name.replace('~', str(plan_file.parent))} (half)\n",
        )
        assert repl.params.speculative == HALF
    plan_file.write_text(DraftPlan("nothing", "off").to_json())
    say("hello")
    assert fake.params.speculative == HALF
    assert say("/spec") == ("", "speculative  half\n")
    assert say(f"/spec {plan_file}")[1].endswith(" (no drafts)\n")
    assert repl.params.speculative == "off"


def test_spec_on_is_what_the_command_line_said(say: Say, repl: Repl, plan_file: Path) -> None:
    for command_line, expected in (("auto", "auto"), ("off", "auto"), ("ngram", "ngram")):
        repl.llm.speculative = command_line
        say("/spec off")
        say("/spec on")
        assert repl.params.speculative == expected
    repl.llm.speculative = (HALF, NGRAM)
    assert say("/spec on")[1] == "speculative  half+ngram\n"
    assert repl.params.speculative == (HALF, NGRAM)
    repl.llm.speculative, repl.params = str(plan_file), SamplingParams()
    assert say("/spec")[1] == f"speculative  {plan_file} (half)\n"
    say("/spec on")
    assert repl.params.speculative == HALF
    plan_file.write_text(DraftPlan("nothing", "off").to_json())
    say("/spec on")
    assert repl.params.speculative == "auto"


def test_wrong_spec_is_one_line_and_changes_nothing(
    say: Say, repl: Repl, tmp_path: Path, plan_file: Path
) -> None:
    plan_file.write_text(DraftPlan.int8(3).to_json())
    say("/spec ngram")
    before = repl.params
    for wrong in ("int9", "ON", "\x1b[2J", "auto off", str(tmp_path), str(plan_file), "none.json"):
        out, err = say(f"/spec {wrong}")
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        assert "\x1b" not in err and repl.params is before
    assert "'int8'" in say("/spec int9")[1]


def test_show_and_spec_say_what_is_in_force(say: Say, fake: FakeLLM) -> None:
    assert "speculative  auto  (default)\n" in say("/show")[1]
    say("/spec ngram")
    assert "speculative  ngram\n" in say("/show")[1]
    fake.int8_bytes = 310_400_000
    assert say("/spec auto")[1] == "speculative  auto (int8+ngram); int8 weights take 310 MB\n"


def test_tab_completes_commands(tmp_path: Path) -> None:
    chat = Chat(tmp_path, "--speculative", "off")
    for typed, completed, line in (
        ("/veri", "fy", "no answer to verify"),
        ("/spec n", "gram", "speculative  ngram"),
    ):
        chat.child.expect(PROMPT)
        chat.child.send(typed)
        chat.child.expect_exact(typed)
        chat.child.send("\t")
        chat.child.expect_exact(completed)
        chat.child.send("\r")
        chat.child.expect_exact(line)
    chat.line("/spec on")
    chat.child.expect_exact("speculative  auto (int8+ngram)")
    chat.line("/exit")
    chat.leaves(0)


def test_verify_says_identical_or_the_first_difference(say: Say, fake: FakeLLM, repl: Repl) -> None:
    assert say("/verify") == ("", "no answer to verify\n")
    for question, num_tokens, verdict in (
        ("hello", 3, "identical (3 tokens)"),
        ("lie", 2, r"different at token 2 of 2: '\x1blie' (id 4) in the answer, 'truth' (id 5)"),
        ("long", 2, "different at token 2 of 2: 'end' (id 6) in the answer, its end"),
        ("short", 1, "different at token 2 of 1: its end in the answer, 'end' (id 6)"),
    ):
        say(question)
        before = list(repl.conversation.messages)
        for _ in range(2):
            end = "\n" if verdict.startswith("identical") else " without drafts\n"
            rerun = RERUN.format(num_tokens, num_tokens - 1)
            assert say("/verify") == ("", rerun + verdict + end)
            assert fake.asked[-1] == fake.asked[-2] and fake.params.speculative == "off"
        assert repl.conversation.messages == before and fake.num_closed == len(fake.asked)
    repl.params = replace(repl.params, speculative="off")
    say("/regen")
    assert say("/verify")[1] == RERUN.format(2, 0) + "identical (2 tokens)\n"


def test_verify_repeats_the_answer_and_not_the_settings(say: Say, fake: FakeLLM) -> None:
    say("/set temperature 0.7")
    say("draw")
    asked = fake.params
    assert asked.seed is not None
    for changed in ("/set seed 1", "/set temperature 0.1", "/set max_tokens 1"):
        say(changed)
    assert say("/verify")[1].endswith("identical (1 tokens)\n")
    assert fake.params == replace(asked, speculative="off")


def test_seeds_are_drawn_where_randomness_needs_one() -> None:
    def seed(generation: dict[str, object], **values: float | int) -> int | None:
        fake = FakeLLM(generation)
        answer = ask(fake, [{"role": "user", "content": "x"}], SamplingParams(**values), print)
        assert answer.params is fake.params
        return fake.params.seed

    assert seed({}) is None and seed({"temperature": 0.6}, temperature=0.0) is None
    assert seed({"temperature": 0.6, "do_sample": False}) is None
    assert seed({}, temperature=0.6, seed=5) == 5
    drawn = [seed({"temperature": 0.6}), seed({"temperature": 0.6}), seed({}, temperature=0.6)]
    assert None not in drawn and len(set(drawn)) == 3


def test_there_is_nothing_to_verify_elsewhere(say: Say, repl: Repl, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    for forget in ("/clear", "/system brief", f"/load {path}"):
        say("hello")
        say(f"/save {path}")
        assert say("/verify")[1].endswith("identical (3 tokens)\n")
        say(forget)
        assert say("/verify") == ("", "no answer to verify\n")
    assert repl.conversation.messages


def test_failed_requests(say: Say, repl: Repl, monkeypatch: pytest.MonkeyPatch) -> None:
    say("hello")
    assert say("failfirst")[1] == "error: the machine broke\n"
    assert say("/verify")[1].endswith("identical (3 tokens)\n"), "still the last answer"
    for error in (RuntimeError("all slots\nare held"), MemoryError()):

        def stream(prompt, params, error=error):
            raise error

        monkeypatch.setattr(repl.llm, "stream", stream)
        err = say("/verify")[1]
        assert re.fullmatch(r"re-running .*\nerror: (all slots are held|MemoryError)\n", err)


def test_verify_leaves_the_statistics_of_the_answer(say: Say, fake: FakeLLM) -> None:
    fake.int8_bytes = 3_000_000
    say("drafted")
    stats = say("/stats")[1]
    assert stats.count("\n") == 2 and "drafts int8+ngram" in stats and "int8 3 MB\n" in stats
    say("/verify")
    assert say("/stats")[1] == stats
    say("/spec off")
    say("drafted")
    assert say("/stats")[1].count("\n") == 1


def test_part_of_an_answer_is_verified_and_ctrl_c_stops_it(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    chat.line("slow")
    chat.child.expect_exact("word3 ")
    chat.child.sendintr()
    chat.line("/verify")
    chat.child.expect(r"re-running (\d+) tokens")
    assert 4 <= int(chat.child.match[1]) < 400
    chat.child.expect_exact(f"identical ({chat.child.match[1]} tokens)")
    chat.line("pause")
    chat.child.expect_exact("last")
    chat.line("/verify")
    chat.child.expect_exact("re-running 3 tokens")
    chat.child.sendintr()
    chat.child.expect(r"interrupted; the first [12] of 3 tokens are identical\r")
    chat.line("hello")
    chat.child.expect_exact("you said hello")
    chat.line("/exit")
    chat.leaves(0)


def test_second_interrupt_during_verify_leaves(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    chat.line("wait")
    chat.child.expect_exact("late")
    chat.line("/verify")
    chat.child.expect_exact("re-running 1 tokens")
    chat.child.sendintr()
    chat.child.expect(pexpect.TIMEOUT, timeout=0.2)
    chat.child.sendintr()
    chat.leaves(130)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_verify_with_a_real_engine(
    temperature: float,
    llm: LLM,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random.seed(1)
    force_drafts(monkeypatch, lambda: 3)
    repl = Repl(llm, replace(SAMPLED, temperature=temperature), Conversation())
    for question in ("abcabcabcab", "and now?"):
        handle_input(repl, question)
        num_tokens = repl.last_stats.generated_tokens
        assert repl.last_stats.plan == "int8" and repl.last_stats.accepted > 0
        capsys.readouterr()
        streams = record_streams(llm, monkeypatch)
        run_command(repl, "/verify")
        err = capsys.readouterr().err
        assert err.endswith(f"\nidentical ({num_tokens} tokens)\n"), err
        (plain,) = (stream.stats for stream in streams)
        assert plain.drafted == 0 and plain.generated_tokens == num_tokens


def test_verify_finds_what_a_lying_engine_says(
    liar: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    force_drafts(monkeypatch, lambda: 3)
    repl = Repl(liar, replace(SAMPLED, seed=1), Conversation())
    handle_input(repl, "abcabcabcab")
    answer = repl.conversation.last_answer
    wrong = next(i for i, event in enumerate(answer.events) if i and not event.from_draft)
    token_id = answer.events[wrong].token_id
    capsys.readouterr()
    streams = record_streams(liar, monkeypatch)
    run_command(repl, "/verify")
    err = capsys.readouterr().err
    place = f"different at token {wrong + 1} of {len(answer.events)}: "
    assert place in err and f"(id {token_id}) in the answer, " in err, err
    assert f"(id {token_id ^ 1}) without drafts\n" in err
    assert streams[0].stats.generated_tokens == wrong + 1, "it stops at the difference"


def test_comparison_ends_with_a_part_of_an_answer(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_drafts(monkeypatch, lambda: 3)
    checks: Iterator[bool] = iter([False] * 6 + [True])  # one after the prompt
    answer = ask(llm, QUESTION, replace(SAMPLED, seed=1), lambda text: None, lambda: next(checks))
    assert (len(answer.events), answer.finish_reason) == (5, None)
    streams = record_streams(llm, monkeypatch)
    assert compare_with_plain(llm, answer) == Comparison(5)
    assert compare_with_plain(llm, answer, lambda: True) == Comparison(1)
    assert [stream.stats.generated_tokens for stream in streams] == [5, 1]
    other = replace(answer.events[0], token_id=answer.events[0].token_id ^ 1)
    comparison = compare_with_plain(llm, replace(answer, events=(other, *answer.events[1:])))
    assert (comparison.num_same, comparison.is_different) == (0, True), "by id, not by text"


def test_json_has_the_statistics_of_drafts(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    force_drafts(monkeypatch, lambda: 3)
    monkeypatch.setattr(engine.chat.__main__, "load_llm", lambda args: llm)
    assert engine.chat.__main__.main(["-p", "abcabc", "--json", "--max-tokens", "12"]) == 0
    stats = json.loads(capsys.readouterr().out)["stats"]
    question = [{"role": "user", "content": "abcabc"}]
    known = llm.chat(question, SamplingParams(temperature=0, max_tokens=12)).stats
    assert stats["plan"] == "int8" and stats["rounds"] == known.rounds > 0
    assert stats["drafted"] == sum(stats["drafted_by_position"]) > 0
    assert stats["accepted"] == sum(stats["accepted_by_position"]) == known.accepted > 0
    assert stats["rounds_by_plan"] == known.rounds_by_plan
    assert stats["acceptance_rate"] == stats["accepted"] / stats["drafted"]
    assert stats["tokens_per_round"] == 11 / stats["rounds"]
    assert tuple(stats["acceptance_by_position"]) == known.acceptance_by_position
    assert len(stats["acceptance_by_position"]) == 3
