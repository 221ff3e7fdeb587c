"""The single place of kernel differences: features with their commits, rule sets, detectors, probe plans."""

from vmatrace.kernel.features import FEATURES, Commit, Feature
from vmatrace.kernel.rulesets import NAMED, RuleSet, nearest_release, rule_set

__all__ = ["FEATURES", "NAMED", "Commit", "Feature", "RuleSet", "nearest_release", "rule_set"]
