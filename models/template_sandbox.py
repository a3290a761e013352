"""A Jinja environment for templates of strangers: no code to reach, and a budget to run on.

Jinja's sandbox keeps a template away from Python's internals; it is no limit on time or memory
('a' * 10**9 fills a gigabyte). So every operation that costs more than a constant pays for itself
out of a budget before it runs: loops for each turn, strings for their length, lists for what is
in them. A chat template needs a small part of the budget, a bomb ends within a second.
What no chat template needs (`center`, `lipsum`, `ljust`, ...) is not there at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn, cast

from jinja2 import Environment, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from models.template_meter import CHARS_PER_UNIT, METER, pay, pay_outside, steps

_MAX_INT_BITS = 1 << 14
_MAX_LAYOUT = 16  # numbers and strings that say how wide something is printed


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _words(
    "abs attr capitalize count d default dictsort e escape first float format indent int items "
    "join last length list lower map max min reject rejectattr replace reverse round safe select "
    "selectattr sort string title trim unique upper wordcount"
)
# These look at no more than the outside of their arguments; all others pay for everything inside.
_SHALLOW_FILTERS = _words(
    "attr count d default first items last length list map reject rejectattr reverse safe select "
    "selectattr"
)
_ITERATING_FILTERS = _words("list map max min reject rejectattr select selectattr sort unique join")
_METERED_TESTS = _words(
    "in == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le lower upper"
)
_METHODS = {
    str: _words(
        "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal "
        "isdigit islower isnumeric isspace istitle isupper join lower lstrip partition "
        "removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines "
        "startswith strip swapcase title upper"
    ),
    dict: _words("copy get items keys values"),
    list: _words("copy count index"),
    tuple: _words("count index"),
}
_CLOSED_TYPES = (int, float, complex, bytes, bytearray, set, frozenset, type)

_WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*(\*|\d{3})")
_WIDE_BRACES = re.compile(r"\d{3}|\{[^{}]+\{")
_WIDE_STRFTIME = re.compile(r"%[^a-zA-Z%]*\d")


def _refuse(what: str) -> NoReturn:
    raise SecurityError(f"the template uses {what}, which is not allowed")


def _check_layout(values: Iterable[Any]) -> None:
    """Refuses widths and fillings that make text long out of nothing."""
    for value in values:
        if isinstance(value, (tuple, list)):
            _check_layout(value)
        size = len(value) if isinstance(value, str) else value
        if isinstance(size, (int, float)) and not -_MAX_LAYOUT <= size <= _MAX_LAYOUT:
            _refuse(f"a width or an indentation over {_MAX_LAYOUT}")


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test of Jinja that pays first. Jinja marks those that take its context first."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def paying(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        given = [*args]
        value = given[at]
        if name in _ITERATING_FILTERS and not isinstance(value, (str, Undefined)):
            value = steps(value)
            # Joining repeats the separator, sorting and the like keep what they have seen.
            given[at] = value if name in _SHALLOW_FILTERS else list(value)
        for argument in (*given[at:], *kwargs.values()):
            if name in _SHALLOW_FILTERS:
                pay_outside(argument)
            else:
                meter.spend(meter.cost(argument))
        _check_filter(name, given[at:], kwargs)
        return pay_outside(function(*given, **kwargs))

    return paying


def _check_filter(name: str, args: list[Any], kwargs: Mapping[str, Any]) -> None:
    rest = [*args[1:], *kwargs.values()]
    if name in ("indent", "round", "tojson"):
        _check_layout(rest)
    elif name == "format":
        _check_percent(str(args[0]), rest)
    elif name == "replace":
        _pay_replacing(str(args[0]), rest)
    elif name == "join":
        METER.get().spend(len(args[0]) * METER.get().cost(*rest) if rest else 0)


def _pay_replacing(text: str, args: list[Any]) -> None:
    """Replacing is paid for at its worst: every place found, or every gap between characters."""
    words = [value for value in args if isinstance(value, str)]
    if len(words) != 2:
        _refuse("replace without two strings")
    places = text.count(words[0]) if words[0] else len(text) + 1
    METER.get().spend(places * len(words[1]) // CHARS_PER_UNIT)


def _check_percent(text: str, args: Iterable[Any]) -> None:
    """`'%5d' % x`: named fields can print an argument many times over."""
    if _WIDE_PERCENT.search(text):
        _refuse("a width of three digits in a format")
    meter = METER.get()
    meter.spend((1 + text.count("%")) * meter.cost(*args))


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
        _refuse(f"the name {name!r} in a namespace")


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
        kept = {name: call for name, call in self.filters.items() if name in _FILTERS}
        kept["tojson"] = _to_json
        self.filters = {name: _metered(name, call) for name, call in kept.items()}
        self.filters.update({"_pay": pay, "_pay_outside": pay_outside, "_steps": steps})
        for name in _METERED_TESTS:
            self.tests[name] = _metered(name, cast(Callable[..., Any], self.tests[name]))
        del self.globals["lipsum"]
        self.globals.update(
            dict=_make_dict,
            namespace=_NamedValues,
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
        )

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if type(obj) is _NamedValues:  # what it holds is the template's own
            return not attr.startswith("_")
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return not isinstance(obj, _CLOSED_TYPES) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        _refuse(f"{attribute!r} of {type(obj).__name__!r}")

    def getitem(self, obj: Any, argument: Any) -> Any:
        # Looking a nested tuple up in a dictionary hashes all of it.
        return super().getitem(obj, pay(argument) if isinstance(argument, tuple) else argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        text = str(value.__self__)

        @wraps(formatted)
        def paying(*args: Any, **kwargs: Any) -> str:
            if _WIDE_BRACES.search(text):
                _refuse("a width of three digits, or one that is itself a field, in a format")
            meter = METER.get()
            meter.spend((1 + text.count("{")) * meter.cost(text, args, kwargs))
            result: str = formatted(*args, **kwargs)
            return result

        return paying

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        bits = [abs(side).bit_length() for side in (left, right) if isinstance(side, int)]
        if operator == "%" and isinstance(left, str):
            _check_percent(left, [right])
        elif operator == "*" and len(bits) == 2:
            _check_bits(sum(bits))
        elif operator == "*" and bits:
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(value, (str, list, tuple)):
                METER.get().spend(1 + max(times, 0) * (1 + len(value)) // CHARS_PER_UNIT)
        elif operator == "**" and len(bits) == 2:
            _check_bits(bits[0] * abs(right))
        pay_outside(left)
        return pay_outside(super().call_binop(context, operator, left, pay_outside(right)))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls pay for their arguments; a macro's are only names, but its body is long."""
        meter = METER.get()
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, Macro):
            meter.spend(meter.unit_per_call)
        elif isinstance(__obj, LoopContext):
            args = tuple(steps(arg, meter.unit_per_call) for arg in args)
        elif isinstance(owner, (str, list, tuple, dict)):
            args = _pay_method(__obj.__name__, owner, args)
        else:
            meter.spend(4 + meter.cost(args, kwargs))
        return pay_outside(super().call(__context, __obj, *args, **kwargs))


