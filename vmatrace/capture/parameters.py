"""What the BPF programs of the decisions layer must know: offsets of this kernel's structs, arguments of each function.

Arguments are found by their names in the prototypes that BTF has, so that a kernel that moved one, or has one more,
needs nothing new here. Nothing is loaded or attached (`vmatrace.capture.decisions`).
"""

from __future__ import annotations

from collections.abc import Mapping

from vmatrace.btf import Btf, Function, Member
from vmatrace.kernel.plan import Probe
from vmatrace.schema import DECISIONS, MERGE_STATES, PROPOSAL_BITS

BASE = 0x5EED0000
"""A parameter stands in the compiled program as this number plus its place in PARAMETERS."""
NONE = 15
PARAMETERS = (
    "PROBE", "WHAT", "RETURNS", "ARGUMENT_BYTES", "MM", "MM_BEHIND", "MM_OFFSET", "MERGE", "UNMAP", "DESCRIPTOR",
    "OLD_MERGE", "START", "END", "LENGTH", "FLAGS", "PGOFF", "FILE", "ANON_VMA", "ANON_PGOFF", "UFFD", "POLICY", "NAME",
    "DELTA", "NEW_BELOW", "KEEP_SOURCE", "PREV", "SOURCE", "SOURCE_BEHIND", "RESULT", "RESULT_BEHIND",
)  # fmt: skip

# Parameters that say which argument is what, and the names that this argument has had.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "MERGE": ("vmg",),
    "UNMAP": ("vms",),
    "DESCRIPTOR": ("desc",),
    "START": ("start", "addr", "address"),
    "END": ("end",),
    "LENGTH": ("len",),
    "FLAGS": ("vm_flags", "vma_flags", "flags"),
    "PGOFF": ("pgoff",),
    "FILE": ("file",),
    "ANON_VMA": ("anon_vma",),
    "ANON_PGOFF": ("anon_pgoff",),
    "UFFD": ("vm_userfaultfd_ctx",),
    "POLICY": ("policy",),
    "NAME": ("anon_name",),
    "DELTA": ("delta", "shift"),
    "NEW_BELOW": ("new_below",),
    "KEEP_SOURCE": ("keep_source",),
    "PREV": ("prev",),
    "SOURCE": ("vma", "orig"),
}
# Where a name means something else: which VMA a decision starts from, and which is looked at again when it is made.
_SPECIAL: Mapping[str, Mapping[str, str]] = {
    "MERGE_COPIED": {"SOURCE": "vmap"},
    "EXPAND": {"RESULT": "vma"},
    "SHRINK": {"RESULT": "vma"},
    "SPLIT": {"RESULT": "vma"},
    "COMPAT_MMAP": {"RESULT": "vma"},
    "STACK_GROWTH": {"RESULT": "vma"},
    "RELOCATE": {"RESULT": "vma"},
    "EXEC_STACK": {"RESULT": "vmap", "SOURCE": ""},
    "BRK": {"PREV": "vma", "SOURCE": ""},
    "ANON_PREPARE": {"RESULT": "vma"},
    "ANON_CLONE": {"SOURCE": "src", "RESULT": "dst"},
    "ANON_FORK": {"SOURCE": "pvma", "RESULT": "vma"},
}
_RETURNS = {"void": 0, "int": 1, "long unsigned int": 3}
_POINTER, _ADDRESS = 2, 3

_MERGE_FIELDS = {
    "mm": ("mm",),
    "start": ("start",),
    "end": ("end",),
    "flags": ("vm_flags", "flags"),
    "pgoff": ("pgoff",),
    "file": ("file",),
    "anon_vma": ("anon_vma",),
    "policy": ("policy",),
    "uffd_ctx": ("uffd_ctx",),
    "anon_name": ("anon_name",),
    "prev": ("prev",),
    "middle": ("middle", "vma"),
    "next": ("next",),
    "target": ("target", "vma"),
    "state": ("state",),
    "copied_from": ("copied_from",),
    "anon_pgoff": ("anon_pgoff",),
}
_MERGE_BITS = {
    "PROPOSAL_JUST_EXPAND": ("just_expand", "merge_flags"),  # 6.12: VMG_FLAG_JUST_EXPAND, the lowest bit
    "PROPOSAL_GIVE_UP_ON_OOM": ("give_up_on_oom",),
    "PROPOSAL_SKIP_UPROBE": ("skip_vma_uprobe",),
}
_MERGE_STATES = {
    "VMA_MERGE_ERROR_NOMEM": "STATE_NOMEM",
    "VMA_MERGE_NOMERGE": "STATE_REFUSED",
    "VMA_MERGE_SUCCESS": "STATE_MERGED",
}
_DESCRIPTOR_FIELDS = {
    "mm": ("mm",),
    "start": ("start",),
    "end": ("end",),
    "pgoff": ("pgoff",),
    "flags": ("vm_flags", "vma_flags"),
    "vm_ops": ("vm_ops",),
    "private_data": ("private_data",),
    "vm_file": ("vm_file", "file"),  # before 6.18 the file that the VMA will hold is this one
    "action": ("action.type",),
}
_UNMAP_FIELDS = {"start": ("start",), "end": ("end",), "vma": ("vma",), "vma_count": ("vma_count",)}


