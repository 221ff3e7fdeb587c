"""`make bench`: measures what capture, reading and tracing cost here, and prints it beside the bars.

Asserts nothing: a number depends on the machine and on what else it does. All ratios come from
interleaved rounds, the least time of each side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import offline, overhead, reader
from tests.workloads.build import build


def line(label: str, value: str, bar: str = "") -> None:
    """One row: what, how much, and the bar it is held against."""
    print(f"  {label:<52} {value:>22}   {bar}", flush=True)


def head(text: str) -> None:
    """A section's title."""
    print(f"\n{text}", flush=True)


def show_start(program: Path, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time to compile, load and attach."""
    head("Start")
    ready, importing = reader.attach_seconds(directory, options.tries)
    line("record: start to tracing, interpreter included", f"{ready:.2f} s", "< 1.5 s")
    line("  of that: interpreter and imports", f"{importing:.2f} s")
    first, again = reader.btf_seconds(directory)
    line("  of that: BTF, its index being there", f"{again:.2f} s")
    line("BTF on first use", f"{first:.2f} s", "< 0.5 s")
    return {"ready_s": ready, "import_s": importing, "btf_first_s": first, "btf_again_s": again}


def show_reader(program: Path, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """CPU of the reader and bytes of the trace, per system call; then the trace read again."""
    head("Reader (trace on disk, ids opaque)")
    found: dict[str, Any] = {}
    for what, amount in (("mprotect", options.storm), ("pair", options.storm // 2)):
        reading = reader.record_storm(program, directory, what, amount)
        found[what] = {
            "cpu_ns": reading.cpu_ns_per_call,
            "bytes": reading.bytes_per_call,
            "lost": reading.lost,
            "calls": reading.calls,
        }
        line(
            f"{what}: CPU an operation ({reading.calls:,} operations)",
            f"{reading.cpu_ns_per_call:,.0f} ns",
            "< 1,000 ns",
        )
        line(f"{what}: bytes an operation", f"{reading.bytes_per_call:,.0f}", "aim: <= 300")
        line(f"{what}: records lost", "not said" if reading.lost is None else f"{reading.lost:,}", "0")
        found[what]["offline"] = show_offline(directory / "reading.vmat", what)
    return found


def show_offline(path: Path, what: str) -> dict[str, Any]:
    """Ingest and timeline of the trace just made."""
    got = offline.read_trace(path)
    if isinstance(got, str):
        line(f"{what}: ingest + timeline", f"failed: {got}")
        return {"error": got}
    rate, memory = got.operations / got.seconds, got.peak_bytes / max(got.operations, 1)
    line(f"{what}: ingest + timeline ({got.operations:,} operations)", f"{rate:,.0f} ops/s", ">= 300,000 ops/s")
    line(f"{what}: memory of it, an operation", f"{memory:,.0f} bytes", "< 500 bytes")
    return {"per_second": rate, "bytes": memory}


def show_losses(program: Path, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The long storm of both kinds; the best of three counts."""
    head(f"Losses (storm of mprotect and mmap/munmap, {options.seconds} s)")
    losses: list[int | None] = []
    for number in range(options.loss_runs):
        reading = reader.record_storm(program, directory, "mix", options.seconds)
        losses.append(reading.lost)
        said = "not said" if reading.lost is None else f"{reading.lost:,}"
        line(f"run {number + 1}: records lost of {reading.calls:,} operations", said, "0 in the best of 3")
        line(
            "  reader CPU, share of one core",
            f"{reading.cpu_ns_per_call * reading.calls / reading.seconds / 1e7:.0f} %",
        )
        (directory / "reading.vmat").unlink(missing_ok=True)
    return {"lost": losses}


def show_overhead(program: Path, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the traced process pays, beside strace and bpftrace."""
    head(f"Cost to the traced process (least of {options.rounds} interleaved rounds, ns an operation)")
    got = overhead.measure(program, directory, options.rounds)
    for tracer, row in got.least.items():
        line(tracer, "  ".join(f"{what} {ns:,.0f}" for what, ns in row.items()))
    for what in overhead.WHATS:
        own, added = got.least["untraced"][what], got.added("vmatrace", what)
        bar = "bar {}, aim {}".format(*overhead.BARS[what]) if what in overhead.BARS else ""
        line(f"{what}: vmatrace adds {added:,.0f} ns, times its own time", f"{added / own:.2f}", bar)
        for other in ("strace", "bpftrace"):
            if other in got.least:
                line(
                    f"{what}: vmatrace adds, share of what {other} adds",
                    f"{added / got.added(other, what):.3f}",
                    "<= 0.2",
                )
    show_programs(program, directory, options)
    return {"least": got.least}


def show_programs(program: Path, directory: Path, options: argparse.Namespace) -> None:
    """The kernel's own figures (bpf_stats): which program, which layer."""
    for what in ("mprotect", "pair"):
        head(f"BPF programs by the kernel's count, {what} (bpf_stats: counting itself costs some ns a run)")
        layers: dict[str, float] = {}
        for name, run, operation in overhead.program_costs(program, directory, what, options.storm // 5):
            line(f"{name}", f"{run:,.0f} ns a run", f"{operation:,.0f} ns an operation")
            layer = overhead.layer_of(name)
            layers[layer] = layers.get(layer, 0.0) + operation
        for layer, ns in layers.items():
            line(f"layer: {layer}", f"{ns:,.0f} ns an operation")


def show_bystanders(program: Path, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What processes pay that are not traced."""
    head(f"Unrelated processes (least of {options.rounds} interleaved rounds, ns an operation)")
    got = reader.bystanders(program, directory, options.rounds)
    for mode, row in got.items():
        for what, ns in row.items():
            lost = ns - got["nobody"][what]
            line(f"{what} while {mode} records", f"{ns:,.0f}", "" if mode == "nobody" else f"+{lost:,.0f} ns")
    return got


SECTIONS: dict[str, Callable[[Path, Path, argparse.Namespace], dict[str, Any]]] = {
    "start": show_start,
    "reader": show_reader,
    "overhead": show_overhead,
    "bystanders": show_bystanders,
    "losses": show_losses,
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the options, run the sections asked for, print and keep the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help="of: " + " ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--storm", type=int, default=1_000_000, help="operations of the reader's storm")
    parser.add_argument("--seconds", type=int, default=30, help="length of each loss run")
    parser.add_argument("--loss-runs", type=int, default=3)
    parser.add_argument("--tries", type=int, default=5, help="starts to take the least of")
    parser.add_argument("--directory", type=Path, help="where traces go; removed at the end if not given")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print("error: bench: needs root\nhint: run it with sudo", file=sys.stderr)
        return 3
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no such section: {' '.join(sorted(unknown))}")
    program = build(["storm"])["storm"]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vmatrace-bench-", dir=options.directory) as name:
        machine = f"{os.uname().release} {os.uname().machine}, {os.cpu_count()} CPUs"
        print(f"vmatrace bench: {machine}, load {os.getloadavg()[0]:.2f}")
        for section in options.sections:
            figures[section] = SECTIONS[section](program, Path(name), options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