def _pay_method(name: str, owner: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pays for a method of a string, list or dictionary. Returns the arguments to call it with."""
    meter = METER.get()
    if isinstance(owner, str) and name == "join" and args:
        items = list(steps(args[0]))
        meter.spend(meter.cost(items) + len(items) * meter.cost(owner))
        return (items, *args[1:])
    meter.spend(4 + meter.cost(args))
    if name in ("count", "index") and isinstance(owner, (list, tuple)):
        pay(owner)
    elif isinstance(owner, str):
        pay_outside(owner)
        if name == "replace":
            _pay_replacing(owner, list(args))
    elif name == "copy":
        pay_outside(owner)
    return args


def _check_bits(bits: int) -> None:
    if bits > _MAX_INT_BITS:
        _refuse(f"a number of over {_MAX_INT_BITS} bits")


def add_meters(tree: nodes.Template, environment: Environment) -> int:
    """Puts the payments for loops, output, comparisons and slices into a parsed template.

    Returns the number of nodes, a measure of what running all of it once costs.
    """

    def paid(node: nodes.Node, name: str = "_pay", units: int | None = None) -> nodes.Expr:
        args = [] if units is None else [nodes.Const(units, lineno=node.lineno)]
        call = nodes.Filter(cast(nodes.Expr, node), name, args, [], None, None, lineno=node.lineno)
        call.set_environment(environment)
        return call

    for output in list(tree.find_all(nodes.Output)):
        output.nodes = [paid(child) for child in output.nodes]
    for concat in list(tree.find_all(nodes.Concat)):
        concat.nodes = [paid(child) for child in concat.nodes]
    for compare in list(tree.find_all(nodes.Compare)):
        compare.expr = paid(compare.expr)
        for operand in compare.ops:
            operand.expr = paid(operand.expr)
    for item in list(tree.find_all(nodes.Getitem)):
        if isinstance(item.arg, nodes.Slice):
            item.node = paid(item.node, "_pay_outside")
    for pair in list(tree.find_all(nodes.Pair)):
        pair.key = paid(pair.key)
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = paid(loop.iter, "_steps", 1 + _num_nodes(loop) // 2)
    return _num_nodes(tree)


def _num_nodes(tree: nodes.Node) -> int:
    return sum(1 for _ in tree.find_all(nodes.Node))


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


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    if len(layout) > 100 or _WIDE_STRFTIME.search(layout):
        _refuse("a date format that is long or has widths")
    return datetime.now().strftime(layout)
