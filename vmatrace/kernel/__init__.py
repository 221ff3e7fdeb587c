"""The single place of kernel differences: features with their commits, rule sets, detectors, profiles."""

from vmatrace.kernel.detect import Finding, detect, detect_config
from vmatrace.kernel.features import FEATURES, Commit, Feature
from vmatrace.kernel.profile import KernelProfile, read_profile
from vmatrace.kernel.rulesets import NAMED, RuleSet, nearest_release, rule_set

__all__ = [
    "FEATURES",
    "NAMED",
    "Commit",
    "Feature",
    "Finding",
    "KernelProfile",
    "RuleSet",
    "detect",
    "detect_config",
    "nearest_release",
    "read_profile",
    "rule_set",
]
