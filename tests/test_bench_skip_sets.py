"""Skip sets judged on the answers of every domain, without a clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_bench_routing import DOMAINS, INT8, MATH, MIX, library_of
from tiny import tiny_llm

from bench.arms import Run
from bench.skip_sets import (
    double_search,
    judge,
    print_skip_sets,
    skip_sets,
    summarise_skip_sets,
)
from bench.stream import Measured, Prompt
from engine import SamplingParams
from models.plan import NGRAM, OFF, DraftPlan
from router.fingerprint import fingerprint
from router.matchness import Matchness, Trace, acceptance

SQL = DraftPlan.skipping("sql-skip", 2, (0, 1), ())
AGAIN = replace(MATH, name="math-skip-2", sublayers=SQL.sublayers)
MIXED = DraftPlan.skipping("sql-int8-skip", 2, (), (1,), precision=8)
PLANS = (OFF, NGRAM, INT8, MATH, AGAIN, SQL, MIX, MIXED)


def row_of(domain, token_ids):
    return Measured(domain, {"off": Run(tuple(token_ids))}, domain, False, [1.0], torch.zeros(8))


def test_only_full_precision_skip_sets_are_judged():
    assert skip_sets(library_of(PLANS)) == [MATH, AGAIN, SQL, MIX]
    assert skip_sets(library_of((OFF, NGRAM, INT8))) == []
    assert double_search(library_of(PLANS)) == {"math": ["math-skip", "math-skip-2"]}
    assert double_search(library_of((OFF, NGRAM, INT8, MATH))) == {}


def test_a_set_is_worth_what_it_accepts_at_its_cost():
    llm = tiny_llm()
    model = llm.model
    library = library_of(PLANS, size=model.config.hidden_size, mark=fingerprint(model))
    prompts = [Prompt("math", (5, 6, 7, 5)), Prompt("sql", (9, 8, 1)), Prompt("sql", (3, 3))]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, speculative="off")
    answers = [llm.generate([p.token_ids], params)[0].outputs[0].token_ids for p in prompts]
    rows = [row_of(p.domain, answer) for p, answer in zip(prompts, answers, strict=True)]
    table = judge(llm, prompts, rows, library)
    assert list(table) == ["math", "sql"]  # no prompt is of the third domain
    traces = [
        Trace(p.token_ids, answer) for p, answer in zip(prompts[1:], answers[1:], strict=True)
    ]
    for plan in skip_sets(library):
        rate = acceptance(Matchness(model, traces).agreement(plan))
        cost = llm.costs.of_draft(plan)
        expected = llm.costs.best_length(cost, rate, rate, plan.max_draft)[1]
        assert table["sql"][plan.name] == expected


def test_summary_of_a_made_up_table(capsys):
    table = {
        "math": {"math-skip": 1.2, "math-skip-2": 1.1, "sql-skip": 1.0, "mix-skip": 1.1},
        "sql": {"math-skip": 0.9, "math-skip-2": 0.8, "sql-skip": 1.4, "mix-skip": 1.3},
    }
    library = library_of(PLANS)
    found = summarise_skip_sets(table, library)
    assert found == {
        "own": 1.3,
        "of_other_domains": 0.95,
        "of_all_domains": 1.2,
        "twice": {"math": {"math-skip": 1.2, "math-skip-2": 1.1}},
        # math-skip leaves out one sub-layer, sql-skip and math-skip-2 that one and another.
        "overlap": {"of_domains": 0.5, "of_two_searches": {"math": 0.5}},
    }
    print_skip_sets(table, found)
    out = capsys.readouterr().out
    assert "own set 1.3" in out and len([li for li in out.splitlines() if "  1.400" in li]) == 1


@pytest.mark.parametrize("table", [{}, {DOMAINS[0]: {"math-skip": 1.0}}], ids=["none", "one"])
def test_nothing_is_said_of_fewer_than_two_domains(table, capsys):
    found = summarise_skip_sets(table, library_of(PLANS))
    assert found is None
    print_skip_sets(table, found)
    assert "fewer than two domains" in capsys.readouterr().out
