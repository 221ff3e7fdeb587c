"""BTF, the kernel's own description of its types: struct members, prototypes, enums."""

from vmatrace.btf.reader import KERNEL_BTF, Btf, Function, Member, Param, Struct, load, parse

__all__ = ["KERNEL_BTF", "Btf", "Function", "Member", "Param", "Struct", "load", "parse"]
