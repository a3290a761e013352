"""Filters, tests and methods of templates: what Hugging Face's environment gives, at a price."""

from __future__ import annotations

import time
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from refusals import check_words, refusal
from transformers.utils.chat_template_utils import _compile_jinja_template

from models.chat_template import ChatTemplate
from models.template_sandbox import TemplateSandbox

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello <b>big</b> world & 日本 😀", "size": 3, "tags": ["x", "Y"]},
    {"role": "assistant", "content": "naïve\n\ttext", "size": 1, "tags": []},
    {"role": "user", "content": "", "size": 2.5, "tags": ["x"], "args": {"b": [1, None], "a": "é"}},
]

# The values of one line each; `m` is the messages.
FILTERS = """
-5|abs / 2.5|abs
m[0]|attr('items') is callable / m[0]|attr('nothing') is defined
[1,2,3,4,5]|batch(2)|list / range(5)|batch(3, 'x')|list / m|batch(2)|map('length')|list
'heLLo'|capitalize
'ab'|center(9) ~ '|' / 'ab'|center ~ '|' / 'ab'|center(1)
m|count / 'abc'|count / {}|count
nothing|d('x') / nothing|default('y') / ''|default('z', true)
{'b': 1, 'A': 2}|dictsort / {'b': 1, 'A': 2}|dictsort(true) / {'b': 1, 'a': 2}|dictsort(by='value')
'<&>"'|e / '<a>'|escape|e / m[0].content|escape
10|filesizeformat / 1500000|filesizeformat / 1500000|filesizeformat(true) / 1|filesizeformat
m|first / ''|first / [3]|first
'1.5'|float / 'x'|float(2) / 3|float
'<a>'|safe|forceescape / 3|forceescape
'%s is %05.2f, %3d'|format('x', 1.5, 7) / '%(a)s %(b)30s'|format(a=1, b=2)
m|groupby('role') / m|groupby('size')|map('first')|list / m|groupby('tags.0', default='-')|length
(m|groupby('role')|first).grouper / (m|groupby('role')|last).list|length
m|groupby(attribute='role', case_sensitive=true)|map(attribute='list')|map('length')|list
'a\\nb\\n\\nc'|indent / 'a\\nb'|indent(20, true) / 'a\\n\\nb'|indent('> ', first=true, blank=true)
'12'|int / 'x'|int(5) / 'ff'|int(base=16) / 3.9|int / '42.9'|int
{'a': 1}|items|list / nothing|items|list
[1, 'b', none]|join('-') / m|join(', ', attribute='role') / 'abc'|join('.')
m|map(attribute='size')|join
m|last|attr('keys') is callable / [1,2]|last / 'abc'|last
m|length / 'abc'|length
'abc'|list / {'a': 1}|list / range(3)|list / none|select|list
'ÀB'|lower / 3|lower
m|map(attribute='role')|list / [1,2]|map('string')|list / m|map(attribute='x', default='d')|list
[' a', 'b ']|map('trim')|list / ['a']|map('replace', 'a', 'b')|list / m|map(attribute='tags.0')|list
[2, 3, 1]|max / ['b', 'A']|min / m|max(attribute='size') / []|max
['b', 'A']|min(case_sensitive=true)
[1, 'a', {'b': [1.5, none]}]|pprint / m|pprint / ('word ' * 40)|pprint
[7]|random / []|random is defined
[1, 2, 3]|reject('odd')|list / m|rejectattr('tags')|list|length
m|rejectattr('role', 'equalto', 'user')|map(attribute='content')|list
'aaa'|replace('a', 'b') / 'aaa'|replace('a', 'b', 2) / 'a1'|replace(1, 2)
'ab'|replace(new='x', old='a') / 'ab'.encode()|replace('b', 1)
'abc'|reverse / [1,2]|reverse|list / range(3)|reverse|list
42.55|round / 42.55|round(1, 'floor') / 42|round(-1) / 1250|round(-2, 'ceil') / 2.5|round|int
'<b>'|safe ~ '<c>' / ('<b>'|safe) + '<c>'
[0, 1, '', 'a']|select|list / [1, 2]|select('>', 1)|list
m|selectattr('args', 'defined')|list|length
m|selectattr('role', 'in', ['user'])|list|length / m|selectattr('tags')|map(attribute='size')|list
[1,2,3,4,5]|slice(2)|list / [1,2,3]|slice(2, 'x')|list
['b', 'A', 'c']|sort / [2, 10]|sort(reverse=true)
m|sort(attribute='role,size')|map(attribute='size')|list
3|string / [1]|string / none|string
'<p>a &amp; <i>b</i></p> <!-- c -->'|striptags
[1, 2.5]|sum / m|sum(attribute='size') / [[1], [2, 3]]|sum(start=[]) / [1]|sum(start=10) / []|sum
'hello wORLD x-y'|title
{'a': [1, 'é<']}|tojson / [1, {'b': 2}]|tojson(indent=2) / m|tojson(indent=20)
[1,2]|tojson(separators=(',', ':'))
{'b': 1, 'a': none}|tojson(sort_keys=true, ensure_ascii=false) / 'é'|tojson(ensure_ascii=true)
'  a '|trim / 'xax'|trim('x')
('word ' * 60)|truncate / 'foo bar baz qux'|truncate(9)
'foo bar baz qux'|truncate(9, true, '…', 0)
['a', 'B', 'A', 'b']|unique|list / m|unique(attribute='role')|map(attribute='size')|list
'abc'|upper
'a b/é?'|urlencode / {'a b': 'é&', 'c': 1}|urlencode / [['a', 1], ['b', 2]]|urlencode / 7|urlencode
'see https://example.com/x?y=1, www.a.org or me@b.com.'|urlize(12, true, target='_top')
'a b  c'|wordcount
'the quick brown fox jumps'|wordwrap(10) / 'abcdefghij k'|wordwrap(4, true, '|')
'a-b c'|wordwrap(2, false)
({'a': 1, 'b': none, 'c': '<'}|xmlattr) / {'a': 1}|xmlattr(false)
"""
METHODS = """
'heLLo'.capitalize() / 'ß'.casefold() / 'ab'.center(9, '*') / 'aXa'.swapcase() / 'a b'.title()
'aXbX'.count('X') / 'abc'.endswith(('b', 'c')) / 'abc'.startswith('ab') / 'aXbX'.find('X')
'a\\tb'.expandtabs() / 'a\\tb'.expandtabs(3) / 'a\\tb'.expandtabs(tabsize=30)
'{} {1}'.replace('{1}', '{}').format(1, 'b') / '{:>30}|{:<5}|{:^7.3f}'.format('a', 'b', 1.5)
'{0[role]} {m}'.format(m[0], m=3) / '{!r:>{}}'.format('é', 12) / '{a}'.format_map({'a': 1})
'abc'.index('c') / 'aba'.rindex('a') / 'aba'.rfind('a') / 'aba'.rfind('x', 0, 2)
'a1'.isalnum() / 'a'.isalpha() / 'a'.isascii() / '1'.isdecimal() / '1'.isdigit()
'a'.isidentifier()
'a'.islower() / '1'.isnumeric() / 'a'.isprintable() / ' '.isspace() / 'A'.istitle() / 'A'.isupper()
','.join(['a', 'b']) / ','.join('abc') / ','.join({'a': 1}) / '-'.join(['a']|map('upper'))
'ab'.ljust(5) ~ '|' / 'ab'.rjust(5, '.') / '42'.zfill(5) / '-4'.zfill(6) / 'x'.zfill(150)
'  a '.lstrip() ~ '|' / 'xxa'.lstrip('x') / 'axx'.rstrip('x') / ' a '.strip() / 'xax'.strip('xy')
'a=b=c'.partition('=') / 'a=b=c'.rpartition('=') / 'abc'.removeprefix('a') / 'abc'.removesuffix('c')
'a b c'.split() / 'a,b,c'.split(',', 1) / 'a,b,c'.rsplit(',', 1) / 'a b c'.rsplit(maxsplit=1)
'a\\nb'.splitlines() / 'a\\nb\\n'.splitlines(true) / 'a,b'.split(sep=',') / 'Ab'.lower()
'Ab'.upper()
'abc'.translate({97: 'x', 98: none}) / 'abc'.translate('abc'.maketrans('ab', 'xy'))
'é😀'.encode()|length / 'é'.encode('utf-8').decode('utf-8') / 'é'.encode('ascii', 'replace')
'ab'.encode('latin-1').hex() / 'é'.encode('ascii', errors='xmlcharrefreplace')
'ab'.encode().zfill(4)
{'a': 1}.copy() / {'a': 1}.get('a') / {'a': 1}.get('b', 2) / {'a': 1}.items()|list
m[0].keys()|list
{'a': 1}.values()|list / {}.fromkeys('ab', 1) / dict.fromkeys(['a'], 0) / dict(a=1)
dict([['a', 1]])
{'a': 1}.items().mapping / ({'a': 1, 'b': 2}.keys() - ['a']) / {'a': 1}.keys().isdisjoint(['b'])
[1, 2, 1].count(1) / [1, 2].index(2) / [1].copy() / (1, 2).count(1) / (1, 2).index(2)
range(5).index(3)
(5).bit_length() / (5).to_bytes(2, 'big') / (1.5).is_integer() / (1.5).as_integer_ratio() / (2).real
(5).from_bytes('a'.encode(), 'big') / (1.5).hex() / 5 .numerator
('<b>'|safe).striptags() / ('&lt;'|safe).unescape() / ('<b>{}'|safe).format('<') / ('%s'|safe) % '<'
m.append is defined / {}.update is defined / m.append / {'update': 1}['update']
cycler('a', 'b').next() / joiner('x')() ~ 'y' / namespace(a=1).a
lipsum(1, false, 3, 4).split()|length
lipsum(n=2, html=true, min=2, max=3).split()|length
"""
TESTS = """
true is boolean / m is callable / m is defined / nothing is defined / 4 is divisibleby 2
'a' is eq 'a' / 1 is equalto 1 / 1 == 1.0 / ('a'|safe) is escaped / 4 is even / 3 is odd
true is false
'upper' is filter / 'x' is filter / 1.5 is float / 2 is ge 1 / 2 is greaterthan 1 / 1 is gt 1
1 is in [1] / 'a' in 'abc' / 'role' in m[0] / 3 in range(4) / 'x' not in range(4) / 1 is integer
m is iterable / 1 is iterable / 1 is le 2 / 1 is lessthan 2 / 'a' is lower / 1 is lt 2
{} is mapping
1 is ne 2 / none is none / 1 is number / 'a' is sameas 'a' / m is sequence / 1 is sequence
'a' is string
'odd' is test / true is true / nothing is undefined / 'A' is upper / 1 is not string / 1 < 2 < 3
2 >= 1 > 0
"""
VALUES = """
1e999 / -1e999 / 1e999 > 5 / [1e999] / 1e999 - 1e999 / 1e308 * 10
1 + 2 * 3 - 4 / 7 // 2 ~ 7 % 2 ~ 2 ** 10 / -7 // 2 / 1.5 ** 2 / 'a' ~ 1 ~ none ~ true
'a' * 3 / [1] * 2 / [1] + [2] / 'ab' + 'c' / (1, 2) + (3,) / 3 * 'x' / -1 * 'x'
'%s|%5s|%-5s|%05d|%.3f|%x' % ('a', 'b', 'c', 42, 1.5, 255) / '%*d|%.*f' % (8, 42, 2, 1.5)
'%%' % ()
'%(a)s %(b)120d' % {'a': 1, 'b': 2} / '%150s' % 'x' / '100%% %s' % 'y' / '%c%r%a' % ('a', 'é', 'é')
'abcdef'[1:4] / 'abc'[::-1] / m[1:]|length / m[-1].role / [1, 2, 3][:2] / 'abc'[1]
m[0]['content'][:3]
'a' if m else 'b' / 'a' if nothing / not m / m and 1 / nothing or 2 / 1 in [1] and 2
nothing / m[0].x is defined / m[0].missing / m[99] / {'a': {'b': 1}}.a.b / {1: 'x'}[1]
"""


def lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line]


@pytest.mark.parametrize("line", lines(FILTERS + METHODS + TESTS + VALUES))
def test_expressions_give_what_hugging_face_gives(line: str) -> None:
    for expression in line.split(" / "):
        set_value = "{% set value = " + expression + " %}{{ value }}"
        if "1e" in expression:  # which there only a folded constant survives
            set_value = "{{ " + expression + " }}"
        in_loop = "{% for i in [1] %}{% set x = i %}" + set_value + "{% endfor %}"
        source = "{% set m = messages %}" + set_value + in_loop
        wanted = _compile_jinja_template(source).render(messages=MESSAGES)
        assert ChatTemplate(source, expression).render(MESSAGES) == wanted, expression


def test_everything_that_the_stock_sandbox_has_is_there_and_tried() -> None:
    stock, ours = ImmutableSandboxedEnvironment(), TemplateSandbox()
    assert set(stock.filters) <= set(ours.filters) and set(stock.tests) <= set(ours.tests)
    assert set(stock.globals) <= set(ours.globals)
    for name in stock.filters:
        assert f"|{name}" in FILTERS, name
    for name in filter(str.isalpha, stock.tests):
        assert f" {name}" in TESTS, name
    for kind in (str, dict, list, tuple):
        for name in filter(lambda name: not name.startswith("_"), dir(kind)):
            if stock.is_safe_attribute(kind(), name, None):
                assert f".{name}" in METHODS, (kind, name)


