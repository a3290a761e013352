"""The libraries that come with the engine: for the default model in float32 and as it is stored."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import router
from engine import LLM, SamplingParams
from engine.calibrate.prompts import read_prompts
from engine.routing import LIBRARIES
from router.fingerprint import fingerprint
from router.library import RouterLibrary

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = Path(router.__file__).parent / "prompts"
DOMAINS = {
    "summarization", "math", "translation", "story_telling", "text_to_sql", "code", "chat"
}  # fmt: skip
# Two prompts of each domain, none of which the library was made from.
OTHERS = [
    json.loads(line)
    for domain in sorted(DOMAINS)
    for line in (ROOT / "bench" / "prompts" / f"{domain}.jsonl").read_text().splitlines()
]


@pytest.fixture(scope="module")
def llm():
    return LLM(device="cpu", dtype="float32", max_length=2048)


@pytest.fixture(scope="module")
def stored():
    return LLM(device="cpu", max_length=2048)


def ask(llm, text, **values):
    prompt = llm.encode_chat([{"role": "user", "content": text}])
    return llm.generate([prompt], SamplingParams(temperature=0, **values))[0]


def test_there_is_a_small_library_for_either_form_of_the_default_model(llm, stored):
    paths = list(LIBRARIES.glob("*.safetensors"))
    assert all(path.stat().st_size < 1_000_000 for path in paths)
    known = {library.fingerprint: library for library in map(RouterLibrary.load, paths)}
    assert known.keys() == {fingerprint(llm.model), fingerprint(stored.model)} and len(paths) == 2
    for engine, kinds in ((llm, {"off", "ngram", "self"}), (stored, {"off", "ngram"})):
        library = known[fingerprint(engine.model)]
        assert {*library.domains} == DOMAINS
        assert {plan.kind for plan in library.plans} == kinds
        assert torch.equal(engine.router.library.anchors, library.anchors)
        assert library.rates.keys() == DOMAINS | {""}


def test_every_plan_and_rate_of_it_is_of_use(llm):
    library = llm.router.library
    names = {plan.name for plan in library.plans}
    for domain, rates in library.rates.items():
        assert {"ngram", "int8"} <= rates.keys() <= names, domain
    for domain in DOMAINS:
        assert f"{domain}-skip" in names, "the benchmark compares skip sets with it"


def test_prompts_of_every_domain_come_with_it():
    prompts = read_prompts(PROMPTS, None)
    assert prompts.keys() == DOMAINS
    everything = [text for texts in prompts.values() for text in texts]
    assert all(len(texts) >= 24 for texts in prompts.values())
    assert max(Counter(everything).values()) == 1
    assert not {other["prompt"] for other in OTHERS} & {*everything}


def test_prompts_that_it_has_not_seen_go_to_their_domain(llm):
    found = {}
    for other in OTHERS:
        stats = ask(llm, other["prompt"], max_tokens=1).stats
        found[other["prompt"][:40]] = (other["domain"], stats.domain)
    wrong = {text: pair for text, pair in found.items() if pair[0] != pair[1]}
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("form", ["llm", "stored"])
@pytest.mark.parametrize("other", OTHERS[::2], ids=[o["domain"] for o in OTHERS[::2]])
def test_a_routed_answer_is_that_of_plain_decoding(request, form, other):
    engine = request.getfixturevalue(form)
    routed = ask(engine, other["prompt"], max_tokens=48)
    assert routed.stats.domain and (routed.stats.drafted > 0 or form == "stored")
    plain = ask(engine, other["prompt"], max_tokens=48, speculative="off")
    assert plain.stats.domain == "" and plain.stats.drafted == 0
    assert plain.outputs[0].token_ids == routed.outputs[0].token_ids


def test_the_chat_command_uses_it():
    other = OTHERS[0]
    command = [sys.executable, "-m", "engine.chat", "--device", "cpu", "--dtype", "float32"]
    done = subprocess.run(
        [*command, "--stats", "--max-tokens", "8", "--prompt", other["prompt"]],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and f"route {other['domain']}" in done.stderr, done.stderr
