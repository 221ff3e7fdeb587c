"""The command line: finds the command, runs it, and turns every way it can end into one exit status.

Holds no logic of its own; each command is one file beside this one, imported only when it is the
one asked for, so that `vmatrace --help` stays quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import typer
import typer.main

from vmatrace.cli import common
from vmatrace.errors import EXIT_BAD_TRACE, EXIT_CANNOT_TRACE, EXIT_USAGE, VmatraceError

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_VERBOSITY = {"-v": 1, "--verbose": 1, "-vv": 2, "-vvv": 2}

# typer carries its own copy of click in some versions and imports it in others; the classes are the
# same family either way, and BadParameter is public in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_ClickError: type[Exception] = typer.BadParameter.__mro__[2]


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """One command: its name, the line it has in ``vmatrace --help``, and how it parses.

    The module is ``vmatrace.cli.<name>``; it has a function ``command`` (its status is the returned
    int, None for 0) or, for a command with sub-commands, a `typer.Typer` named ``app``.
    ``runs_command``: everything from the first word that is no option belongs to another program.
    ``captures``: it looks at the running kernel, so a fault of ours means "cannot trace", not "bad trace".
    """

    name: str
    summary: str
    runs_command: bool = False
    captures: bool = False


COMMANDS = (
    CommandEntry("doctor", "What works on this kernel: layers, probes, features, limits.", captures=True),
    CommandEntry("record", "Trace a command, running processes, or all.", runs_command=True, captures=True),
    CommandEntry("show", "The events of a trace, a line each."),
    CommandEntry("timeline", "The address space at any moment, or what changed."),
    CommandEntry("replay", "Did the kernel keep to its rules? A verdict for each operation."),
    CommandEntry("simulate", "Run a scenario through the rules alone."),
    CommandEntry("rules", "The rules, their kernel commits, the features that switch them."),
    CommandEntry("fingerprint", "Which rule set this kernel follows, told by its behaviour.", captures=True),
    CommandEntry("lab", "A command on another kernel, in a guest.", runs_command=True, captures=True),
)


def run() -> None:
    """Entry point of the ``vmatrace`` script."""
    sys.exit(main())


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's arguments) and return its exit status."""
    words, verbosity = _split_verbosity(list(sys.argv[1:] if args is None else args))
    common.set_verbosity(verbosity)
    entry = _chosen(words)
    try:
        status = _invoke(words, entry)
        sys.stdout.flush()
    except Exception as error:
        return _report(error, entry)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return status


def load(entry: CommandEntry) -> ModuleType:
    """Import the module of a command."""
    _import_numpy()
    return importlib.import_module(f"{__name__}.{entry.name}")


def _import_numpy() -> None:
    """NumPy without the threads of its linear algebra, which nobody here needs: they spin for a while when they start.

    The variable goes again: a traced command gets the user's environment.
    """
    if "OPENBLAS_NUM_THREADS" in os.environ or "numpy" in sys.modules:
        return
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    importlib.import_module("numpy")
    del os.environ["OPENBLAS_NUM_THREADS"]


def build_app(wanted: CommandEntry | None) -> typer.Typer:
    """Build the typer application: ``wanted`` for real, the others as lines of the help text."""
    app = typer.Typer(
        name="vmatrace",
        help="Shows what the Linux kernel decides about memory maps: merges, splits, and why.",
        epilog="Exit status: 0 all holds, 1 FAILED, 2 usage, 3 cannot trace here, 4 trace unusable.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_global_options)
    for entry in COMMANDS:
        if entry == wanted:
            _add(app, entry, load(entry))
        else:
            app.command(entry.name, short_help=entry.summary)(_placeholder)
    return app


def _add(app: typer.Typer, entry: CommandEntry, module: ModuleType) -> None:
    settings = {"allow_interspersed_args": not entry.runs_command}
    if hasattr(module, "app"):
        app.add_typer(module.app, name=entry.name, short_help=entry.summary)
    else:
        app.command(entry.name, short_help=entry.summary, context_settings=settings)(module.command)


def _placeholder() -> None:
    raise AssertionError("a command that was not asked for was run")


def _print_version(wanted: bool) -> None:
    if wanted:
        from vmatrace import __version__

        typer.echo(f"vmatrace {__version__}")
        raise typer.Exit


def _global_options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", is_eager=True, callback=_print_version
    ),
    verbose: bool = typer.Option(False, "-v", "--verbose", help="Say more; -vv shows where an error arose."),
) -> None:
    """Declare the options before the command; `main` has acted on -v already."""


def _split_verbosity(words: list[str]) -> tuple[list[str], int]:
    """Take -v, -vv and --verbose out of our own words; those of a traced command are not ours."""
    own = words.index("--") if "--" in words else len(words)
    entry = _chosen(words)
    if entry is not None and entry.runs_command:
        # Where the other program's words begin only the parser knows: take what directly follows the name.
        own = words.index(entry.name) + 1
        while own < len(words) and words[own] in _VERBOSITY:
            own += 1
    count = sum(_VERBOSITY.get(word, 0) for word in words[:own])
    return [word for word in words[:own] if word not in _VERBOSITY] + words[own:], count


def _chosen(words: Sequence[str]) -> CommandEntry | None:
    name = next((word for word in words if not word.startswith("-")), None)
    return next((entry for entry in COMMANDS if entry.name == name), None)


def _invoke(words: list[str], entry: CommandEntry | None) -> int:
    command = typer.main.get_command(build_app(entry))
    try:
        with command.make_context("vmatrace", words) as context:
            status = command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    return status if isinstance(status, int) else 0


def _report(error: Exception, entry: CommandEntry | None) -> int:
    """Say on stderr what went wrong and return the exit status for it."""
    if isinstance(error, typer.Abort):
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    if common.verbosity() > 1:
        _print_traceback(error)
    if isinstance(error, VmatraceError):
        common.print_error(error.message, error.hint)
        return error.exit_code
    if isinstance(error, _ClickError):
        return _report_usage(error, entry)
    status = EXIT_CANNOT_TRACE if entry is not None and entry.captures else EXIT_BAD_TRACE
    if isinstance(error, OSError):
        where = error.filename if error.filename is not None else "stdout"
        common.print_error(f"{os.fsdecode(where) if not isinstance(where, int) else where}: {error.strerror}")
        if error.filename is None:
            _silence_stdout()
    else:
        common.print_error(
            f"internal, vmatrace {entry.name if entry else ''}: {type(error).__name__}: {error}",
            "this is a fault of vmatrace; run it again with -vv and report what it prints",
        )
    return status


def _report_usage(error: Exception, entry: CommandEntry | None) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(str(getattr(error, "message", error)), err=True)
        return EXIT_USAGE
    text = str(error.format_message() if hasattr(error, "format_message") else error)
    text = text[:1].lower() + text[1:].rstrip(".")
    where = f"vmatrace {entry.name}" if entry is not None else "vmatrace"
    common.print_error(f"usage, {where}: {text}", f"{where} --help")
    return EXIT_USAGE


def _print_traceback(error: Exception) -> None:
    import traceback

    traceback.print_exception(error)


def _silence_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush raises no second error."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    finally:
        os.close(devnull)
