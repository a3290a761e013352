"""The routing benchmark without its clock: streams, arms, summaries and pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny import tiny_llm

from bench.plots import moving_rate, plot_anchors, plot_plans, plot_stream, project
from bench.routing import (
    best_single,
    load_prompts,
    oracle_rate,
    parse,
    print_domain,
    print_summary,
    rate_of,
    summarise,
    summarise_streams,
)
from bench.streams import (
    Answer,
    Measured,
    Prompt,
    arms_of_prompt,
    fixed_library,
    make_experiment,
    make_stream,
    measure_prompt,
    run_streams,
    skip_library,
)
from engine.types import RequestStats
from models.plan import NGRAM, OFF, DraftPlan
from router.fingerprint import fingerprint
from router.library import RouterLibrary

LAYERS = 2
INT8 = DraftPlan.int8(LAYERS)
MIX = DraftPlan.skipping("mix-skip", LAYERS, (0,), ())
MATH = DraftPlan.skipping("math-skip", LAYERS, (1,), ())
SQL = DraftPlan.skipping("sql-int8-skip", LAYERS, (), (1,), precision=8)
DOMAINS = ("math", "sql", "chat")


def library_of(plans=(OFF, NGRAM, INT8, MATH, MIX, SQL), chosen=(2, 1, 2), size=8, mark="x"):
    """Two anchors a domain; the plan of each domain by its index."""
    anchors = torch.nn.functional.normalize(torch.randn(6, size), dim=-1)
    ids = torch.arange(3, dtype=torch.int32).repeat_interleave(2)
    of = torch.tensor(chosen, dtype=torch.int32)[ids.long()]
    return RouterLibrary(mark, LAYERS, DOMAINS, tuple(plans), 2, anchors, ids, of)


STATS = RequestStats(5, 4, 5, 0.0, 0.0, 0.0, rounds=2, router_microseconds=300.0)


def run_of(seconds, token_ids=(1, 2, 3, 4, 5)):
    return [Answer(token_ids, seconds, STATS)]


def row_of(domain, seconds, nearest=None, is_rejected=False):
    """A made-up prompt: `seconds` by name."""
    runs = {name: run_of(value) for name, value in seconds.items()}
    routed = replace(STATS, domain=nearest or domain, is_rejected=is_rejected,
                     router_microseconds=100.0)  # fmt: skip
    return Measured(Prompt(domain, ()), runs, routed, torch.randn(8))


def routed_to(plan, is_rejected=False):
    return replace(STATS, plan=plan, is_rejected=is_rejected)


SECONDS = {"off": 4.0, "ngram": 3.0, "int8": 2.0, "best-skip": 4.0, "fixed-skip": 4.0,
           "knn-skip": 4.0, "knn": 2.0, "auto": 2.0, "int8+ngram": 2.0, "random": 4.0}  # fmt: skip


def experiment_of(library=None, first="math"):
    return make_experiment(library or library_of(), first, num_prompts=4, seed=0)


def rows():
    fast = SECONDS | {"ngram": 1.0, "knn": 1.0}
    return [
        row_of("math", SECONDS),
        row_of("math", SECONDS, nearest="chat"),
        row_of("sql", fast),
        row_of("qa", SECONDS | {"knn": 3.2}, nearest="chat", is_rejected=True),
    ]


PROMPT_DOMAINS = [name for name in ("a", "b", "c", "d") for _ in range(6)]


def switches(order):
    named = [PROMPT_DOMAINS[i] for i in order]
    return sum(a != b for a, b in pairwise(named))


@pytest.mark.parametrize("mix", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_stream_has_every_prompt_once_and_repeats_by_seed(mix, seed):
    order = make_stream(PROMPT_DOMAINS, mix, seed)
    assert sorted(order) == list(range(len(PROMPT_DOMAINS)))
    assert order == make_stream(PROMPT_DOMAINS, mix, seed)
    assert len({tuple(make_stream(PROMPT_DOMAINS, mix, other)) for other in range(10)}) > 1


def test_mix_0_makes_blocks_and_mix_1_always_changes_while_it_can():
    for seed in range(20):
        assert switches(make_stream(PROMPT_DOMAINS, 0.0, seed)) == 3
        order = make_stream(PROMPT_DOMAINS, 1.0, seed)
        named = [PROMPT_DOMAINS[i] for i in order]
        for at, (domain, following) in enumerate(pairwise(named)):
            assert domain != following or set(named[at:]) == {domain}, named
    assert make_stream(["a", "a", "b"], 1.0, 3) != []
    assert make_stream([], 1.0, 0) == []


def test_a_mix_between_changes_about_that_often():
    domains = [name for name in ("a", "b", "c", "d", "e") for _ in range(200)]
    order = make_stream(domains, 0.3, 0)
    changes = sum(domains[a] != domains[b] for a, b in pairwise(order))
    assert 0.25 < changes / len(order) < 0.35


def test_the_skip_library_routes_among_skip_sets_only():
    library = library_of()
    skips = skip_library(library)
    names = [skips.plans[i].name for i in skips.anchor_plans.tolist()]
    assert names == ["math-skip"] * 2 + ["mix-skip"] * 4
    assert skips.plans[skips.default_plan] == MIX
    assert NGRAM not in skips.plans and INT8 not in skips.plans
    assert skips.min_ratio == 0 and torch.equal(skips.anchors, library.anchors)
    bare = skip_library(library_of(plans=(OFF, NGRAM, INT8, MATH)))
    assert [p.name for p in bare.plans] == ["off", "math-skip"]
    assert skip_library(library_of(plans=(OFF, NGRAM, INT8, MIX))) is None


def test_arms_that_the_library_has_no_plan_for_are_left_out():
    whole = experiment_of()
    assert not whole.missing
    assert whole.arms["best-skip"].speculative == MIX
    assert whole.arms["fixed-skip"].speculative == MATH
    assert list(whole.columns) == ["int8+ngram"]
    poor = experiment_of(library_of(plans=(OFF, NGRAM, INT8)), first="sql")
    assert poor.missing.keys() == {"best-skip", "fixed-skip", "knn-skip"}
    assert list(poor.arms) == ["off", "ngram", "int8", "knn", "auto"]
    assert experiment_of().drawn == whole.drawn


def test_without_ngrams_a_routed_plan_is_the_arm_of_its_name():
    library = library_of(plans=(OFF, MATH, INT8), chosen=(2, 2, 1))
    assert list(experiment_of(library).columns) == ["math-skip"]
    assert experiment_of(library).arms["int8"].library is None


def test_names_that_mean_the_same_share_a_run():
    library = library_of()
    experiment = experiment_of(library)
    everything = [*experiment.arms, *experiment.columns, "random"]
    arms = arms_of_prompt(experiment, INT8, routed_to("int8+ngram"))
    assert list(arms) == everything and len({*arms.values()}) == len(arms) - 2
    assert arms["int8+ngram"] is arms["random"] is arms["knn"]
    arms = arms_of_prompt(experiment, OFF, routed_to("int8+ngram", True))
    assert list(arms) == everything and len({*arms.values()}) == len(arms) - 1
    assert arms["random"] is arms["off"]
    arms = arms_of_prompt(experiment, SQL, routed_to("ngram"))
    assert list(arms) == everything and len({*arms.values()}) == len(arms)
    assert arms["random"].library.plans[arms["random"].library.default_plan] == SQL
    fixed = fixed_library(library, SQL)
    assert {library.plans[i] for i in fixed.anchor_plans.tolist()} == {SQL}


def test_rates_are_all_tokens_over_all_seconds():
    some = rows()[:3]
    assert rate_of(some, "off") == 12 / 12
    assert rate_of(some, "knn") == 12 / 5
    assert rate_of(some, "no such arm") is None and rate_of([], "off") is None
    assert oracle_rate(some) == 12 / 5


def test_summary_of_made_up_measurements(capsys):
    experiment = experiment_of()
    result = summarise(rows(), experiment)
    assert result["identical"]
    assert result["arms"]["knn"] == 2.4 and result["arms"]["off"] == 1.0
    assert result["arms"]["oracle"] == 2.4 and result["oracle_share"] == 1.0
    assert result["routing_accuracy"] == {"math": 0.5, "sql": 1.0}
    assert result["routing_accuracy_all"] == pytest.approx(2 / 3, abs=1e-3)
    assert result["rejected"] == {"math": 0.0, "sql": 0.0, "qa": 1.0}
    assert result["unknown_vs_off"] == 1.25
    assert result["router_microseconds"] == 200
    assert result["router_share"] == pytest.approx(200e-6 * 2.4 / 64, abs=1e-6)
    assert result["plans"]["sql"]["ngram"] == 4.0
    assert best_single(result["arms"]) == "int8"
    some = rows()[:3]
    orders = {0.0: some, 1.0: [some[2], some[0], some[1]]}
    streams = {
        (mix, name): [row.runs[name] for row in order]
        for mix, order in orders.items()
        for name in ("knn", "int8")
    }
    found = summarise_streams(streams, orders, "int8")
    assert found["mix"] == {m: {"knn": 2.4, "best_single": 2.0} for m in ("0", "1")}
    assert found["mix_1_vs_mix_0"] == 1.0 and found["identical"]
    print_domain("math", some[:2], experiment)
    print_summary(result | found)
    out = capsys.readouterr().out
    assert "rejected: 0; nearest: chat, math" in out
    assert json.loads(json.dumps(result | found)) == result | found


def test_no_figures_where_tokens_differ(capsys):
    experiment, some = experiment_of(), rows()
    some[0].runs["knn"] = run_of(2.0, (1, 2, 3, 4, 6))
    result = summarise(some, experiment)
    assert not result["identical"]
    assert result["arms"]["knn"] is None and result["arms"]["int8"] is not None
    assert result["oracle_share"] is None and result["router_share"] is None
    orders = {1.0: some[:3]}
    streams = {(1.0, "knn"): [row.runs["knn"] for row in some[:3]],
               (1.0, "int8"): [row.runs["int8"] for row in some[:3]]}  # fmt: skip
    found = summarise_streams(streams, orders, "int8")
    assert not found["identical"] and found["mix"]["1"]["knn"] is None
    print_domain("math", some[:2], experiment)
    print_summary(result | found)
    assert capsys.readouterr().out.count("tokens differ") >= 2


def test_without_unknown_domains_nothing_is_said_of_them():
    assert summarise(rows()[:3], experiment_of())["unknown_vs_off"] is None


def test_every_arm_answers_alike_on_a_tiny_model():
    llm = tiny_llm()
    config = llm.model.config
    plans = (OFF, NGRAM, DraftPlan.int8(config.num_layers),
             DraftPlan.skipping("math-skip", config.num_layers, (1,), ()))  # fmt: skip
    library = replace(
        library_of(plans, size=config.hidden_size, mark=fingerprint(llm.model)),
        num_layers=config.num_layers,
    )
    prompts = [Prompt("math", (5, 6, 7, 5, 6, 7, 5)), Prompt("qa", (9, 8, 1))]
    experiment = make_experiment(library, "math", 2, seed=0)
    measured = [measure_prompt(llm, p, experiment, i, 12, 2) for i, p in enumerate(prompts)]
    assert summarise(measured, experiment)["identical"]
    for row in measured:
        assert row.runs.keys() >= {*experiment.arms, *experiment.columns, "random"}
        requests = [row.routed, *(answer.stats for answer in row.runs["knn"])]
        assert len(requests) == 3 and all(stats.router_microseconds > 0 for stats in requests)
        assert row.feature.norm() == pytest.approx(1, abs=1e-5)
    orders = {0.0: measured, 1.0: measured[::-1]}
    arms = {name: experiment.arms[name] for name in ("knn", "int8")}
    streams = run_streams(llm, orders, arms, 12, segment=1)
    assert summarise_streams(streams, orders, "int8")["identical"]


def test_pictures_are_written(tmp_path):
    library, some = library_of(), rows()
    plot_stream(tmp_path / "stream.png", some, list(SECONDS))
    plot_plans(tmp_path / "plans.png", {"math": {"off": 1.0, "int8": None}, "sql": {"off": 1.0}})
    plot_anchors(tmp_path / "anchors.png", library, some)
    for name in ("stream", "plans", "anchors"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_of_the_right_numbers():
    assert moving_rate(rows(), "off") == [1.0, 1.0, 1.0, 1.0]
    assert moving_rate(rows(), "knn") == pytest.approx([2.0, 2.0, 2.4, 16 / 8.2])
    anchors = torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]])
    flat, points = project(anchors, torch.tensor([[3.0, 1, 7]]))
    assert flat[:, 0].abs().tolist() == pytest.approx([3, 3, 0, 0], abs=1e-5)
    assert points.abs()[0].tolist() == pytest.approx([3, 1], abs=1e-5)
    one, _ = project(anchors[:1], anchors)
    assert one.shape == (1, 2)


def test_prompts_come_with_the_libraries_domains_first(tmp_path):
    for domain in ("code", "math", "aaa"):
        lines = [json.dumps({"domain": domain, "prompt": f"{domain} {i}"}) for i in range(3)]
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(lines))
    found = load_prompts(tmp_path, ("math", "sql", "code"), 2)
    assert list(found) == ["math", "code", "aaa"] and found["aaa"] == ["aaa 0", "aaa 1"]
    with pytest.raises(ValueError, match="expected some of the library's"):
        load_prompts(tmp_path, ("sql",), 2)
    with pytest.raises(ValueError, match="is no folder"):
        load_prompts(tmp_path / "none", ("sql",), 2)
    assert {"math", "code"} <= load_prompts(None, ("math", "code"), 1).keys()


def test_command_line():
    args = parse(["--mix", "0,1", "--per-domain", "3"])
    assert args.mix == (0.0, 1.0) and args.per_domain == 3
    assert parse([]).mix == (0.0, 0.3, 0.7, 1.0)
    for wrong in (["--mix", "2"], ["--mix", "a"], ["--mix", "nan"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            parse(wrong)