def decisions_header(btf: Btf) -> str:
    """The text of vmatrace_decisions.h: the parameters' numbers, and offsets of the structs that this kernel has."""
    lines = ["/* Generated for one kernel from its BTF. */", f"#define PARAMETER_BASE {BASE:#x}"]
    lines += [f"#define PARAMETER_{name} {at}" for at, name in enumerate(PARAMETERS)]
    merge = _offsets(btf, "vma_merge_struct", "vmg", _MERGE_FIELDS)
    if merge:
        size = btf.struct("vma_merge_struct").size
        lines += [*merge, f"#define VMG_READ_SIZE {size}", _merge_bits(btf), _merge_states(btf)]
    lines += _offsets(btf, "vm_area_desc", "desc", _DESCRIPTOR_FIELDS)
    lines += _offsets(btf, "vma_munmap_struct", "vms", _UNMAP_FIELDS)
    return "\n".join(lines) + "\n"


def parameters(probe: Probe, number: int, btf: Btf) -> dict[str, int]:
    """The parameters of the programs for one function, the ``number``-th of the plan."""
    function = btf.function(probe.name)
    values = dict.fromkeys(PARAMETERS, 0) | dict.fromkeys((*_NAMES, "MM", "RESULT"), NONE)
    values |= {"PROBE": number, "WHAT": DECISIONS[probe.what], "RETURNS": 1}
    if function is None:  # a hook in a module, which vmlinux's BTF does not describe: int hook(struct vm_area_desc *)
        values |= {"ARGUMENT_BYTES": 8, "DESCRIPTOR": 0} if probe.what == "MMAP_PREPARE" else {}
    else:
        values |= _arguments(probe, function)
        values["RETURNS"] = _POINTER if function.returns.endswith("*") else _RETURNS.get(function.returns, _ADDRESS)
    return values | _address_space(values, function, btf)


def _arguments(probe: Probe, function: Function) -> dict[str, int]:
    """Which argument is what. An argument of up to 8 bytes takes a place, structs by value included."""
    special = _SPECIAL.get(probe.what, {})
    places: dict[str, int] = {}
    at = 0
    for param in function.params:
        places[param.name] = at
        at += max(1, -(-param.size // 8))
    found = {"ARGUMENT_BYTES": 8 * at}
    wanted = {**_NAMES, **{name: (argument,) for name, argument in special.items()}}
    for name, names in wanted.items():
        place = next((places[argument] for argument in names if argument in places), NONE)
        found[name] = place if place < NONE else NONE
    by_name = {param.name: param for param in function.params}
    for name in ("SOURCE", "RESULT"):
        argument = special.get(name, "")
        found[f"{name}_BEHIND"] = int(argument in by_name and by_name[argument].type_name.endswith("**"))
    found["OLD_MERGE"] = int("prev" in places and "vmg" not in places and "anon_name" in places)
    return found


def _address_space(values: Mapping[str, int], function: Function | None, btf: Btf) -> dict[str, int]:
    """How the function's address space is found: named, behind a struct or a VMA, or the task's own."""
    for name in ("oldmm", "mm"):
        if function is not None and (at := function.param(name)) is not None:
            return {"MM": at}
    for argument, struct in (("MERGE", "vma_merge_struct"), ("DESCRIPTOR", "vm_area_desc")):
        if values[argument] != NONE:
            return {"MM": values[argument], "MM_BEHIND": 1, "MM_OFFSET": btf.offset(f"{struct}.mm")}
    if values["SOURCE"] != NONE and not values["SOURCE_BEHIND"]:
        return {"MM": values["SOURCE"], "MM_BEHIND": 1, "MM_OFFSET": btf.offset("vm_area_struct.vm_mm")}
    return {}


def _offsets(btf: Btf, struct: str, prefix: str, fields: Mapping[str, tuple[str, ...]]) -> list[str]:
    if btf.find_struct(struct) is None:
        return []
    lines = []
    for field, names in fields.items():
        if (member := _first(btf, struct, names)) is not None:
            lines.append(f"#define OFF_{prefix}_{field} {member.offset_bytes}")
    return lines


def _first(btf: Btf, struct: str, names: tuple[str, ...]) -> Member | None:
    found = (btf.member(struct, name) for name in names)
    return next((member for member in found if member is not None), None)


def _merge_bits(btf: Btf) -> str:
    tests = []
    for bit, names in _MERGE_BITS.items():
        if (member := _first(btf, "vma_merge_struct", names)) is not None:
            word, shift = divmod(member.bit_offset, 64)
            tests.append(f"((v)[{word}] >> {shift} & 1) * {PROPOSAL_BITS[bit]}")
    return f"#define VMG_BITS(v) ({' | '.join(tests) or '0'})"


def _merge_states(btf: Btf) -> str:
    states = btf.enum("vma_merge_state") or {}
    known = [(states[name], MERGE_STATES[ours]) for name, ours in _MERGE_STATES.items() if name in states]
    tests = " : ".join(f"(raw) == {raw} ? {ours}" for raw, ours in known)
    return f"#define MERGE_STATE(raw) ({tests + ' : 0' if tests else '0'})"
