"""A Jinja environment for templates of strangers: no code to reach, and a budget to run on.

A template finds what it finds in Hugging Face's environment, which is Jinja's sandbox. That keeps
it away from Python's internals; it is no limit on time or memory ('a' * 10**9 fills a gigabyte).
So every operation that costs more than a constant pays for itself out of a budget before it runs:
loops for each turn, strings for their length, lists for what is in them, and by `template_prices`
what costs more than that. A chat template needs a small part of the budget, a bomb ends within a
second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import update_wrapper, wraps
from typing import Any, NoReturn, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import (
    ImmutableSandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
    modifies_known_mutable,
)
from jinja2.utils import Namespace, generate_lorem_ipsum
from markupsafe import Markup

from models import template_prices
from models.template_meter import CHARS_PER_UNIT, METER, pay, pay_outside, steps


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# These look at no more than the outside of their arguments; all others pay for everything inside.
_SHALLOW = _words(
    "attr batch count d default first items last length list map random reject rejectattr reverse "
    "safe select selectattr slice"
)
_ITERATING = _words(
    "batch groupby join list map max min reject rejectattr select selectattr slice sort sum unique "
    "urlencode"
)
_METERED_TESTS = _words(
    "in == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le lower upper even odd "
    "divisibleby"
)
# Methods that take the same time however large their owner is, and those that read all in it.
_CONSTANT = _words("get items keys values")
_READING = _words("count index")
# What Jinja adds to the arguments of every call in a loop or a block.
_JINJAS_OWN = _words("_loop_vars _block_vars")

_WIDE_STRFTIME = re.compile(r"%[^a-zA-Z%]*\d")


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test of Jinja that pays first. Jinja marks those that take its context first."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0
    price = template_prices.FILTERS.get(name)

    @wraps(function)
    def paying(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        given = [*args]
        if name in _ITERATING:
            given[at] = _paid_items(name, given[at], (*given[at + 1 :], *kwargs.values()))
        for argument in (*given[at:], *kwargs.values()):
            if name in _SHALLOW:
                pay_outside(argument)
            else:
                pay(argument)
        if price is not None:
            meter.spend(price(*given[at:], **kwargs))
        return pay_outside(function(*given, **kwargs))

    return paying


def _paid_items(name: str, value: Any, options: Iterable[Any]) -> Any:
    """What an iterating filter goes through: `value`, where each item is paid for."""
    if isinstance(value, (str, Undefined)) or not isinstance(value, Iterable):
        return value
    if name == "urlencode" and isinstance(value, dict):
        return value
    # An attribute such as "a.b.0,c" is looked up step by step, in every item.
    paths = [option for option in options if isinstance(option, str)]
    items = steps(value, 1 + sum(path.count(".") + path.count(",") for path in paths))
    return items if name in _SHALLOW else list(items)


class _PayingFormatter(SandboxedFormatter):
    """`str.format`, where each field pays for its value and its width."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return super().convert_field(value if conversion is None else pay(value), conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        widths = sum(int(width) for width in re.findall(r"\d+", format_spec))
        METER.get().spend(widths // CHARS_PER_UNIT)
        return super().format_field(pay(value), pay(format_spec))


class _PayingEscapeFormatter(_PayingFormatter, SandboxedEscapeFormatter):
    """The same for text that is marked as safe in HTML."""


class _NamedValues(Namespace):
    """Jinja's `namespace`, which never prints what it holds and takes no underscore names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        template_prices.refuse("a name in a namespace that is no text or begins with _")


class _Dict:
    """`dict` with no more to it than making dictionaries, as in Hugging Face."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant says, for training. Here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment. Rendering needs METER to be set; without it everything metered fails."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        # Folding constants would run template code before there is a budget.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _metered(name, call) for name, call in self.filters.items()}
        self.filters.update({"_pay": pay, "_pay_outside": pay_outside, "_steps": steps})
        for name in _METERED_TESTS:
            self.tests[name] = _metered(name, cast(Callable[..., Any], self.tests[name]))
        self.globals.update(
            dict=_Dict(),
            lipsum=_lipsum,
            namespace=_NamedValues,
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
        )

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if type(obj) is _NamedValues:  # what it holds is the template's own
            return not attr.startswith("_")
        return not isinstance(obj, type) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        if modifies_known_mutable(obj, attribute):  # a template may ask whether it is defined
            return super().unsafe_undefined(obj, attribute)
        template_prices.refuse(f"{attribute!r} of {type(obj).__name__!r}")

    def getitem(self, obj: Any, argument: Any) -> Any:
        # Looking a nested tuple up in a dictionary hashes all of it.
        return super().getitem(obj, pay(argument) if isinstance(argument, tuple) else argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text = value.__self__
        formatter = (
            _PayingEscapeFormatter(self, escape=text.escape)
            if isinstance(text, Markup)
            else _PayingFormatter(self)
        )

        def formatted(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                (kwargs,), args = args, ()
            result: str = type(text)(formatter.vformat(pay(text), args, kwargs))
            return result

        return update_wrapper(formatted, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = METER.get()
        # Subtracting sets hashes what is in them.
        is_deep = operator == "-"
        for side in (left, right):
            pay(side) if is_deep else pay_outside(side)
        bits = [abs(side).bit_length() for side in (left, right) if isinstance(side, int)]
        if operator == "%" and isinstance(left, (str, bytes)):
            meter.spend(template_prices.percent(left, right))
        elif operator == "*" and len(bits) == 2:
            template_prices.check_bits(sum(bits))
        elif operator == "*" and bits:
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(value, (str, bytes, list, tuple)):
                meter.spend(times * (1 + len(value)) // CHARS_PER_UNIT)
        elif operator == "**" and len(bits) == 2:
            template_prices.check_bits(bits[0] * abs(right))
        return pay_outside(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls pay for their arguments; a macro's are only names, but its body is long."""
        meter = METER.get()
        if isinstance(__obj, (Macro, BlockReference)):
            meter.spend(meter.unit_per_call + len(args) + len(kwargs))
        elif isinstance(__obj, LoopContext):
            args = tuple(steps(arg, meter.unit_per_call) for arg in args)
        else:
            # What a function takes from a generator is paid for as well: it may keep or hash it.
            args = tuple(list(steps(arg)) if isinstance(arg, Iterator) else arg for arg in args)
            named = {key: value for key, value in kwargs.items() if key not in _JINJAS_OWN}
            meter.spend(4 + meter.cost(args, named))
            _pay_method(__obj, args, named)
        return pay_outside(super().call(__context, __obj, *args, **kwargs))


def _pay_method(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pays for what a method of a value does with its owner."""
    owner = getattr(method, "__self__", None)
    name = getattr(method, "__name__", None)
    if owner is None or isinstance(owner, type) or name in _CONSTANT:
        return
    if name in _READING:
        pay(owner)
    else:
        pay_outside(owner)
    price = template_prices.METHODS.get(name or "")
    if price is not None and isinstance(owner, (str, bytes, int)):
        METER.get().spend(price(owner, *args, **kwargs))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in Hugging Face, where Jinja's own filter escapes what is special in HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    METER.get().spend(n * (8 + 4 * (max if max > 0 else 0)))
    return generate_lorem_ipsum(n, html, min, max)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    if len(layout) > 100 or _WIDE_STRFTIME.search(layout):
        raise SecurityError("the template uses a date format that is long or has widths")
    return datetime.now().strftime(layout)
