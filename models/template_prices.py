"""What the filters, tests and methods of a template cost beside reading what they are given.

Each function takes what the filter or method takes, the value or the owner first, and returns
units; so an argument may be given by place or by name. A filter that is in no table here costs
what its arguments and its result cost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jinja2.exceptions import SecurityError

from models.template_meter import CHARS_PER_UNIT, MAX_INT_BITS, METER, outside

_PERCENT = re.compile(r"%(?:\([^()]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")
_CODECS = re.compile("ascii|latin1|iso88591|utf8|utf(16|32)(le|be)?")
_MOST_PER_ERROR = 32  # characters in the place of one that an encoding lacks
# A character is copied, or compared with another, in about a thousandth of a unit; in a regular
# expression that starts anew at each place, in a hundredth.
_COPIES = 1 << 10
_MATCHES = 1 << 6


def refuse(what: str) -> NoReturn:
    raise SecurityError(f"the template uses {what}, which is not allowed")


def check_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        refuse(f"a number of over {MAX_INT_BITS} bits")


def percent(text: str | bytes, given: Any) -> float:
    """`text % given`: widths fill up, and named fields can print an argument many times over."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    widths = 0
    stars = [abs(part) for part in given if isinstance(part, int)] if _is_list(given) else [0]
    for spec in _PERCENT.finditer(text):
        if text.startswith("(", spec.end()):
            refuse("a format whose names hold parentheses")
        for width in filter(None, spec.groups()):
            widths += max(stars, default=0) if width == "*" else int(width)
    uses = 1 + text.count("%(")
    return text.count("%") + widths // CHARS_PER_UNIT + uses * METER.get().cost(given)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _expandtabs(owner: Any, tabsize: Any = 8) -> Any:
    return owner.count(b"\t" if isinstance(owner, bytes) else "\t") * tabsize // CHARS_PER_UNIT


def _indent(s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> Any:
    size = len(width) if isinstance(width, str) else width
    return (2 + len(str(s).splitlines())) * size // CHARS_PER_UNIT


def _remainder(value: Any, num: Any = 2) -> float:
    """The tests `even`, `odd` and `divisibleby` apply %, which formats where it finds text."""
    return percent(value, num) if isinstance(value, (str, bytes)) else 0


def _replace(owner: Any, old: Any, new: Any, count: Any = -1) -> Any:
    """At its worst: every place found, or every gap between characters."""
    places = owner.count(old) if old else len(owner) + 1
    return places * len(new) // CHARS_PER_UNIT


def _round(value: Any, precision: Any = 0, method: Any = "common") -> Any:
    check_bits(4 * abs(int(precision)))  # of ten to that power
    return 0


def _search_backwards(owner: Any, sep: Any = None, *_: Any, **__: Any) -> Any:
    # Unlike a search forwards, it compares anew at every place.
    return len(owner) * len(sep) // _COPIES if isinstance(sep, (str, bytes)) else 0


def _strip(owner: Any, chars: Any = None) -> Any:
    return len(owner) * len(chars) // _COPIES if isinstance(chars, (str, bytes)) else 0


def _striptags(value: Any) -> Any:
    # Some versions of markupsafe copy the whole text for every tag.
    text = str(value)
    return text.count("<") * len(text) // (8 * _COPIES)


def _sum(value: Any, attribute: Any = None, start: Any = 0) -> Any:
    # Lists are added one by one, each time into a longer one.
    is_number = isinstance(start, (int, float))
    return 0 if is_number else len(value) * METER.get().cost(start, value)


def _tojson(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None,
    sort_keys: Any = False,
) -> Any:  # fmt: skip
    width = len(indent) if isinstance(indent, str) else indent or 0
    cost = METER.get().cost
    return cost(value) * (width + (0 if separators is None else cost(separators)))


def _translate(owner: Any, table: Any) -> Any:
    parts = table.values() if isinstance(table, Mapping) else table if _is_list(table) else ()
    return len(owner) * max((outside(part) for part in parts), default=1)


def _transcode(owner: Any, encoding: Any = "utf-8", errors: Any = "strict") -> Any:
    """`encode` and `decode`: some of Python's encodings take time that grows with the square."""
    if not _CODECS.fullmatch(re.sub("[-_ ]", "", str(encoding).lower())):
        refuse("an encoding other than UTF-8, UTF-16, UTF-32, ASCII and Latin-1")
    return 0 if errors == "strict" else len(owner) * _MOST_PER_ERROR // CHARS_PER_UNIT


def _urlize(value: Any, *args: Any, **kwargs: Any) -> Any:
    words = str(value).split()
    rest = METER.get().cost(args, kwargs)
    return sum(len(word) ** 2 for word in words) // _MATCHES + (1 + len(words)) * rest


def _wordwrap(
    s: Any,
    width: Any = 79,
    break_long_words: Any = True,
    wrapstring: Any = None,
    break_on_hyphens: Any = True,
) -> Any:
    text, width = str(s), max(width, 1)
    # A long word is cut line by line, and what is left of it copied each time.
    copied = sum(len(word) ** 2 for word in re.findall(r"\s+|\S+", text)) // (width * _COPIES)
    lines = len(text.splitlines()) + 2 * len(text) // width
    return len(text) + copied + lines * (2 + len(wrapstring or "\n") // CHARS_PER_UNIT)


def _width(owner: Any, width: Any = 80, *_: Any) -> Any:
    return width // CHARS_PER_UNIT


FILTERS: Mapping[str, Callable[..., Any]] = {
    "batch": lambda value, linecount, fill_with=None: 0 if fill_with is None else linecount,
    "center": _width,
    "format": lambda value, *args, **kwargs: percent(str(value), kwargs or args),
    "indent": _indent,
    "join": lambda value, d="", attribute=None: len(value) * METER.get().cost(d),
    # It tries each list on one line before it breaks it, so it writes what is nested many times.
    "pprint": lambda value: 16 * METER.get().cost(value),
    "replace": lambda s, old, new, count=None: _replace(str(s), str(old), str(new)),
    "round": _round,
    "slice": lambda value, slices, fill_with=None: 2 * slices,
    "striptags": _striptags,
    "sum": _sum,
    "tojson": _tojson,
    "trim": lambda value, chars=None: _strip(str(value), chars),
    "urlize": _urlize,
    "wordwrap": _wordwrap,
    **dict.fromkeys(("divisibleby", "even", "odd"), _remainder),
}
METHODS: Mapping[str, Callable[..., Any]] = {
    "expandtabs": _expandtabs,
    "join": lambda owner, items: len(items) * outside(owner),
    "replace": _replace,
    "striptags": _striptags,
    "to_bytes": lambda owner, length=1, *_, **__: length // CHARS_PER_UNIT,
    "translate": _translate,
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _width),
    **dict.fromkeys(("decode", "encode"), _transcode),
    **dict.fromkeys(("lstrip", "rstrip", "strip"), _strip),
    **dict.fromkeys(("rfind", "rindex", "rpartition", "rsplit"), _search_backwards),
}
