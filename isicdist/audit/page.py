"""The page of an audit: the most suspicious pairs with their pictures, to give each a verdict by keyboard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from isicdist import __version__
from isicdist.audit.findings import REASONS, Finding
from isicdist.audit.held_out import Sample
from isicdist.metrics.dice import DEFAULT_THRESHOLD
from isicdist.metrics.examples import PREDICTION_COLOUR, TRUTH_COLOUR
from shards.data_uri import mask_uri, photo_uri
from shards.exclusions import KEEP, UNSURE, VERDICT_COLUMN, WRONG
from shards.html_page import template_environment
from shards.reader import ShardSet

MAX_PAIRS = 200
"""Pairs on the page at most, and so its size: about 5 MB; audit.csv has all."""
SIDE = 320
"""Longer side of a picture in pixels."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One pair of the page; pictures are data URIs."""

    rank: int
    finding: Finding
    aspect_ratio: float
    """Width over height at which the image looks as it was taken."""
    photo: str
    mask: str
    """Layer of the ground truth."""
    prediction: str
    """Layer of the prediction at 0.5."""

    @classmethod
    def of(cls, rank: int, finding: Finding, sample: Sample) -> Self:
        """Read a pair and encode its pictures."""
        return cls(
            rank=rank,
            finding=finding,
            aspect_ratio=sample.split.resize_plan(sample.index).aspect_ratio,
            photo=photo_uri(sample.split.image(sample.index), SIDE),
            mask=mask_uri(sample.mask(), TRUTH_COLOUR, SIDE),
            prediction=mask_uri(sample.levels > DEFAULT_THRESHOLD * 255, PREDICTION_COLOUR, SIDE),
        )


def render_page(findings: Sequence[Finding], samples: Sequence[Sample], shards: ShardSet) -> str:
    """Render the page of the most suspicious pairs of a set, those of the highest score."""
    by_key = {sample.key: sample for sample in samples}
    shown = [finding for finding in findings[:MAX_PAIRS] if finding.score > 0]
    environment = template_environment("isicdist.audit", "isicdist.report")
    return environment.get_template("audit.html.j2").render(
        version=__version__,
        name=shards.location,
        digest=shards.digest,
        cards=[Card.of(rank, finding, by_key[finding.key]) for rank, finding in enumerate(shown, start=1)],
        total=len(findings),
        reasons=Counter(finding.reason for finding in findings if finding.reason).most_common(),
        words=REASONS,
        verdict_column=VERDICT_COLUMN,
        verdicts={"k": KEEP, "w": WRONG, "u": UNSURE},
    )
