"""Arms on a model whose prefill, like that of a GPU, depends on its number of rows."""

from __future__ import annotations

from dataclasses import replace

from test_bench_routing import DOMAINS, MATH, library_of
from tiny import IN_TURN, tiny_llm
from tokenizers_for_tests import CHAT_TEMPLATE

from bench.decode import make_arms, measure_prompt
from bench.routing import summarise, summarise_streams
from bench.streams import (
    Arm,
    Prompt,
    answer,
    is_same,
    make_experiment,
    read_afresh,
    run_streams,
)
from bench.streams import measure_prompt as measure_on_stream
from engine import LLM
from kernels.ops_cpu import NUMBA
from models.chat_template import ChatTemplate
from models.plan import NGRAM, OFF, DraftPlan
from router.fingerprint import fingerprint

# They begin alike, as chat templates let all prompts do.
PROMPTS = [Prompt("math", (5, 6, 7, 5, 6)), Prompt("qa", (5, 6, 7, 9)), Prompt("math", (5, 6, 1))]


def run_layers(x, *args):
    """Far more than a rounding, so that any answer shows it, and not only a near-tie."""
    x *= x.shape[0]
    NUMBA.run_layers(x, *args)


def uneven_llm() -> LLM:
    template = ChatTemplate(CHAT_TEMPLATE, "test")
    ops = replace(IN_TURN, run_layers=run_layers)
    return tiny_llm(prefill_ops=ops, chat_template=template, router="none")


def answers(llm: LLM, prompt: Prompt, is_afresh: bool) -> set[tuple[int, ...]]:
    """What is answered after each of the other prompts, twice."""
    found = set()
    for before in PROMPTS:
        answer(llm, before.token_ids, Arm("off"), 12)
        if is_afresh:
            read_afresh(llm, prompt.token_ids)
        for _ in range(2):
            found.add(answer(llm, prompt.token_ids, Arm("off"), 12).token_ids)
    return found


def test_a_prompt_that_is_read_afresh_has_one_answer():
    llm = uneven_llm()
    assert all(len(answers(llm, prompt, is_afresh=True)) == 1 for prompt in PROMPTS)
    assert any(len(answers(llm, prompt, is_afresh=False)) > 1 for prompt in PROMPTS)


def test_every_run_of_a_prompt_finds_the_same_prefix():
    llm = uneven_llm()
    runs = measure_prompt(llm, "What is a bicycle?", make_arms(llm), 12, repeats=2)
    assert list(runs) == ["off", "ngram", "int8", "auto"]
    assert all(is_same([run]) and len(run) == 2 for run in runs.values())
    assert all(is_same([runs["off"], run]) for run in runs.values())


def test_the_order_of_a_stream_does_not_matter():
    llm = uneven_llm()
    config = llm.model.config
    plans = (OFF, NGRAM, DraftPlan.int8(config.num_layers), MATH)
    library = library_of(plans, size=config.hidden_size, mark=fingerprint(llm.model))
    assert library.num_layers == config.num_layers and library.domains == DOMAINS
    experiment = make_experiment(library, "math", len(PROMPTS), seed=0)
    rows = [measure_on_stream(llm, p, experiment, i, 12, 2) for i, p in enumerate(PROMPTS)]
    assert summarise(rows, experiment)["identical"]
    orders = {0.0: [rows[0], rows[2], rows[1]], 1.0: rows[::-1]}
    arms = {name: experiment.arms[name] for name in ("knn", "int8")}
    streams = run_streams(llm, orders, arms, 12, segment=2)
    assert summarise_streams(streams, orders, "int8")["identical"]
