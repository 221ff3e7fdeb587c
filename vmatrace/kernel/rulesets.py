"""Rule sets: the features of one kernel under a name, and the parser of ``6.18+copied_from-x``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Literal

from vmatrace.errors import UsageError, nearest
from vmatrace.kernel.features import FEATURES

Label = Literal["measured", "read"]


@dataclass(frozen=True, slots=True)
class RuleSet:
    """The features of one kernel: True, False, or None where it is not known.

    ``label`` is ``measured`` where a kernel of that release was run, ``read`` where only its source
    was read; the features of a live kernel or a trace are always ``measured``. ``fitted`` are the
    ids whose value was found from behaviour rather than from the kernel's own description.
    """

    name: str
    features: Mapping[str, bool | None]
    label: Label
    fitted: frozenset[str] = frozenset()

    def has(self, feature: str) -> bool:
        """Whether the feature is there; an unknown one counts as absent (see `unknown`, `variants`)."""
        return self.features[feature] is True

    @property
    def unknown(self) -> tuple[str, ...]:
        """The ids of the features whose value is not known, in table order."""
        return tuple(key for key in FEATURES if self.features[key] is None)

    def changed(self, name: str | None = None, /, **values: bool | None) -> RuleSet:
        """The same rule set with some features set to other values."""
        _check_ids(values)
        features = MappingProxyType({**self.features, **values})
        return replace(self, name=self.name if name is None else name, features=features)

    def variants(self, ids: tuple[str, ...] | None = None) -> Iterator[RuleSet]:
        """Every rule set that results from deciding the unknown features (or the given ones) both ways."""
        open_ids = self.unknown if ids is None else ids
        for values in product((False, True), repeat=len(open_ids)):
            decided: dict[str, bool | None] = dict(zip(open_ids, values, strict=True))
            yield self.changed(**decided)


# What each named release of mainline has over the one before it; "-id" takes a feature back.
# The order of this table is the only order there is: nothing compares version numbers.
_RELEASES: tuple[tuple[str, Label, str], ...] = (
    ("6.1", "measured", ""),
    ("6.6", "read", "munmap_new_outside ksm_opt_in close_only_deleted"),
    ("6.12", "measured", "mprotect_drops_account map_stack_nohuge mseal mseal_per_vma droppable vmg"),
    (
        "6.16",
        "measured",
        "guard_regions vmg_target vm_refcnt vma_typesafe vma_layout_packed hugetlb_unshare_in_split"
        " copy_vma_undo anon_merge_fix mmap_prepare compat_mmap_prepare vma_alloc_in_mm"
        " init_stack_in_mm vma_exec skip_vma_uprobe dontunmap_drops_account",
    ),
    ("6.17", "measured", "early_ksm_flag multi_vma_mremap seal_bit_low seal_discard_by_ops uffd_not_droppable"),
    ("6.18", "measured", "desc_vm_file -dontunmap_drops_account"),
    ("6.19", "measured", "copied_from sticky_flags guard_av_anon_only desc_action"),
    ("7.0", "measured", "desc_vma_flags compat_assigns_flags"),
    ("7.1", "measured", "mremap_count_7_1 wide_flags droppable_unlockable"),
    ("7.2", "measured", "merged_keeps_ops"),
    (
        "7.3",
        "measured",
        "anon_pgoff no_dontunmap_self_merge dontunmap_splits_locked uffd_modes_kept dontunmap_resets_pgoff"
        " secretmem_unlocked",
    ),
)


def _build_named() -> Mapping[str, RuleSet]:
    current: set[str] = set()
    named = {}
    for name, label, delta in _RELEASES:
        for word in delta.split():
            if word.startswith("-"):
                current.remove(word[1:])
            else:
                current.add(word)
        features: dict[str, bool | None] = {key: key in current for key in FEATURES}
        named[name] = RuleSet(name, MappingProxyType(features), label)
    return MappingProxyType(named)


NAMED: Mapping[str, RuleSet] = _build_named()

_EDIT = re.compile(r"([+-])([^+-]*)")


def rule_set(text: str, auto: RuleSet | None = None) -> RuleSet:
    """The rule set that ``text`` names: a release, or ``auto``, then any ``+feature`` and ``-feature``.

    ``auto`` gives the features of a trace or of the running kernel. Raises `UsageError`, with the
    nearest names, for anything else; a three-part kernel version is refused too, because stable
    kernels mix features.
    """
    head = re.split(r"[+-]", text, maxsplit=1)[0]
    base = auto if head == "auto" and auto is not None else NAMED.get(head)
    if base is None:
        raise _unknown_name(head)
    values: dict[str, bool | None] = {}
    for sign, feature in _EDIT.findall(text[len(head) :]):
        values[feature] = sign == "+"
    return base.changed(text, **values) if values else base


# A stable kernel takes fixes in and drops what mainline dropped later; it never loses anything else.
_TAKEN_BACK = frozenset(word[1:] for *_, delta in _RELEASES for word in delta.split() if word.startswith("-"))
_UNLIKELY = 10


def nearest_release(features: Mapping[str, bool | None]) -> tuple[str, tuple[str, ...]]:
    """The named release that a kernel most likely grew from, and the edits (``+id``, ``-id``) to it.

    Features with an unknown value do not count. Of equally near releases the newest is taken.
    """

    def edits(release: RuleSet) -> tuple[str, ...]:
        return tuple(
            ("+" if features[key] else "-") + key
            for key in FEATURES
            if features.get(key) is not None and features[key] != release.features[key]
        )

    def cost(name: str) -> int:
        lost = [edit[1:] for edit in edits(NAMED[name]) if edit.startswith("-")]
        return len(edits(NAMED[name])) + _UNLIKELY * len(set(lost) - _TAKEN_BACK)

    best = min(reversed(list(NAMED)), key=cost)
    return best, edits(NAMED[best])


def _check_ids(values: Mapping[str, bool | None]) -> None:
    for feature in values:
        if feature not in FEATURES:
            near = nearest(feature, FEATURES)
            hint = f"did you mean {near}?" if near else "`vmatrace doctor` lists the features"
            raise UsageError(f"rule set, feature {feature!r}: not a known feature", hint)


def _unknown_name(head: str) -> UsageError:
    names = ", ".join(NAMED)
    if head == "auto":
        return UsageError("rule set 'auto': there is no trace to take features from", f"name one of {names}")
    parts = head.removeprefix("v").split(".")
    series = ".".join(parts[:2])
    if len(parts) > 2 and series in NAMED:
        return UsageError(
            f"rule set {head!r}: stable kernels mix features, so only mainline releases have a name",
            f"say {series}, and add or remove features, as in {series}+copied_from",
        )
    near = series if series in NAMED else _closest_by_number(series) or nearest(head, [*NAMED, "auto"])
    hint = f"the nearest is {near}; known: {names}, auto" if near else f"known: {names}, auto"
    return UsageError(f"rule set {head!r}: not a known name", hint)


def _closest_by_number(series: str) -> str:
    """The listed name nearest to an unlisted one in number: for the hint only, it decides nothing."""
    if not re.fullmatch(r"\d+\.\d+", series):
        return ""
    major, minor = (int(part) for part in series.split("."))
    wanted = major * 100 + minor

    def distance(name: str) -> int:
        known_major, known_minor = (int(part) for part in name.split("."))
        return abs(known_major * 100 + known_minor - wanted)

    return min(NAMED, key=distance)
