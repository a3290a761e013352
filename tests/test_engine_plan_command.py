"""The router in the chat: --router, /plan, /spec auto, the statistics, JSON."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
from fake_llm import DRAFTED, FakeLLM
from test_engine_routing import DOMAINS, GREEDY, library_for, one_plan
from tiny import tiny_llm
from tokenizers_for_tests import CHAT_TEMPLATE

import engine.chat.__main__
import engine.chat.commands
import engine.llm
from engine import SamplingParams
from engine.chat.commands import Repl
from engine.chat.conversation import Conversation
from engine.chat.repl import handle_input
from engine.chat.terminal import print_stats, route_line
from models.chat_template import ChatTemplate
from models.plan import OFF


@pytest.fixture
def llm():
    """A tiny model and the library of its prompts, given as the chat's template writes them."""
    llm = tiny_llm(chat_template=ChatTemplate(CHAT_TEMPLATE, "a test"))
    llm.use_library(library_for(llm))
    return llm


@pytest.fixture
def say(llm, capsys):
    """Give the chat one input; returns what it wrote to stderr."""
    repl = Repl(llm, SamplingParams(temperature=0, max_tokens=8), Conversation())

    def handle(text):
        capsys.readouterr()
        handle_input(repl, text)
        return capsys.readouterr().err

    handle.repl = repl
    return handle


def test_plan_shows_the_route_and_the_runners_up(say, llm):
    assert say("/plan").startswith("no routed answer yet")
    say("Hello, world")
    route = say.repl.last_route
    lines = say("/plan").splitlines()
    assert lines[0].startswith(("routed to plan ", "rejected, default plan "))
    assert route.plan.name in lines[0] and f"distance ratio {route.ratio:.2f}" in lines[0]
    assert "at least 1.50" in lines[0]
    assert len(lines) == 1 + len(DOMAINS)
    similarities = [float(line.split()[0]) for line in lines[1:]]
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[0] == pytest.approx(route.similarity, abs=1e-3)
    assert lines[1].split()[1] == route.domain
    for prompt, plan in DOMAINS.items():
        assert any(f"  {prompt[0]} (plan {plan.name})" in line for line in lines[1:])


def test_plan_says_when_a_prompt_was_rejected(say, llm):
    llm.use_library(replace(llm.router.library, min_ratio=1e9))
    say("Hello, world")
    assert say("/plan").startswith("rejected, default plan off; distance ratio ")


def test_plan_without_a_router(say, llm):
    llm.use_library(None)
    say("Hello, world")
    assert say("/plan") == "no router: drafts are as /spec says\n"


def test_plan_is_of_the_last_answer_and_not_of_its_verification(say):
    say("Hello, world")
    before = say("/plan")
    assert "identical" in say("/verify")
    assert say("/plan") == before
    say("/spec off")
    say("again")
    assert say("/plan").startswith("no routed answer yet")


def test_plan_is_of_the_last_answer_and_not_of_a_stopped_prompt(say, monkeypatch):
    say("Hello, world")
    before, stats = say("/plan"), say.repl.last_stats

    def stop(repl, has_started):
        return nullcontext(lambda: True)

    monkeypatch.setattr(engine.chat.commands, "_stoppable", stop)
    assert say("stopped").startswith("stopped before the first word")
    assert say("/plan") == before and say.repl.last_stats is stats


def test_a_new_turn_is_routed_anew(say):
    say("/stats on")
    routes = []
    for question in ("abcabcabcab", "The quick brown fox"):
        last = say(question).splitlines()[-1]
        routes.append(say.repl.last_route)
        assert last.startswith(f"route {routes[-1].domain}") and last.endswith(" us")
    assert routes[0].similarity != routes[1].similarity


def test_spec_auto_says_that_the_router_picks(say, llm):
    assert say("/spec auto").startswith("speculative  auto (what the router picks, see /plan)")
    llm.use_library(None)
    assert say("/spec auto").startswith("speculative  auto (int8+ngram)")


def test_statistics_take_a_line_for_the_route(capsys):
    routed = replace(
        DRAFTED, domain="math", similarity=0.98765, ratio=2.345, router_microseconds=432.1
    )
    line = "route math, similarity 0.988, ratio 2.35, 432 us"
    assert route_line(routed) == line
    rejected = route_line(replace(routed, is_rejected=True))
    assert rejected == line.replace("math", "math (unlike any, default plan)")
    assert "ratio inf" in route_line(replace(routed, ratio=math.inf))
    print_stats(routed)
    assert capsys.readouterr().err.count("\n") == 3
    print_stats(replace(routed, drafted=0))
    assert capsys.readouterr().err.count("\n") == 2


def test_the_command_line_hands_the_router_on(monkeypatch):
    for arguments, expected in ((["--router", "none"], "none"), ([], None)):
        asked = {}
        monkeypatch.setattr(
            engine.llm, "LLM", lambda *_, asked=asked, **options: asked.update(options)
        )
        engine.chat.__main__.load_llm(engine.chat.__main__._parser().parse_args(arguments))
        assert asked["router"] == expected


def test_a_wrong_router_is_one_line_and_exit_code_2(capsys, tmp_path):
    for value in (str(tmp_path), "no/such.safetensors", ""):
        assert engine.chat.__main__.main(["--router", value, "--prompt", "x"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: router: ") and err.count("\n") == 1


def test_json_has_the_route(llm, monkeypatch, capsys):
    monkeypatch.setattr(engine.chat.__main__, "load_llm", lambda args: llm)
    for library in (llm.router.library, one_plan(llm, OFF)):
        llm.use_library(library)
        assert engine.chat.__main__.main(["-p", "Hello", "--json", "--max-tokens", "4"]) == 0
        stats = json.loads(capsys.readouterr().out)["stats"]
        route = llm.chat([{"role": "user", "content": "Hello"}], GREEDY).route
        assert (stats["domain"], stats["similarity"]) == (route.domain, route.similarity)
        assert stats["is_rejected"] == route.is_rejected and stats["router_microseconds"] > 0
        assert stats["ratio"] == (None if math.isinf(route.ratio) else route.ratio)
    assert stats["ratio"] is None  # one plan for everything: JSON has no infinity


def test_a_fake_without_a_router_has_no_route_line(capsys):
    fake = FakeLLM()
    print_stats(fake.chat([{"role": "user", "content": "hello"}], GREEDY).stats)
    assert "route" not in capsys.readouterr().err
