"""Hostile chat templates: no payload runs, every bomb ends within a second."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.chat_template import MAX_SOURCE, ChatTemplate

USER = {"role": "user", "content": "Hi"}

FORBIDDEN = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by attr filter": "{{ '' | attr('__class__') }}",
    "class by map": "{{ [''] | map(attribute='__class__') | list }}",
    "globals of a global": "{{ raise_exception.__globals__['json'] }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
    "self": "{{ self.__init__.__globals__.__builtins__ }}",
    "self by name": "{{ self._TemplateReference__context.environment }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "namespace name": "{% set n = namespace() %}{% set n.__class__ = 'x' %}",
    "namespace key": "{{ namespace(**{'__html__': 'x'}) }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "percent object": "{{ messages.append.__self__ }}",
    "append": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "update": "{{ messages[0].update({'content': 'x'}) }}",
    "generator frame": "{{ (messages | select).gi_frame }}",
    "context": "{{ loop.__class__ }}{% for m in messages %}{{ loop.__class__ }}{% endfor %}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "open": "{{ open('/etc/passwd').read() }}",
    "import function": "{{ __import__('os').system('id') }}",
    "lipsum": "{{ lipsum.__globals__.os }}",
    "dict": "{{ dict.__class__ }}",
    "dict of an instance": "{{ dict.fromkeys.__self__ }}",
    "formatter": "{{ '{0.format.__globals__}'.format('') }}",
    "formatter of safe text": "{{ ('{0.__class__}' | safe).format('') }}",
    "method of a type": "{{ cycler.next }}",
    "function": "{{ lipsum.__globals__ }}{{ strftime_now.__code__ }}",
    "joined attribute": "{{ [''] | join(attribute='__class__') }}",
    "sorted attribute": "{{ [''] | sort(attribute='__class__') }}",
    "summed attribute": "{{ [''] | sum(attribute='__class__') }}",
    "grouped attribute": "{{ [''] | groupby('__class__') }}",
    "setdefault": "{{ messages[0].setdefault('a', 1) }}",
    "set": "{{ ({'a': 1}.keys() - []).add(1) }}",
    "bytes": "{{ 'a'.encode().__class__ }}",
    "type of int": "{{ (5).to_bytes(10**9, 'big') }}",
}


@pytest.mark.parametrize("payload", FORBIDDEN)
def test_injections_do_not_run(payload: str) -> None:
    with pytest.raises(ValueError, match=r"from-a-stranger: the chat template"):
        ChatTemplate(FORBIDDEN[payload], "from-a-stranger").render([USER])


DOUBLE = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = "
BOMBS = {
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat from the left": "{{ (10**9 * 'a') | length }}",
    "repeat a list": "{{ ([1] * 10**9) | length }}",
    "power": "{{ 9**(9**6) }}",
    "power by product": "{% set n = namespace(x=9**99) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "loops over one list": "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}"
    "{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) if a < 0 %}{% endfor %}" * 200,
    "wide loop body": "{% for a in range(99999) %}"
    + "{% if a %}{% endif %}" * 2500
    + "{% endfor %}",
    "recursive loop": "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "wide macro": "{% macro m() %}" + "{% if 1 %}{% endif %}" * 2500 + "{% endmacro %}"
    "{% for a in range(99999) %}{% set x = m() %}{% endfor %}",
    "double by plus": DOUBLE + "n.x + n.x %}{% endfor %}",
    "double by tilde": DOUBLE + "n.x ~ n.x %}{% endfor %}",
    "double by list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "double by nesting": DOUBLE + "[n.x, n.x] %}{% endfor %}{{ n.x }}",
    "double by nesting, tojson": DOUBLE + "[n.x, n.x] %}{% endfor %}{{ n.x | tojson | length }}",
    "double by nesting, equality": DOUBLE + "(n.x, n.x) %}{% endfor %}{{ {n.x: 1} }}",
    "double by nesting, lookup": DOUBLE + "(n.x, n.x) %}{% endfor %}{{ {}[n.x] }}",
    "double by namespaces": "{% set n = namespace(x=1) %}{% for i in range(60) %}"
    "{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ 'a' * 10**9 ~ n.x }}",
    "double by block": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "double by join": DOUBLE + "[n.x, n.x] | join %}{% endfor %}",
    "double by method": DOUBLE + "n.x.join([n.x, n.x]) %}{% endfor %}",
    "double by replace": DOUBLE + "n.x | replace('a', n.x) %}{% endfor %}",
    "double by format": DOUBLE + "'{0}{0}'.format(n.x) %}{% endfor %}",
    "double by percent": DOUBLE + "'%s%s' % (n.x, n.x) %}{% endfor %}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace nothing": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "join": "{{ ('a' * 99999).join('b' * 99999) }}",
    "join filter": "{{ range(99999) | join('b' * 99999) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "center a constant": "{% set x = 'a' | center(10**9) | length %}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "tojson indent": "{{ [1] | tojson(indent=10**9) }}",
    "tojson separators": "{{ range(9999) | list | tojson(separators=['x' * 99999, 'y']) }}",
    "round": "{{ 5 | round(-10**9) }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format star": "{{ '%*d' % (10**9, 1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:>1000000000}'.format(1) }}",
    "format method, nested": "{{ '{:>{}}'.format(1, 10**9) }}",
    "date width": "{{ strftime_now('%1000000000d') }}",
    "long output": "{% for i in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
    "long macro": "{% macro m() %}" + "x" * 10_000 + "{% endmacro %}"
    "{% for i in range(99999) %}{% set y = m() ~ y %}{% endfor %}",
    "sort": "{% for i in range(9999) %}{% set x = range(9999) | sort | list %}{% endfor %}",
    "slices": "{% set s = 'a' * 99999 %}{% for i in range(99999) %}{% set x = s[1:] %}{% endfor %}",
    "comparisons": "{% set s = 'a' * 99999 %}{% set t = s ~ 'b' %}{% for i in range(99999) %}"
    "{% if s ~ 'c' == t or t in s %}{% endif %}{% endfor %}",
    "deep tuple": "{% set n = namespace(x=()) %}{% for i in range(99999) %}{% set n.x = (n.x,) %}"
    "{% endfor %}{{ {n.x: 1} }}",
    "parentheses": "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "long source": "x" * (MAX_SOURCE + 1),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_soon(bomb: str) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"bomb: the chat template"):
        ChatTemplate(BOMBS[bomb], "bomb").render([USER])
    assert (
        time.process_time() - begin < 5.0
    )  # about 0.5 here; without a budget, minutes or all memory


ALL_BOMBS_IN_LITTLE_MEMORY = """
import resource
from pathlib import Path
from test_models_template_sandbox import BOMBS, USER, ChatTemplate

ChatTemplate("{{ messages }}", "t").render([USER])
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)
for name, bomb in BOMBS.items():
    try:
        ChatTemplate(bomb, "bomb").render([USER])
    except ValueError as error:
        assert "MemoryError" not in str(error), name
"""


def test_bombs_take_less_than_256_megabytes() -> None:
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(tests), str(tests.parent)]}\n"
         + ALL_BOMBS_IN_LITTLE_MEMORY],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-999:]
