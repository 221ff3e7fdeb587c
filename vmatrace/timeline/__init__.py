"""What address spaces looked like at any moment, how they came to be, and what happened to them, event by
event."""

from vmatrace.timeline.adoption import Adoption, adoption
from vmatrace.timeline.document import difference_document, snapshot_document, vma_document
from vmatrace.timeline.events import EVENT_KINDS, event_columns, iter_events
from vmatrace.timeline.moments import parse_moment
from vmatrace.timeline.space import Difference, Event, Lifetime, Snapshot, Timeline, difference, timelines
from vmatrace.timeline.stacks import Frame, NamedStacks

__all__ = [
    "EVENT_KINDS", "Adoption", "Difference", "Event", "Frame", "Lifetime", "NamedStacks", "Snapshot", "Timeline",
    "adoption", "difference", "difference_document", "event_columns", "iter_events", "parse_moment",
    "snapshot_document", "timelines", "vma_document",
]  # fmt: skip
