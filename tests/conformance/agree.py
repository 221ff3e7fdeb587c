"""Live agreement: random operations recorded on this kernel and replayed, until enough of them were judged.

``python -m tests.conformance.agree [N]`` prints the table call x outcome, how often each rule decided, and
the sums; it exits 1 where a single operation diverged, whose trace is kept and shrunk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import count
from pathlib import Path

from tests.conformance.mixes import Mix, schedule
from tests.conformance.tally import Tally, tally
from tests.conformance.unreachable import OUTCOMES as NOT_STEERED
from tests.conformance.unreachable import RULES as UNREACHABLE
from tests.workloads.build import build
from vmatrace.cli.repeat import shrunk
from vmatrace.fingerprint import live_profile
from vmatrace.ingest import Trace
from vmatrace.kernel import RuleSet
from vmatrace.replay import UNDECIDED, run
from vmatrace.replay.reproducer import first_reproducer
from vmatrace.simulator import RULES

VMATRACE = Path(sys.executable).with_name("vmatrace")
# A program that pauses now and then, and a large buffer, lose no record on a busy machine.
PACE, BUFFER = "2000", "64M"
# In a million operations each call x outcome, and each rule that can be reached, is due so often.
OUTCOME_DUE, RULE_DUE, UNDECIDED_DUE = 1_000, 100, 0.001
# Steps of one run: short enough that each mix comes often.
LONGEST = 10_000


def record(path: Path, seed: int, steps: int, mix: Mix) -> None:
    """Record one run of vmafuzz. Raises CalledProcessError where recorder or program failed."""
    program = build(["vmafuzz"])["vmafuzz"]
    user = ["-u", mix.user] if mix.user else []
    words: list[str | Path] = [VMATRACE, "record", "--force", "--buffer", BUFFER, "-o", path, *user, "--", program]
    words += [str(seed), str(steps), "--pace", PACE, *mix.options]
    subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=600)


def runs(first_seed: int, longest: int) -> Iterator[tuple[int, int, Mix]]:
    """Seed, steps (at most ``longest``) and mix of each run, without end."""
    mixes = schedule(100)
    for number in count():
        mix = mixes[number % len(mixes)]
        yield first_seed + number, min(mix.steps, longest), mix


def agree(total: int, first_seed: int, folder: Path, keep: Path | None = None, longest: int = LONGEST) -> Tally:
    """Record and replay until ``total`` operations are judged; diverging traces move to ``keep``.

    Ctrl-C ends it early: what was judged until then is returned.
    """
    everything = Tally()
    waiting: list[tuple[Future[Tally], Path, str]] = []
    # The replay gives way: a recorder that has to wait loses records.
    with ProcessPoolExecutor(max_workers=1, initializer=os.nice, initargs=(5,)) as pool:
        try:
            for seed, steps, mix in runs(first_seed, longest):
                if len(waiting) > 1 or (waiting and everything.operations + steps * len(waiting) >= total):
                    _take(everything, waiting.pop(0), keep)
                if everything.operations >= total:
                    break
                path = folder / f"{mix.name}-{seed}.vmat"
                record(path, seed, steps, mix)
                run = f"{mix.name}: vmafuzz {seed} {steps} {' '.join(mix.options)}"
                waiting.append((pool.submit(tally, path), path, run))
            for item in waiting:
                _take(everything, item, keep)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
    return everything


def _take(everything: Tally, item: tuple[Future[Tally], Path, str], keep: Path | None) -> None:
    future, path, run = item
    found = future.result()
    found.failures = [f"{run}: {failure}" for failure in found.failures]
    everything.add(found)
    undecided, lost = found.verdicts[UNDECIDED], found.lost_records
    done = f"{everything.operations:>9,} judged, {everything.failed} failed (here {undecided} undecided, {lost} lost)"
    print(f"{done}  {run}", file=sys.stderr, flush=True)
    if found.failed and keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        path.replace(keep / path.name)
        _shrink(keep / path.name)
    else:
        path.unlink()


def _shrink(path: Path) -> None:
    """Leave of the first divergence the fewest calls that repeat it, as a scenario and a program, beside the trace.

    Where this kernel does not repeat it: a program of its neighbourhood and one call.
    """
    trace = Trace(path)
    result = run(trace)
    smallest = shrunk(trace, result)
    program = smallest.program if smallest else first_reproducer(trace, result)
    if smallest:
        path.with_suffix(".jsonl").write_text(smallest.scenario + "\n", encoding="utf-8")
    if program:
        path.with_suffix(".c").write_text(program, encoding="utf-8")


def outcome_table(found: Tally) -> list[str]:
    """Lines: a call, its outcomes with their counts."""
    lines = []
    for call in sorted({call for call, _ in found.outcomes}):
        row = sorted(((n, word) for (c, word), n in found.outcomes.items() if c == call), reverse=True)
        lines.append(f"{call:<24} " + "  ".join(f"{word} {n:,}" for n, word in row))
    return lines


def rule_lines(found: Tally, rules: RuleSet) -> list[str]:
    """Lines: how often each rule that stands on this kernel decided."""
    stands = [rule.id for rule in RULES.values() if rule.stands(rules) and not rule.unobservable]
    return [f"{found.rules[id]:>9,}  {id}" for id in sorted(stands, key=lambda id: (-found.rules[id], id))]


def rare(found: Tally, rules: RuleSet) -> tuple[list[str], list[str]]:
    """Call x outcome seen less than OUTCOME_DUE times, and rules that decided less than RULE_DUE times."""
    few = [
        f"{call} {word}: {n}" + (f"  not steered: {NOT_STEERED[call, word]}" if (call, word) in NOT_STEERED else "")
        for (call, word), n in sorted(found.outcomes.items(), key=lambda item: (item[0] in NOT_STEERED, item[0]))
        if n < OUTCOME_DUE
    ]
    stands = [rule.id for rule in RULES.values() if rule.stands(rules) and not rule.unobservable]
    return few, [
        f"{id}: {found.rules[id]}" + (f"  unreachable here: {UNREACHABLE[id]}" if id in UNREACHABLE else "")
        for id in sorted(stands, key=lambda id: (id in UNREACHABLE, id))
        if found.rules[id] < RULE_DUE
    ]


def report(found: Tally, rules: RuleSet) -> list[str]:
    """All lines of the report."""
    few, seldom = rare(found, rules)
    open_ones = [f"  {n:>7,}  {call}: {why}" for (call, why), n in found.undecided.most_common()]
    verdicts = "  ".join(f"{name} {n:,}" for name, n in found.verdicts.most_common())
    return [
        "call x outcome (PASSED, as observed)", *outcome_table(found),
        "", "decided by rule", *rule_lines(found, rules),
        "", f"call x outcome below {OUTCOME_DUE:,}: {len(few)}", *(f"  {line}" for line in few),
        f"rules below {RULE_DUE}: {len(seldom)}", *(f"  {line}" for line in seldom),
        "", f"undecided {found.undecided_share:.3%} (due: below {UNDECIDED_DUE:.1%})", *open_ones,
        "", f"{found.operations:,} operations judged: {verdicts}  lost records {found.lost_records}",
        f"divergences: {found.failed}", *(f"  {line}" for line in found.failures[:20]),
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operations", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "vmatrace-divergences")
    parser.add_argument("-o", "--output", type=Path, help="write the report there too")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vmatrace-agree-") as folder:
        found = agree(options.operations, options.seed, Path(folder), options.keep)
    lines = [*report(found, live_profile().rule_set()), f"{time.monotonic() - began:,.0f} s"]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if found.failed:
        print(f"hint: traces and reproducers are in {options.keep}", file=sys.stderr)
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
