"""The kernel's rules about VMAs: one rule is one function with a sentence for a name, and knows its commit.

``vmatrace.rules.registry`` lists them; ``vmatrace.simulator`` runs them.
"""
