"""The list of all rules: each is one function, registered with the kernel function it states and its
commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, Final, ParamSpec, TypeVar, cast

from vmatrace.kernel import FEATURES, Commit, RuleSet
from vmatrace.rules.context import Kernel

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Rule:
    """One condition or step of the kernel's algorithm.

    ``feature`` switches it on, ``until`` off (ids of `vmatrace.kernel.FEATURES`); ``unobservable`` rules
    change nothing that can be seen from outside. ``module`` and ``name`` say where its function is.
    """

    id: str
    sentence: str
    kernel_function: str
    commit: Commit | None
    feature: str | None
    until: str | None
    unobservable: bool
    module: str
    name: str

    def stands(self, rules: RuleSet) -> bool:
        """Whether the rule is in force under a rule set (unknown features count as absent)."""
        if self.feature is not None and not rules.has(self.feature):
            return False
        return self.until is None or not rules.has(self.until)


#: Every rule by its id; filled when the modules of this package are imported.
RULES: Final[dict[str, Rule]] = {}


def rule(
    id: str,
    kernel_function: str,
    *,
    commit: Commit | None = None,
    feature: str | None = None,
    until: str | None = None,
    unobservable: bool = False,
) -> Callable[[Callable[Concatenate[Kernel, P], R]], Callable[Concatenate[Kernel, P], R | None]]:
    """Register a rule. Its function returns something true where the rule decides, else something false.

    The wrapped function notes the id in ``Kernel.decided`` when it decides, answers None when the rule is
    switched off, and asks its feature first, so that the function itself states the rule alone.
    """
    if commit is None:
        switch = FEATURES.get(feature or until or "")
        commit = switch.commit if switch else None

    def register(function: Callable[Concatenate[Kernel, P], R]) -> Callable[Concatenate[Kernel, P], R | None]:
        sentence = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        RULES[id] = Rule(
            id,
            sentence,
            kernel_function,
            commit,
            feature,
            until,
            unobservable,
            function.__module__,
            function.__name__,
        )

        always = feature is None and until is None
        plain = _always(id, function) if always else _switched(id, function, feature, until)
        return cast(Callable[Concatenate[Kernel, P], R | None], wraps(function)(plain))

    return register


# The two wrappers below run some twenty times in each operation: they take positional arguments only and
# ask a feature only where the rule has one.


def _always(id: str, function: Callable[..., R]) -> Callable[..., R | None]:
    def run(kernel: Kernel, *args: object) -> R | None:
        if kernel.off and id in kernel.off:
            return None
        answer = function(kernel, *args)
        if answer:
            kernel.decided[id] = None
        return answer

    return run


def _switched(id: str, function: Callable[..., R], feature: str | None, until: str | None) -> Callable[..., R | None]:
    def run(kernel: Kernel, *args: object) -> R | None:
        if kernel.off and id in kernel.off:
            return None
        if feature is not None and not kernel.has(feature):
            return None
        if until is not None and kernel.has(until):
            return None
        answer = function(kernel, *args)
        if answer:
            kernel.decided[id] = None
        return answer

    return run
