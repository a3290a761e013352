"""A parsed template before it is compiled: how large it may be, and where it pays for its work."""

from __future__ import annotations

import math
from typing import cast

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.visitor import NodeTransformer

_MAX_DEPTH = 100  # Jinja and Python's compiler recurse, several calls a level
# Jinja walks the body of each loop and macro again for every loop and macro around it. Published
# templates of 30,000 characters need less than half of this; all of it compiles in about a second.
_MAX_WORK = 20_000
_WALKED_AGAIN = (nodes.For, nodes.Macro, nodes.CallBlock)


def check_size(tree: nodes.Template) -> None:
    """Raises TemplateSyntaxError for a template that would take long, or too deep, to compile."""
    work = 0
    stack: list[tuple[nodes.Node, int, int]] = [(tree, 0, 1)]
    while stack:
        node, depth, walks = stack.pop()
        work += walks
        if depth > _MAX_DEPTH:
            raise TemplateSyntaxError(f"it nests over {_MAX_DEPTH} deep", node.lineno)
        if work > _MAX_WORK:
            raise TemplateSyntaxError(f"it has over {_MAX_WORK} parts", node.lineno)
        inner = walks + isinstance(node, _WALKED_AGAIN)
        stack.extend((child, depth + 1, inner) for child in node.iter_child_nodes())


class _Infinity(NodeTransformer):
    """1e999 is infinite, which the compiled code would write as a name, `inf`."""

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if not isinstance(node.value, float) or math.isfinite(node.value):
            return node
        text = nodes.Const("inf", lineno=node.lineno)
        return nodes.Filter(text, "float", [], [], None, None, lineno=node.lineno)


def add_meters(tree: nodes.Template, environment: Environment) -> int:
    """Puts the payments for loops, output, comparisons and slices into a parsed template.

    Returns the number of nodes, a measure of what running all of it once costs.
    """
    _Infinity().visit(tree)

    def paid(node: nodes.Node, name: str = "_pay", units: int | None = None) -> nodes.Expr:
        args = [] if units is None else [nodes.Const(units, lineno=node.lineno)]
        return nodes.Filter(cast(nodes.Expr, node), name, args, [], None, None, lineno=node.lineno)

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
    tree.set_environment(environment)
    return _num_nodes(tree)


def _num_nodes(tree: nodes.Node) -> int:
    return sum(1 for _ in tree.find_all(nodes.Node))
