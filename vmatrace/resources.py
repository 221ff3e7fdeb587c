"""Finds the files that travel with the package: BPF sources and the bundled trace."""

from pathlib import Path

from vmatrace.errors import VmatraceError

_PACKAGE = Path(__file__).resolve().parent


def bpf_dir() -> Path:
    """Return the folder of the BPF sources: inside an installed package, else at the top of the checkout.

    Raises `VmatraceError` when neither exists (a package that was built without them).
    """
    # The package's own copy first: next to an installed package, `../bpf` would be somebody else's.
    for folder in (_PACKAGE / "bpf", _PACKAGE.parent / "bpf"):
        if folder.is_dir():
            return folder
    raise VmatraceError(
        f"BPF sources, {_PACKAGE}: not in this installation",
        hint="install vmatrace from a wheel or from a git checkout",
    )
