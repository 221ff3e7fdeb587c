"""Mutation of the rules: a sample of small changes to vmatrace/rules, each of which a fast test must notice.

``python -m tests.conformance.mutate [SAMPLE]`` works on a copy of the checkout with cosmic-ray and prints the share
that was killed and every survivor.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# No rule is in these: the registry, plain values, and the drawing for people.
EXCLUDED = ("__init__", "constants", "context", "drawing", "model", "registry")
TESTS = ("tests/unit/test_scenarios.py", "tests/unit/test_rules_eras.py", "tests/replay/test_verdicts.py")
# Changes that mean another rule; arithmetic on flags other than these only makes nonsense that any test sees.
OPERATORS = (
    "core/NumberReplacer", "core/AddNot", "core/ReplaceAndWithOr", "core/ReplaceOrWithAnd",
    "core/ReplaceUnaryOperator_Delete_Not", "core/ReplaceBinaryOperator_BitAnd_BitOr",
    "core/ReplaceBinaryOperator_Add_Sub", "core/ReplaceBinaryOperator_Sub_Add", "core/ReplaceTrueWithFalse",
    "core/ReplaceFalseWithTrue", "core/ReplaceBreakWithContinue", "core/ReplaceContinueWithBreak",
    "core/ReplaceComparisonOperator_%",
)  # fmt: skip


def configuration() -> str:
    """The configuration of cosmic-ray."""
    excluded = ", ".join(f'"vmatrace/rules/{name}.py"' for name in EXCLUDED)
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider --timeout 60 {' '.join(TESTS)}"
    return (
        f'[cosmic-ray]\nmodule-path = "vmatrace/rules"\ntimeout = 90.0\nexcluded-modules = [{excluded}]\n'
        f'test-command = "{command}"\n[cosmic-ray.distributor]\nname = "local"\n'
    )


def keep_sample(session: Path, size: int, seed: int) -> int:
    """Leave ``size`` mutations of the interesting kinds in the session; says how many there were."""
    with sqlite3.connect(session) as db:
        wanted = " or ".join("operator_name like ?" for _ in OPERATORS)
        rows = db.execute(f"select job_id from mutation_specs where {wanted}", OPERATORS).fetchall()
        jobs = sorted(job for (job,) in rows)
        # Job numbers are random; places are not: the same seed takes the same sample of the same code.
        order = "module_path, operator_name, occurrence"
        placed = [job for (job,) in db.execute(f"select job_id from mutation_specs order by {order}")]
        jobs = [job for job in placed if job in set(jobs)]
        kept = set(random.Random(seed).sample(jobs, min(size, len(jobs))))
        gone = [(job,) for job in placed if job not in kept]
        db.executemany("delete from mutation_specs where job_id = ?", gone)
        db.executemany("delete from work_items where job_id = ?", gone)
    return len(jobs)


def results(session: Path) -> tuple[int, list[str]]:
    """How many mutants were tried, and where the survivors are."""
    with sqlite3.connect(session) as db:
        tried = db.execute("select count(*) from work_results").fetchone()[0]
        rows = db.execute(
            "select module_path, start_pos_row, operator_name, definition_name, occurrence from mutation_specs "
            "join work_results using (job_id) where test_outcome like '%SURVIVED%' order by 1, 2"
        ).fetchall()
    return tried, [f"{path}:{line} {definition}: {name} #{at}" for path, line, name, definition, at in rows]


def main(arguments: list[str] | None = None) -> int:
    """The command line: exit 1 below 95 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sample", nargs="?", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cosmic-ray", default="cosmic-ray", help="the program")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vmatrace-mutate-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "dist", "__pycache__"))
        (copy / "cr.toml").write_text(configuration(), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        for words in (["init", "cr.toml", "session"], ["exec", "cr.toml", "session"]):
            if words[0] == "exec":
                total = keep_sample(copy / "session", options.sample, options.seed)
            subprocess.run([options.cosmic_ray, *words], cwd=copy, env=environment, check=True)
        tried, survivors = results(copy / "session")
    print("\n".join(survivors))
    killed = tried - len(survivors)
    print(f"{killed} of {tried} killed ({killed / max(tried, 1):.1%}), a sample of {total} mutations")
    return 0 if killed >= 0.95 * tried else 1


if __name__ == "__main__":
    sys.exit(main())
