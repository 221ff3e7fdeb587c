"""Turns the records of a trace into ordered, validated operations with their effects and gaps."""
