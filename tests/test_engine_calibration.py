"""The steps of a calibration: on which answers plans are scored, and what is made of the scores."""

from __future__ import annotations

import pytest
from tiny import family_config, tiny_llm
from tokenizers_for_tests import CHAT_TEMPLATE, byte_tokenizer

import engine.calibrate.calibration
from engine import SamplingParams
from engine.calibrate.calibration import Calibration, Settings
from engine.calibrate.replay import ngram_rates, smoothed
from engine.calibrate.state import CalibrationState
from engine.sources.ngram import NGRAM_PRIORS
from engine.sources.plan import SELF_PRIOR
from models.chat_template import ChatTemplate
from models.plan import NGRAM, OFF, SKIP, DraftPlan
from router.library import Rates
from router.matchness import Matchness, Trace
from router.search import greedy_growth

LAYERS = 4  # the growth keeps the first and the last, so it has two to skip
INT8 = DraftPlan.int8(LAYERS)
PROMPTS = {
    "chat": ["hi", "hello hello hello", "abcabcabcabc"],
    "math": ["1+1", "1, 2, 3, 1, 2, 3", "xyxyxyxy", "7"],
}


@pytest.fixture
def llm(monkeypatch):
    config = family_config("llama2", num_layers=LAYERS, vocab_size=byte_tokenizer().vocab_size)
    monkeypatch.setattr(
        engine.calibrate.calibration, "profile_draft", lambda model, plan: sum(plan.sublayers) / 128
    )
    return tiny_llm(config, chat_template=ChatTemplate(CHAT_TEMPLATE, "test"))


def run(llm, path, trace_tokens=40):
    """The library, of a state of its own."""
    state = CalibrationState(path, {})
    settings = Settings(num_anchors=2, trace_tokens=trace_tokens)
    try:
        return Calibration(llm, PROMPTS, settings, state, lambda what, done, total: None).run()
    finally:
        state.close()


def chat_ids(llm, text):
    return tuple(llm.encode_chat([{"role": "user", "content": text}]))


def traces_of(llm, trace_tokens=40):
    """The answers of plain decoding, by domain."""
    params = SamplingParams(temperature=0, max_tokens=trace_tokens, speculative="off")
    traces = {}
    for domain, texts in PROMPTS.items():
        prompts = [chat_ids(llm, text) for text in texts]
        outputs = llm.generate(prompts, params)
        traces[domain] = [Trace(o.prompt_token_ids, o.outputs[0].token_ids) for o in outputs]
    return traces


def test_plans_are_scored_on_the_first_answers_of_a_domain_and_searched_again_on_the_last(
    llm, tmp_path, monkeypatch
):
    """As many as have 12 positions, of which an answer has 11; of the mixture by turns."""
    seen = []

    def noted(model, traces):
        seen.append([trace.prompt_ids for trace in traces])
        return Matchness(model, traces)

    monkeypatch.setattr(engine.calibrate.calibration, "POSITIONS", 12)
    monkeypatch.setattr(engine.calibrate.calibration, "Matchness", noted)
    run(llm, tmp_path / "state", trace_tokens=12)
    chat, math = ([chat_ids(llm, text) for text in texts] for texts in PROMPTS.values())
    assert seen[:4] == [chat[:2], math[:2], [chat[0], math[0]], [chat[2], chat[1]]]
    # The second skip set is judged on the answers of the first, so that the two can be compared.
    assert seen[4:] in ([], [chat[:2]])


def test_the_fastest_skip_set_of_every_search_is_a_candidate(llm, tmp_path, monkeypatch):
    paths = {}

    def growth(*args, name, **options):
        paths[name] = greedy_growth(*args, name=name, **options)
        return paths[name]

    monkeypatch.setattr(engine.calibrate.calibration, "greedy_growth", growth)
    library = run(llm, tmp_path / "state")
    best = []
    for path in paths.values():
        skipping = [scored for scored in path if SKIP in scored.plan.sublayers]
        assert len({scored.speed for scored in skipping}) > 1
        best.append(max(skipping, key=lambda scored: scored.speed).plan)
    assert set(library.plans) == {OFF, NGRAM, INT8, *best}
    ends = ("skip", "int8-skip")
    names = {f"{domain}-{end}" for domain in ("chat", "math", "mix") for end in ends}
    assert paths.keys() == names | {"chat-skip-2"}


def test_the_plan_of_a_domain_is_the_fastest_by_the_clock(llm, tmp_path, monkeypatch):
    """Of the three with the lowest expected cost; the default one is the fastest on the mixture."""
    expected = {"ngram": 1.0, "int8": 2.0, "off": 3.0}
    seconds = {
        "chat": {"ngram": 2, "int8": 2, "off": 1},
        "math": {"ngram": 1, "int8": 0, "off": 2},
        "mix": {"ngram": 0, "int8": 1, "off": 2},
    }
    timed = []

    def time(self, domain, traces, plans):
        timed.append([plan.name for plan in plans])
        return seconds[domain]

    def replay(trace, plans, flags, table):
        return expected.get(plans[0].name if plans else "off", 9.0)

    monkeypatch.setattr(Calibration, "_time", time)
    monkeypatch.setattr(engine.calibrate.calibration, "replay", replay)
    library = run(llm, tmp_path / "state")
    assert timed == [list(expected)] * 3
    plans = [library.plans[i] for i in library.anchor_plans]
    assert plans == [OFF, OFF, INT8, INT8]
    assert library.plans[library.default_plan] == NGRAM


def test_rates_are_those_of_the_domains_answers(llm, tmp_path):
    """Of few n-grams the rates of all domains say more, so they are the prior of each."""
    library = run(llm, tmp_path / "state")
    traces = traces_of(llm)
    general = ngram_rates([t for some in traces.values() for t in some], NGRAM_PRIORS)
    assert library.rates[""][NGRAM.name] == general != NGRAM_PRIORS
    for domain, some in traces.items():
        assert library.rates[domain][NGRAM.name] == ngram_rates(some, general) != general
        for plan in library.plans:
            if plan.name in ("int8", f"{domain}-skip", f"{domain}-int8-skip"):
                flags = Matchness(llm.model, some).agreement(plan)
                right, judged = (sum(map(count, flags)) for count in (sum, len))
                rate = smoothed(int(right), judged, SELF_PRIOR.first)
                assert library.rates[domain][plan.name] == {0: Rates(rate, rate)}