# What would take minutes or gigabytes. `A` is a long text, `R` a long list.
BOMBS = {
    "batch": "[1]|batch(10**9, 'x')|list|length",
    "batch, not a number": "[1]|batch(1e999 - 1e999, 'x')|list",
    "batch, paid back": "[[]|batch(-10**18, 'x')|list, A * 10**6]|length",
    "center": "'a'|center(10**9)|length",
    "center by name": "'a'|center(width=10**9)|length",
    "filesizeformat": "([A] * 10**6)|map('filesizeformat')|list",
    "forceescape": "([A] * 10**6)|forceescape",
    "groupby": "R|batch(1)|groupby('0' ~ '.0' * 20000)|length",
    "indent": "('a\\n' * 5000)|indent(10**6)|length",
    "indent by a string": "('a\\n' * 5000)|indent(A)|length",
    "indent, odd lines": "('a\\u2028' * 5000)|indent(A)|length",
    "int": "(('f' * 900000)|int(base=16)) // (('e' * 400000)|int(base=16))",
    "map, long path": "R|map('string')|map(attribute='0.' * 20000 ~ '0')|list|length",
    "pprint": "[" * 40 + "R * 16" + "]" * 40 + "|pprint|length",
    "random": "([R] * 10**6)|map('random')|list",
    "replace by name": "A|replace(new=A, old='a')|length",
    "round": "5|round(-10**9)",
    "round up": "5.5|round(10**9, 'ceil')",
    "slice": "[1]|slice(10**9)|list|length",
    "slice, searched": "5 in ([1]|slice(10**9))",
    "sort, long path": "R|map('string')|sort(attribute='0' ~ '.0' * 20000)|length",
    "striptags": "('<a>' * 50000)|striptags|length",
    "sum of lists": "R|batch(1)|sum(start=[])|length",
    "sum of large lists": "([R] * 1000)|sum(start=R)|length",
    "sum, long path": "R|map('string')|sum('0' ~ '.0' * 20000, [])",
    "tojson": "R|tojson(indent=10**6)|length",
    "tojson, separators": "R|tojson(separators=(A, A))|length",
    "truncate": "A|truncate(10**9, end=A * 10**6)|length",
    "urlencode": "([[A * 9, 1]] * 1000)|map('list')|urlencode|length",
    "urlencode of a text": "(A * 20)|urlencode|length",
    "urlize": "(')' * 200000 ~ 'a)')|urlize|length",
    "urlize, target": "('www.a.com ' * 9999)|urlize(target=A)|length",
    "urlize, schemes": "('a ' * 99999)|urlize(extra_schemes=['ab:'] * 99999)|length",
    "wordwrap": "('a' * 900000)|wordwrap(1)|length",
    "wordwrap by a string": "(A)|wordwrap(1, wrapstring=A)|length",
    "xmlattr": "([{'a': A}] * 10**5)|map('xmlattr')|list|length",
    "center, method": "'a'.center(10**9)|length",
    "decode": "('b-' ~ 'a' * 9999).encode().decode('punycode')|length",
    "encode": "('é' * 9999).encode('punycode')|length",
    "encode, errors": "('é' * 400000).encode('ascii', 'namereplace')|length",
    "expandtabs": "'\\t'.expandtabs(10**9)|length",
    "expandtabs by name": "('\\t' * 9999).expandtabs(tabsize=10**6)|length",
    "expandtabs of bytes": "'\\t'.encode().expandtabs(10**9)|length",
    "from_bytes": "(5).from_bytes(A.encode(), 'big') % 7",
    "fromkeys": "{}.fromkeys([D]|map('list')|map('first'))",
    "dict.fromkeys": "dict.fromkeys([(D, 1)]|map('first'))",
    "dict": "dict([[D, 1]]|map('list'))",
    "format, width": "'{:>1000000000}'.format(1)|length",
    "format, width of a field": "'{:>{}}'.format(1, 10**9)|length",
    "format, many widths": "('{0:9999}' * 9999).format(1)|length",
    "format, precision": "'{:.1000000000f}'.format(1.5)|length",
    "format, repr": "('{0!r}' * 9999).format(A)|length",
    "format_map": "'{a:>1000000000}'.format_map({'a': 1})|length",
    "format of safe text": "('{:>1000000000}'|safe).format(1)|length",
    "isdisjoint": "{}.keys().isdisjoint([D])",
    "join of bytes": "A.encode().join(['a'.encode()] * 20000)|length",
    "ljust": "'a'.ljust(10**9)|length",
    "ljust of bytes": "'a'.encode().ljust(10**9)|length",
    "mapping": "[D, {}.keys().mapping.get(D)]",
    "minus": "{}.keys() - [D]",
    "percent": "('%1000000000d' % 1)|length",
    "percent by name": "('%(x)1000000000d' % {'x': 1})|length",
    "percent by a nested name": "('%((x))1000000000d' % {'(x)': 1})|length",
    "percent, star": "('%*d' % (10**9, 1))|length",
    "percent, precision": "('%.*f' % (10**9, 1))|length",
    "percent of bytes": "('%1000000000d'.encode() % 1)|length",
    "percent, filter": "'%(x)1000000000d'|format(x=1)|length",
    "percent, even": "'%1000000000d' is even",
    "percent, odd": "'%1000000000d' is odd",
    "percent, divisibleby": "'%1000000000d' is divisibleby 3",
    "percent, select": "['%1000000000d']|select('even')|list",
    "replace": "A.replace('a', A)|length",
    "replace of bytes": "A.encode().replace('a'.encode(), A.encode())|length",
    "rfind": "(A * 3).rfind('ab' ~ A)",
    "rindex": "(A * 3).rindex('ab' ~ A)",
    "rjust": "'a'.rjust(10**9)|length",
    "rpartition": "(A * 3).rpartition('ab' ~ A)|length",
    "rsplit": "(A * 3).rsplit('ab' ~ A)|length",
    "strip": "A.strip('b' * 99999 ~ 'a')|length",
    "rstrip": "A.rstrip('b' * 99999 ~ 'a')|length",
    "lstrip": "A.lstrip('b' * 99999 ~ 'a')|length",
    "trim": "A|trim('b' * 99999 ~ 'a')|length",
    "striptags, method": "(('<a>' * 50000)|safe).striptags()|length",
    "to_bytes": "(5).to_bytes(10**9, 'big')|length",
    "translate": "A.translate({97: A})|length",
    "translate by a list": "A.translate([A] * 98)|length",
    "zfill": "'a'.zfill(10**9)|length",
    "zfill of bytes": "'a'.encode().zfill(10**9)|length",
    "lipsum": "lipsum(10**6)|length",
    "lipsum, empty": "lipsum(10**9, true, -1, 0)|length",
    "lipsum, long": "lipsum(1, false, 10**8, 10**8 + 1)|length",
    "large numbers": "(16**3000) * (16**3000)",
    "large numbers, tested": "(('f' * 900000)|int(base=16)) is divisibleby(7)",
}  # fmt: skip
LOOPS = {  # so many times what costs little once
    "range searched": "'a' in range(99999)",
    "values searched": "'x' in d.values()",
    "mapping copied": "d.keys().mapping.copy()",
    "set copied": "(d.keys() - []).copy()",
    "arguments of a macro": "macro(*range(99999))",
    "block": "self.block()",
    "range counted": "range(99999).count('a')",
}
PREAMBLE = (
    "{% macro macro() %}{{ varargs|length }}{% endmacro %}"
    "{% block block %}{% if 0 %}" + "{{ x }}" * 1500 + "{% endif %}{% endblock %}"
    "{% set A = 'a' * 50000 %}{% set R = range(9999)|list %}"
    "{% set d = dict(range(9998)|map('string')|map('center', 5)|batch(2)) %}"
    "{% set n = namespace(D=1) %}{% for i in range(40) %}{% set n.D = (n.D, n.D) %}{% endfor %}"
    "{% set D = n.D %}"
)


def bombs() -> dict[str, str]:
    once = {name: "{{ " + bomb + " }}" for name, bomb in BOMBS.items()}
    loop = "{% for i in range(9999) %}{% set x = "
    return once | {name: loop + bomb + " %}{% endfor %}" for name, bomb in LOOPS.items()}


@pytest.mark.parametrize("bomb", bombs())
def test_bombs_end_within_the_budget(bomb: str) -> None:
    template = ChatTemplate(PREAMBLE + bombs()[bomb], "bomb")
    begin = time.process_time()
    message = refusal(template.render, [{"role": "user", "content": "Hi"}])
    assert time.process_time() - begin < 5.0  # about 0.1 here; without a budget, minutes
    check_words(message, "bomb: the chat template failed", "Security")
