"""Values of the formulas that workflows hold, such as `floor(a * b) + 1`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "floor": math.floor,
    "int": int,
    "max": max,
    "min": min,
    "round": round,
}


def value_of(formula: str, names: Mapping[str, float]) -> float:
    """The value of a formula.

    Raises:
        ValueError: it uses a name or an operation that is not known, or is no formula.
    """
    try:
        return _value(ast.parse(formula.strip(), mode="eval").body, names)
    except (SyntaxError, KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{formula!r} cannot be worked out: {error!r}") from error


def _value(node: ast.AST, names: Mapping[str, float]) -> Any:
    match node:
        case ast.Constant():
            value = node.value
        case ast.Name():
            value = names[node.id]
        case ast.BinOp():
            value = _OPERATORS[type(node.op)](_value(node.left, names), _value(node.right, names))
        case ast.UnaryOp():
            value = _OPERATORS[type(node.op)](_value(node.operand, names))
        case ast.Compare(ops=[relation], comparators=[other]):
            value = _OPERATORS[type(relation)](_value(node.left, names), _value(other, names))
        case ast.IfExp():
            value = _value(node.body if _value(node.test, names) else node.orelse, names)
        case ast.Call(func=ast.Name(id=name)):
            value = _FUNCTIONS[name](*(_value(argument, names) for argument in node.args))
        case _:
            raise ValueError(f"{type(node).__name__} is not known")
    return value
