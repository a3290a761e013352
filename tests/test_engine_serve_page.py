"""The page at `/`: what it may load, and how it talks to a server, in a headless Chromium."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from devtools import CHROMIUM, Browser
from fastapi import FastAPI
from fastapi.testclient import TestClient
from page_stub import MARKUP, TOKENS, Stub
from serve_app import ascii_llm, served

from engine import SamplingParams
from engine.async_llm import AsyncLLM
from engine.serve.app import create_app
from engine.serve.guard import Guard
from engine.serve.metrics import Metrics
from engine.serve.options import ServeOptions
from engine.serve.page import PAGE, page_router

in_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium-headless-shell"
)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Stub, str]]:
    stub = Stub()
    with served(stub.app) as url:
        yield stub, f"{url}/"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def stub(server: tuple[Stub, str]) -> Stub:
    server[0].reset()
    return server[0]


@pytest.fixture
def page(chromium: Browser, server: tuple[Stub, str], stub: Stub) -> Iterator[Browser]:
    """The page as it opens on a wide screen, with nothing kept of the test before."""
    chromium.problems.clear()
    chromium.window(1200, 800)
    chromium.open(server[1])
    chromium.run("sessionStorage.clear()")
    yield chromium
    assert not chromium.problems


def shown(page: Browser, selector: str) -> str:
    """The text of the last element of the page that fits the selector."""
    return page.run(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1).textContent")


def ask(page: Browser, text: str, wait: bool = True) -> str:
    """Type a question and Enter. The answer, if waited for."""
    page.click("#question")
    page.type(text)
    page.press("Enter")
    return finished(page) if wait else ""


def finished(page: Browser) -> str:
    page.wait("document.querySelector('article:last-of-type')?.ariaBusy === 'false'")
    return shown(page, ".answer")


def wait_until_cut(stub: Stub, number: int) -> None:
    """Until the server has seen so many answers cut off."""
    end = time.monotonic() + 60
    while stub.cut < number:
        assert time.monotonic() < end
        time.sleep(0.01)


def stats(page: Browser) -> dict[str, str]:
    rows = "[...document.querySelectorAll('article:last-of-type dl div')]"
    return dict(page.run(f"{rows}.map((row) => [...row.children].map((e) => e.textContent))"))


def test_nothing_is_loaded_from_elsewhere_and_no_text_becomes_markup():
    text = PAGE.read_text(encoding="utf-8")
    assert "://" not in text and len(text.encode()) <= 20_000
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]
    for construct in (
        *(
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "DOMParser",
            "Function(",
        ),
        *("eval(", "import(", "url(", "@import", "setAttribute('on", " style=", " onclick="),
    ):
        assert construct not in text, construct


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else():
    app = FastAPI()
    app.include_router(page_router())
    response = TestClient(app).get("/")
    assert response.text == PAGE.read_text(encoding="utf-8")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script", "style"):
        (inline,) = re.findall(f"<{kind}>(.*?)</{kind}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    head = TestClient(app).head("/")
    assert head.status_code == 200 and not head.content
    assert "/" not in app.openapi()["paths"]


@in_browser
def test_a_question_gets_a_streamed_answer_with_tinted_drafts_and_its_cost(page, stub):
    page.wait("document.querySelector('#model').textContent === 'tiny/model'")
    assert ask(page, "tell me") == "".join(text for text, _ in TOKENS)
    runs = page.run(
        "[...document.querySelectorAll('.answer span')].map((e) => [e.textContent, e.className])"
    )
    assert runs == [
        ["The", "plain"], ["waves of the sea", "drafted"], [" rôle", "plain"], ["🌊", "drafted"],
        [" on.\n\nThe", "plain"], ["waves", "drafted"], [" <end>", "plain"],
    ]  # fmt: skip
    tint = "getComputedStyle(document.querySelector('.answer .drafted')).backgroundColor"
    assert page.run(tint) == "rgb(214, 240, 226)"
    page.click("#tint")
    assert page.run(tint) == "rgba(0, 0, 0, 0)"
    cost = stats(page)
    assert re.fullmatch(r"\d+ ms", cost.pop("First token"))
    assert cost == {
        "Route": "story_telling, similarity 0.912", "Plan": "int8+ngram", "Tokens a round": "2.25",
        "Tokens/s": "312", "Against plain decoding": "1.34\N{MULTIPLICATION SIGN}",
        "Prompt tokens": "58, 31 reused", "Answer tokens": "9, 5 drafted", "Ended": "at max tokens",
    }  # fmt: skip
    assert stub.bodies == [
        {
            "model": "tiny/model",
            "messages": [{"role": "user", "content": "tell me"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "speculative": {"method": "auto", "detail": True},
        }
    ]


@in_browser
def test_a_stopped_answer_keeps_what_came_and_the_server_sees_it(page, stub):
    for stop in (lambda: page.press("Escape"), lambda: page.click("#send")):
        ask(page, "go slow", wait=False)
        page.wait("document.querySelector('article:last-of-type .answer').textContent.length > 30")
        assert page.run("document.querySelector('#send').textContent") == "Stop"
        page.type("next")
        page.press("Enter")
        assert page.run("document.querySelector('#question').value") == "next"
        page.run("document.querySelector('#question').value = ''")
        before = shown(page, ".answer")
        stop()
        answer = finished(page)
        assert answer.startswith(before) and re.fullmatch("( tick tock)+", answer)
        assert stats(page)["Ended"] == "by you"
        assert page.run("document.querySelector('#send').textContent") == "Send"
        wait_until_cut(stub, len(stub.bodies))
    assert stub.bodies[1]["messages"][1]["content"].startswith(" tick tock")
    assert ask(page, "and now").startswith("The waves")


@in_browser
def test_an_answer_is_made_again_or_its_question_changed(page, stub):
    ask(page, "one")
    first = ask(page, "two")
    page.click("#again")
    assert finished(page) == first
    assert stub.bodies[1] == stub.bodies[2]
    page.click("#edit")
    page.press("Escape")
    assert page.run("document.querySelector('#question').value") == ""
    page.click("#edit")
    page.type(" and a half")
    page.press("Enter")
    finished(page)
    assert [m["content"] for m in stub.bodies[3]["messages"]] == ["one", first, "two and a half"]
    assert page.run("document.querySelectorAll('article').length") == 2
    page.click("#clear")
    assert not page.run("document.querySelectorAll('article').length")
    ask(page, "three")
    assert len(stub.bodies[4]["messages"]) == 1


@in_browser
def test_settings_are_sent(page, stub):
    for name, value in {
        "system": "Be brief.", "temperature": "0.7", "top_p": "0.9", "top_k": "40", "seed": "0",
        "max_completion_tokens": "12", "stop": "end\\n\nEND",
    }.items():  # fmt: skip
        page.click(f"[name={name}]")
        page.type(value)
    page.run("document.querySelector('[name=method]').value = 'ngram'")
    ask(page, "hello")
    body = stub.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["speculative"] == {"method": "ngram", "detail": True}
    sent = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 0, "max_completion_tokens": 12}
    assert sent.items() <= body.items()
    assert body["stop"] == ["end\n", "END"]
    page.run("document.querySelector('[name=top_p]').value = '1.5'")
    ask(page, "hello")
    assert shown(page, "#notice") == "A number in the settings is out of range."
    assert len(stub.bodies) == 1


@in_browser
def test_shift_enter_starts_a_line(page, stub):
    page.click("#question")
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    page.press("Enter")
    finished(page)
    assert stub.bodies[0]["messages"][0]["content"] == "one\ntwo"


@in_browser
def test_markup_stays_text_and_the_policy_is_in_force(page):
    assert ask(page, "give me markup") == MARKUP
    assert stats(page)["Route"] == f"{MARKUP}, similarity 0.912"
    assert not page.run("document.querySelectorAll('main img, main b, main script').length")
    assert page.run("window.ran === undefined")
    for attack in (
        "document.body.innerHTML = '<b>x</b>'",
        "document.createElement('script').textContent = 'window.ran = 1'",
    ):
        assert "Trusted" in page.run(
            f"(() => {{ try {{ {attack} }} catch (e) {{ return e.message }} }})()"
        )
    blocked = page.run(
        "new Promise((done) => { addEventListener('securitypolicyviolation', (e) => "
        "done(e.effectiveDirective)); fetch('http://localhost:9/').catch(() => {}); })"
    )
    assert blocked == "connect-src"
    page.problems.clear()  # the violations


@in_browser
@pytest.mark.parametrize(
    ("question", "line", "kept"),
    [
        ("busy", "503: the queue is full. Try again in 7 s.", ""),
        ("failing", "no memory.", "Half"),
        ("broken", "The answer broke off: the server closed the connection.", "Half"),
    ],
)
def test_what_goes_wrong_is_one_line(page, stub, question, line, kept):
    assert ask(page, question) == kept
    assert shown(page, "#notice") == line
    wait_until_cut(stub, question == "failing")
    assert ask(page, "plain") == "As others do."
    assert page.run("document.querySelector('#notice').hidden")
    asked = [message["content"] for message in stub.bodies[1]["messages"]]
    assert asked == ([question, kept] if kept else []) + ["plain"]


@in_browser
def test_a_key_is_asked_for_and_kept_for_the_tab(page, stub, server):
    stub.key = "secret"
    page.open("about:blank")
    page.open(server[1])
    line = "401: got no valid API key, expected one. Enter the API key in the settings."
    page.wait("document.querySelector('#notice').textContent")
    assert shown(page, "#notice") == line
    assert page.run("document.activeElement.name") == "key"
    assert ask(page, "hello") == ""
    assert shown(page, "#notice") == line
    page.click("[name=key]")
    page.type("secret")
    page.press("Tab")
    page.wait("document.querySelector('#model').textContent === 'tiny/model'")
    page.click("#again")
    assert finished(page).startswith("The waves")
    page.open("about:blank")
    page.open(server[1])
    assert page.run("document.querySelector('[name=key]').value") == "secret"
    assert page.run("localStorage.length") == 0
    assert ask(page, "hello").startswith("The waves")


LOW_CONTRAST = """(() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => numbers(color).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => numbers(getComputedStyle(e).backgroundColor)[3] === 0
    ? ground(e.parentElement) : getComputedStyle(e).backgroundColor;
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const hasText = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!e.checkVisibility() || !(hasText || e.placeholder)) continue;
    const color = getComputedStyle(e, e.placeholder ? "::placeholder" : null).color;
    const [low, high] = [light(color), light(ground(e))].sort((a, b) => a - b);
    found.push([e.tagName, color, ground(e), (high + 0.05) / (low + 0.05)]);
  }
  return found;
})()"""


@in_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_and_fields_have_names(page, dark):
    page.window(1200, 800, dark=dark)
    ask(page, "failing")
    ask(page, "busy")
    ask(page, "hello", wait=False)
    finished(page)
    found = page.run(LOW_CONTRAST)
    assert len(found) > 40
    assert not [row for row in found if row[3] < 4.5]
    assert page.run(
        "[...document.querySelectorAll('input, select, textarea')].every((e) => e.labels.length)"
    )
    assert page.run("document.querySelector('#log').ariaLive") == "polite"


@in_browser
def test_a_narrow_screen_is_enough(page, server, tmp_path):
    page.window(320, 560)
    page.open("about:blank")
    page.open(server[1])
    page.click("#open")
    page.wait("document.querySelector('#panel').checkVisibility()")
    assert ask(page, "hello").startswith("The waves")
    assert not page.run("document.querySelector('#panel').checkVisibility()")
    ask(page, "w" * 100 + " hello")
    assert page.run(
        "[document.documentElement, document.querySelector('#log')].every("
        "(e) => e.scrollWidth <= e.clientWidth)"
    )
    assert page.run("document.documentElement.scrollHeight") == 560
    at = "(({scrollHeight, scrollTop, clientHeight}) => scrollHeight - scrollTop - clientHeight)"
    assert page.run(f"{at}(document.querySelector('#log'))") < 2
    page.screenshot(tmp_path / "page.png", 320, 560)
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


@in_browser
def test_it_shows_what_the_engine_answers(chromium):
    """The whole server but its process: the page, the guard with a key, the API, the engine."""
    with closing(AsyncLLM(ascii_llm())) as llm:
        options, metrics = ServeOptions(api_keys=("secret",)), Metrics(llm)
        app = create_app(llm, options, metrics)
        app.state.serving.plain_speed = 1.0
        with served(Guard(app, options, metrics)) as url:
            password = base64.b64encode(b"anyone:secret").decode()  # as a person would type it
            headers = {"Authorization": f"Basic {password}"}
            chromium.call("Network.setExtraHTTPHeaders", headers=headers)
            chromium.open(f"{url}/")
            chromium.call("Network.setExtraHTTPHeaders", headers={})
            chromium.wait("document.activeElement.name === 'key'")
            for name, value in {
                "key": "secret", "temperature": "0", "max_completion_tokens": "60", "top_p": "1",
                "top_k": "0", "seed": "1", "stop": "\\n\\n\\n",
            }.items():  # fmt: skip
                chromium.click(f"[name={name}]")
                chromium.type(value)
            answer = ask(chromium, "Hello")
            params = SamplingParams(temperature=0, max_tokens=60)
            expected = llm.llm.chat([{"role": "user", "content": "Hello"}], params)
    assert not shown(chromium, "#notice")
    assert answer == expected.outputs[0].text
    cost = stats(chromium)
    assert cost["Answer tokens"].startswith(f"{len(expected.outputs[0].token_ids)}, ")
    assert int(cost["Answer tokens"].split()[1]) > 0
    assert {"Route", "Plan", "Tokens a round", "Tokens/s", "First token"} < cost.keys()
    assert float(cost["Against plain decoding"][:-1]) > 0
