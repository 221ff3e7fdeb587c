"""The small changes to vmatrace/rules that cosmic-ray can make, each as a value: where, what, before and after."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

RULES = Path(__file__).resolve().parents[2] / "vmatrace" / "rules"
# No rule is in these: tables of names and numbers, plain values, the registry, the drawing for people.
EXCLUDED = ("__init__", "constants", "drawing", "model", "registry")
# Changes that mean another rule. Other arithmetic on flags and addresses makes nonsense that any test sees.
_KINDS = (
    "NumberReplacer", "AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceUnaryOperator_Delete_Not",
    "ReplaceBinaryOperator_BitAnd_BitOr", "ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add",
    "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak",
    "ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is",
)  # fmt: skip
_COMPARISON = "ReplaceComparisonOperator_"


def _wanted(operator: str) -> bool:
    name = operator.removeprefix("core/")
    if name in _KINDS:
        return True
    # Whether equal numbers are one object is the interpreter's affair: == for `is` is no other rule.
    return name.startswith(_COMPARISON) and not {"Is", "IsNot"} & set(name.removeprefix(_COMPARISON).split("_"))


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: the lines ``before`` and ``after`` tell it from every other, wherever the function moves."""

    module: str
    definition: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str
    source: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names the mutant in the list of explained ones."""
        return self.module, self.definition, self.before, self.after

    def touches(self, called: Collection[tuple[str, str]]) -> bool:
        """Whether code that called these functions of rules ran through the change."""
        if not self.definition or self.definition[0].isupper():  # a module's or a class's own line
            return True
        return (self.module, self.definition) in called

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line} {self.definition}\n    - {self.before}\n    + {self.after}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operator applies; the mutant itself is made when it is wanted."""

    module: str
    definition: str
    operator: str
    occurrence: int


@cache
def source_of(module: str) -> str:
    """The text of a module of rules."""
    return (RULES / f"{module}.py").read_text(encoding="utf-8")


def modules() -> list[str]:
    """The modules that are mutated."""
    return sorted(path.stem for path in RULES.glob("*.py") if path.stem not in EXCLUDED)


@cache
def _operators() -> dict[str, Operator]:
    return {name: get_operator(name)() for name in operator_names() if _wanted(name)}


def places(module: str) -> Iterator[Place]:
    """Every place of a module where a wanted operator applies, in the order of operators and text."""
    nodes = list(ast_nodes(get_ast(source_of(module))))
    for name, operator in sorted(_operators().items()):
        found = (node for node in nodes for _ in operator.mutation_positions(node))
        for occurrence, node in enumerate(found):
            yield Place(module, ASTQuery(node).get_definition_name() or "", name, occurrence)


def make(place: Place) -> Mutant | None:
    """The mutant at a place; None where the change is to annotations or the form of a value alone."""
    source = source_of(place.module)
    mutated = mutate_code(source, _operators()[place.operator], place.occurrence)
    assert mutated is not None, place
    if _without_annotations(mutated) == _without_annotations(source):
        return None
    pairs = zip(source.splitlines(), mutated.splitlines(), strict=True)
    line, before, after = next((n, a, b) for n, (a, b) in enumerate(pairs, 1) if a != b)
    if before.startswith("@dataclass"):
        return None
    return Mutant(
        place.module, place.definition, place.operator, place.occurrence, line, before.strip(), after.strip(), mutated
    )


class _Annotations(ast.NodeTransformer):
    """Takes annotations out of a tree."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def _without_annotations(source: str) -> str:
    return ast.dump(_Annotations().visit(ast.parse(source)))
