"""Dataset checks: warnings about views that are valid but probably not what was intended, each with a remedy.

    Capture, or Splits --evidence--> Evidence --agreement--> Agreement --images, geometry--> Finding ...

`python -m jaxngp.inspect` prints them, and training begins with them.
"""

from __future__ import annotations

from jaxngp.cameras import PosedImages
from jaxngp.data.checks.agreement import Agreement, examine
from jaxngp.data.checks.evidence import Evidence, of_capture, of_splits
from jaxngp.data.checks.finding import Finding
from jaxngp.data.checks.geometry import geometry_checks
from jaxngp.data.checks.images import exposure_gains, image_checks
from jaxngp.data.splits import Split

__all__ = [
    "Agreement",
    "Evidence",
    "Finding",
    "check",
    "dataset_warnings",
    "examine",
    "exposure_gains",
    "of_capture",
    "of_splits",
]


def check(evidence: Evidence, agreement: Agreement | None) -> list[Finding]:
    """What is found, the cameras first; agreement: as `examine` gives it."""
    found = [*geometry_checks(evidence, agreement), *image_checks(evidence, agreement)]
    return [finding for finding in found if finding is not None]


def dataset_warnings(training: Split, evaluation: Split | None, *, cameras: bool = True) -> list[str]:
    """Warnings about the views to train on, and to evaluate on if there are any, with the notes of their readers.

    cameras: whether to look if the cameras make the images agree, which takes some seconds.
    """
    notes = [*training.notes, *(evaluation.notes if evaluation is not None else ())]
    if not isinstance(training.images, PosedImages):
        return list(dict.fromkeys(notes))
    posed = evaluation if evaluation is not None and isinstance(evaluation.images, PosedImages) else None
    evidence = of_splits(training, posed)
    found = [finding.sentence for finding in check(evidence, examine(evidence) if cameras else None)]
    return [*dict.fromkeys(notes), *found]
