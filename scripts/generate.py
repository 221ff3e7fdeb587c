"""Writes the pages of docs/ that are made from the code, and checks that they are up to date."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmatrace.kernel import Commit

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ACCEPT = "make docs"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; cell text is kept on one line."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = (" ".join(str(cell).split()).replace("|", "\\|") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(title: str, source: str, *parts: str) -> str:
    return "\n".join([f"<!-- Made from {source} by `{ACCEPT}`; do not edit. -->", f"# {title}\n", *parts])


def cited(commit: Commit | None) -> str:
    return f"{commit.id} {commit.subject} ({commit.version})" if commit else ""


def trace_format() -> str:
    from vmatrace import schema

    def fields(of: Iterable[schema.Field]) -> str:
        rows = ((f"`{f.name}`", f.type, f.role, f.doc + (" (an opaque id)" if f.pointer else "")) for f in of)
        return table(("field", "type", "role", "what"), rows)

    roles = (
        "A trace is an Arrow IPC stream. Role *predicted*: replay predicts the field and compares; *input*:\n"
        "replay takes it from the trace, within checks; *informational*: nothing is decided by it.\n"
    )
    parts = [roles]
    for name, of in schema.TABLES.items():
        parts += [f"## Table `{name}`\n", fields(of)]
    for name, of in schema.ROW_TABLES.items():
        parts += [f"## Rows of type `{name}`\n", fields(of)]
    return page(f"Trace format, schema {schema.SCHEMA_VERSION}", "vmatrace/schema.py", *parts)


def features() -> str:
    from vmatrace.kernel import FEATURES, NAMED

    rows = (
        (
            f"`{f.id}`",
            f.summary,
            f.since,
            f"{f.commit.id} {f.commit.subject}" if f.commit else "not known",
            f.sign,
        )
        for f in FEATURES.values()
    )
    sets = (
        (f"`{name}`", s.label, ", ".join(f"`{id}`" for id in s.features if s.has(id)))
        for name, s in NAMED.items()
    )
    return page(
        "Features of kernels, and the named rule sets",
        "vmatrace/kernel",
        "A feature is one fact about a kernel - yes, no or unknown - that switches rules; it is never\n"
        "derived from a version number.\n",
        table(("feature", "what", "since", "commit", "how it is found"), rows),
        "## Rule sets\n",
        "*measured*: a kernel of it was run; *read*: its source was read only.\n",
        table(("name", "label", "features"), sets),
    )


def rules() -> str:
    import vmatrace.simulator
    from vmatrace.rules.registry import RULES

    assert vmatrace.simulator  # its import fills the registry
    parts = []
    for module in sorted({rule.module for rule in RULES.values()}):
        rows = (
            (
                f"`{r.id}`" + (" (unobservable)" if r.unobservable else ""),
                r.sentence,
                f"`{r.kernel_function}`",
                cited(r.commit),
                (f"with `{r.feature}`" if r.feature else "") + (f" until `{r.until}`" if r.until else ""),
            )
            for r in RULES.values()
            if r.module == module
        )
        parts += [f"## `{module}`\n", table(("rule", "says", "kernel function", "commit", "in force"), rows)]
    return page("The rules", "vmatrace/rules", *parts)


def frames_page() -> str:
    from vmatrace.frames import COLUMNS

    parts = ["`vmatrace.open(path).frame(kind)` gives one of these. Addresses are bytes, ranges half open.\n"]
    for kind, columns in COLUMNS.items():
        rows = ((f"`{name}`", dtype, doc) for name, dtype, doc in columns)
        parts += [f'## `frame("{kind}")`\n', table(("column", "type", "what"), rows)]
    return page("Frames", "vmatrace/frames.py", *parts)


def verdicts() -> str:
    from vmatrace.replay import SKIPPED_KINDS
    from vmatrace.replay.decisions import JUDGED

    rows = (
        ("passed", "every predicted field was compared and is equal, and both evidences agree"),
        ("failed", "one of them differs; the model then takes what was seen"),
        ("undecided", "records or inputs are missing, or the cause is not modelled; the reason is given"),
        ("skipped", "the call is of a kind that changes no VMA (below)"),
        ("inputs", "exec, whose layout is an input, and exit, where all of the model was right"),
    )
    kinds = ((f"`{key}`", text) for key, text in SKIPPED_KINDS.items())
    skipped = ("## What is skipped\n", table(("kind", "calls"), kinds))
    decisions = (
        "## Decisions\n",
        "Where the trace has the decisions layer, each decision of these kinds has a verdict of its own: the rules\n"
        "are run on what the kernel looked at, and its answer is compared. They do not use the model of the address\n"
        "space, so operations and decisions are evidence against each other: `agreed` counts the operations with\n"
        "merges or cuts of which both tell the same - merges and their stores, cuts, births and unmaps - and an\n"
        "operation of which they do not is FAILED too, unless records are missing or the header says which function\n"
        "could not be probed.\n",
        table(("decision", "compared"), JUDGED.items()),
    )
    verdicts = table(("verdict", "means"), rows)
    return page("Verdicts of `vmatrace replay`", "vmatrace/replay", verdicts, *skipped, *decisions)


def commands() -> str:
    from vmatrace.cli import COMMANDS, load

    parts = [f"```\n{help_text()}```\n"]
    for entry in COMMANDS:
        parts += [f"## {entry.name}\n", f"{entry.summary}\n", f"```\n{help_text(entry.name)}```\n"]
        app = getattr(load(entry), "app", None)
        for sub in app.registered_commands if app is not None else ():
            parts += [f"### {entry.name} {sub.name}\n", f"```\n{help_text(entry.name, sub.name)}```\n"]
    return page("Commands", "the help texts", *parts)


def help_text(*words: str) -> str:
    from vmatrace import cli

    kept = os.environ.get("COLUMNS")
    # typer reads the terminal's width; a page must not depend on it.
    os.environ["COLUMNS"] = "100"
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            status = cli.main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS") if kept is None else os.environ.update(COLUMNS=kept)
    assert status == 0, f"vmatrace {' '.join(words)} --help exits {status}"
    return text.getvalue()


PAGES: dict[str, Callable[[], str]] = {
    "trace-format.md": trace_format,
    "features.md": features,
    "rules.md": rules,
    "frames.md": frames_page,
    "verdicts.md": verdicts,
    "commands.md": commands,
}


def differences(name: str) -> str:
    """What differs between a page and what the code says, as a unified diff; empty where nothing does."""
    path = DOCS / name
    old = path.read_text() if path.exists() else ""
    new = PAGES[name]()
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), f"docs/{name}", "from the code", lineterm="", n=0
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the pages (default: say what differs)")
    if parser.parse_args().write:
        DOCS.mkdir(exist_ok=True)
        for name, make in PAGES.items():
            (DOCS / name).write_text(make())
        return 0
    found = [text for name in PAGES if (text := differences(name))]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
