"""Mutation of the rules: each small change to vmatrace/rules must be noticed by something committed.

``python -m tests.conformance.mutate [SAMPLE]`` lets cosmic-ray make the changes, looks at each in a process of its
own (`tests.conformance.notice`), and prints the share that was noticed, by module, and every survivor. Survivors
that change nothing a kernel could show are listed with the reason in ``equivalents.txt``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

from tests.conformance.mutants import Mutant, Place, make, modules, places
from tests.conformance.notice import fork_and_look, gather

BAR = 0.95
EQUIVALENTS = Path(__file__).with_name("equivalents.txt")


def explained() -> dict[tuple[str, ...], str]:
    """The listed survivors and why each cannot be noticed.

    In the file a line ``# reason``, then the changes: module, function, line before and after, between ``~~``.
    """
    found: dict[tuple[str, ...], str] = {}
    reason = ""
    for line in EQUIVALENTS.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            reason = line.removeprefix("#").strip()
        elif line:
            found[tuple(line.split(" ~~ "))] = reason
    return found


def sampled(size: int | None, seed: int, wanted: list[str]) -> tuple[list[Place], int]:
    """The places to try, the same for the same seed and text, and how many there are."""
    every = [place for module in wanted for place in places(module)]
    chosen = every if size is None else random.Random(seed).sample(every, min(size, len(every)))
    return sorted(chosen, key=lambda place: (place.module, place.operator, place.occurrence)), len(every)


def table(tried: Counter[str], noticed: Counter[str], listed: Counter[str]) -> str:
    """A line for each module."""
    lines = [f"{'module':<16}{'tried':>7}{'noticed':>9}{'explained':>11}{'share':>9}"]
    for module in [*sorted(tried), "all"]:
        sums = [sum(each.values()) if module == "all" else each[module] for each in (tried, noticed, listed)]
        share = sums[1] / max(sums[0] - sums[2], 1)
        lines.append(f"{module:<16}{sums[0]:>7}{sums[1]:>9}{sums[2]:>11}{share:>9.1%}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line: exit 1 below the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sample", nargs="?", type=int, help="how many (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--module", action="append", help="only these modules")
    parser.add_argument("--save", type=Path, help="write each mutant and what noticed it here, as JSON lines")
    parser.add_argument("--quick", action="store_true", help="ask the scenarios only")
    parser.add_argument("--again", type=Path, help="try only what the run saved here does not say was noticed")
    options = parser.parse_args(arguments)
    chosen, total = sampled(options.sample, options.seed, options.module or modules())
    evidence, known = gather(), explained()
    seen = noticed_before(options.again) if options.again else {}
    gc.collect()
    gc.freeze()
    tried, noticed, listed = Counter[str](), Counter[str](), Counter[str]()
    began = time.monotonic()
    with open(options.save or os.devnull, "w", encoding="utf-8") as log:
        for mutant in filter(None, map(make, chosen)):
            what = seen.get(mutant.key) or fork_and_look(mutant, evidence, options.quick)
            log.write(json.dumps({"key": mutant.key, "line": mutant.line, "noticed": what}) + "\n")
            log.flush()
            tried[mutant.module] += 1
            noticed[mutant.module] += bool(what)
            if not what:
                listed[mutant.module] += mutant.key in known
                _tell(mutant, known.get(mutant.key))
    print(table(tried, noticed, listed))
    print(f"{sum(tried.values())} of {total} mutants in {time.monotonic() - began:.0f} s, seed {options.seed}")
    return 0 if sum(noticed.values()) >= BAR * (sum(tried.values()) - sum(listed.values())) else 1


def noticed_before(path: Path) -> dict[tuple[str, ...], str]:
    """What noticed each mutant of a saved run: more evidence takes none of it back."""
    saved = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {tuple(each["key"]): each["noticed"] for each in saved if each["noticed"]}


def _tell(mutant: Mutant, reason: str | None) -> None:
    print(f"{mutant}\n    {f'explained: {reason}' if reason else 'SURVIVED'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
