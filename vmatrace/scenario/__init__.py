"""Scenarios: one JSON object a line with a layout, operations and what is expected; read, checked and run.

The format is fixed in the docs page on scenarios; nothing here knows a rule.
"""

from vmatrace.scenario.parse import Scenario, Step, parse_scenario, read_scenarios
from vmatrace.scenario.run import Outcome, outcome_of, run_scenario, vma_as_json

__all__ = [
    "Outcome", "Scenario", "Step", "outcome_of", "parse_scenario", "read_scenarios", "run_scenario",
    "vma_as_json",
]  # fmt: skip
