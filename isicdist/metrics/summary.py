"""Contents of summary.json: the scores of one evaluation with their confidence intervals, typed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from isicdist.metrics.bootstrap import MIN_GROUPS, PairedDifference, bootstrap_intervals, paired_difference
from isicdist.metrics.dice import SCORE_NAMES, DiceSummary, Scores, per_image_scores
from isicdist.metrics.thresholds import CurveSummary

SUMMARY_NAME = "summary.json"

Relation = Literal["held out", "chosen on", "trained on", "unknown"]
"""How a model relates to the images that score it: it has not seen them; it and its threshold were chosen on them, so
that its scores are a little higher than on others; it was trained on some; or an older version did not record it."""


@dataclass(frozen=True, kw_only=True)
class ResolutionScores(Scores):
    """Scores at one threshold and one resolution, with confidence intervals."""

    groups: int
    """Number of groups of images that were resampled: n, unless images belong together."""
    interval_95: Mapping[str, tuple[float, float]]
    """(low, high) end of the 95 % bootstrap confidence interval of each score, by name; empty in files of version 0.1
    for parts of the images."""

    @property
    def has_enough_groups(self) -> bool:
        """True where the intervals are not too narrow."""
        return self.groups >= MIN_GROUPS

    @classmethod
    def of(cls, summary: DiceSummary, digest: str, groups: Sequence[str] | None, **more: Any) -> Self:
        """Add the intervals to the scores of `summary`.

        `digest` is the shard set's, `groups` those of `bootstrap_intervals`, `more` the fields of a subclass.
        """
        intervals = bootstrap_intervals(summary.rows, digest, groups)
        number = len(set(groups)) if groups else summary.n
        return cls(**summary.scores(), groups=number, interval_95=intervals, **more)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made. Raises KeyError, TypeError or ValueError for anything else."""
        known: dict[str, Any] = {each.name: value[each.name] for each in dataclasses.fields(cls) if each.name in value}
        known["interval_95"] = {
            name: (float(low), float(high)) for name, (low, high) in value.get("interval_95", {}).items()
        }
        known["groups"] = int(value.get("groups", value["n"]))  # older versions resampled images
        return cls(**known | _scores_in(value))


@dataclass(frozen=True, kw_only=True)
class ThresholdSummary:
    """Scores at one threshold, at both resolutions."""

    threshold: float
    """Threshold of the probability: above it a pixel is lesion."""
    network: ResolutionScores
    """At the size the network sees."""
    original: ResolutionScores | None
    """At each image's own size; None where the split does not carry the original masks."""

    def by_resolution(self) -> dict[str, ResolutionScores]:
        """Return the scores that there are by the name of their resolution: network and original."""
        scores = {"network": self.network, "original": self.original}
        return {name: found for name, found in scores.items() if found}

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts for JSON."""
        return {
            "threshold": self.threshold,
            "network_resolution": dataclasses.asdict(self.network),
            "original_resolution": dataclasses.asdict(self.original) if self.original else None,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned. Raises KeyError, TypeError or ValueError for anything else."""
        original = value["original_resolution"]
        return cls(
            threshold=float(value["threshold"]),
            network=ResolutionScores.from_json(value["network_resolution"]),
            original=ResolutionScores.from_json(original) if original else None,
        )


@dataclass(frozen=True, kw_only=True)
class AreaScores(ResolutionScores):
    """Scores of the images whose lesions are of similar size."""

    least_area: float
    """Share of the image that the smallest lesion covers, 0 to 1."""
    largest_area: float
    """Share of the image that the largest lesion covers, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class SubgroupScores(ResolutionScores):
    """Scores of the images with one value in the subgroup column."""

    value: str
    """"" for the images that the table does not name."""


@dataclass(frozen=True, kw_only=True)
class SubgroupSummary:
    """Scores by the values of one column of a metadata table."""

    column: str
    groups: tuple[SubgroupScores, ...]
    """One group for each value, sorted by it."""


@dataclass(frozen=True, kw_only=True)
class MemberScores(Scores):
    """Scores of one model of an ensemble alone, at 0.5 and the network's resolution."""

    run: str
    """Name of its run."""
    gain: PairedDifference
    """Mean Dice of the ensemble minus that of this model, on the same images."""


@dataclass(frozen=True, kw_only=True)
class EnsembleSummary:
    """What an ensemble gains over its models, at 0.5 and the network's resolution."""

    members: tuple[MemberScores, ...]
    gain: PairedDifference
    """Mean Dice of the ensemble minus the mean of its models', on the same images."""

    @classmethod
    def of(
        cls, ensemble: DiceSummary, members: Mapping[str, DiceSummary], digest: str, groups: Sequence[str] | None
    ) -> Self:
        """Compare an ensemble with its models, by name of the run; the rest is that of `ResolutionScores.of`."""
        dice, _ = per_image_scores(ensemble.rows)
        alone = {run: per_image_scores(summary.rows)[0] for run, summary in members.items()}
        return cls(
            members=tuple(
                MemberScores(run=run, gain=paired_difference(alone[run], dice, digest, groups), **summary.scores())
                for run, summary in members.items()
            ),
            gain=paired_difference(np.mean(list(alone.values()), axis=0), dice, digest, groups),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made. Raises KeyError, TypeError or ValueError for anything else."""
        members = tuple(
            MemberScores(run=str(each["run"]), gain=PairedDifference.from_json(each["gain"]), **_scores_in(each))
            for each in value["members"]
        )
        return cls(members=members, gain=PairedDifference.from_json(value["gain"]))


@dataclass(frozen=True, kw_only=True)
class ExclusionSummary:
    """The scores without the images that a table excludes (`shards.exclusions`)."""

    table: str
    """Name of the table's file."""
    sha256: str
    """Hash of that file."""
    keys: tuple[str, ...]
    """Keys of the images of the split that are excluded."""
    at_default: ThresholdSummary
    """At 0.5."""
    at_tuned: ThresholdSummary
    """At the model's own threshold."""

    def by_threshold(self) -> list[ThresholdSummary]:
        """Return the scores at 0.5 and at the tuned threshold; once where the two are the same."""
        return _distinct(self.at_default, self.at_tuned)

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts for JSON."""
        return {
            "table": self.table,
            "sha256": self.sha256,
            "keys": list(self.keys),
            **self.at_default.to_json(),
            "tuned_threshold": self.at_tuned.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            table=str(value["table"]),
            sha256=str(value["sha256"]),
            keys=tuple(map(str, value["keys"])),
            at_default=ThresholdSummary.from_json(value),
            at_tuned=ThresholdSummary.from_json(value["tuned_threshold"]),
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary:
    """The scores of one model, or of one ensemble, on one split."""

    split: str
    data_digest: str
    """Digest of the shard set."""
    resolution: int | None
    """Side of the images the network sees, in pixels."""
    model_step: int
    """Step of the training run that the model is of; of an ensemble, the highest."""
    tta: str
    """Test-time augmentation that the probabilities are averaged over: off, flips or d4."""
    relation: Relation = "unknown"
    """How the model, or the one of an ensemble that has seen most, relates to the images."""
    precision: str = ""
    """Precision of the network: float32, bf16 or fp16; empty in files of older versions, as the next one."""
    models: tuple[str, ...] = ()
    """sha256 of the weights of the model, or of each one of an ensemble."""
    at_default: ThresholdSummary
    """At 0.5, the threshold that models are compared at."""
    at_tuned: ThresholdSummary
    """At the model's own threshold, tuned on the validation split: that of the masks that a prediction draws."""
    thresholds: CurveSummary
    """Over all thresholds, pixels pooled, at the size the network sees."""
    lesion_area_quartiles: tuple[AreaScores, ...]
    """At the tuned threshold and the finest resolution: a quarter of the images each, from small lesions to large."""
    subgroups: SubgroupSummary | None
    """At the same threshold and resolution; None without a subgroup column."""
    ensemble: EnsembleSummary | None = None
    """None for a single model."""
    without_excluded: ExclusionSummary | None = None
    """None where no image was excluded; all other scores are those of every image."""

    @property
    def n(self) -> int:
        """Number of images."""
        return self.at_default.network.n

    @property
    def images(self) -> str:
        """The number of images and, where images belong together, of groups, in words."""
        groups = self.at_default.network.groups
        return f"{self.n} images" + (f" in {groups} groups, which are resampled" if groups < self.n else "")

    def cautions(self) -> list[str]:
        """List what a reader has to know before comparing these scores with others."""
        cautions: list[str] = []
        if self.relation == "trained on":
            cautions.append("the model was trained on images of these names: these are no scores of unseen ones")
        if self.relation == "chosen on":
            cautions.append(
                "the model and its threshold were chosen on these images: its scores are a little higher than on others"
            )
        if self.relation == "unknown":
            cautions.append("it is not recorded whether the model was trained on some of these images")
        if not self.at_default.network.has_enough_groups:
            cautions.append(f"fewer than {MIN_GROUPS} images or groups, so the intervals are too narrow")
        return cautions

    def by_threshold(self) -> list[ThresholdSummary]:
        """Return the scores at 0.5 and at the tuned threshold; once where the two are the same."""
        return _distinct(self.at_default, self.at_tuned)

    def to_json(self) -> dict[str, Any]:
        """Return the content of summary.json. The scores at the top are those at 0.5 and the network's resolution."""
        return {
            "split": self.split,
            "data_digest": self.data_digest,
            "resolution": self.resolution,
            "model_step": self.model_step,
            "tta": self.tta,
            "relation": self.relation,
            "precision": self.precision,
            "models": list(self.models),
            **{name: getattr(self.at_default.network, name) for name in ("n", *SCORE_NAMES)},
            **self.at_default.to_json(),
            "tuned_threshold": self.at_tuned.to_json(),
            "thresholds": dataclasses.asdict(self.thresholds),
            "lesion_area_quartiles": [dataclasses.asdict(part) for part in self.lesion_area_quartiles],
            "subgroups": dataclasses.asdict(self.subgroups) if self.subgroups else None,
            "ensemble": dataclasses.asdict(self.ensemble) if self.ensemble else None,
            "without_excluded": self.without_excluded.to_json() if self.without_excluded else None,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned. Raises KeyError, TypeError or ValueError for anything else.

        In older files the tuned threshold is called own_threshold, and there are no ensembles and exclusions.
        """
        ensemble, excluded = value.get("ensemble"), value.get("without_excluded")
        return cls(
            split=str(value["split"]),
            data_digest=str(value["data_digest"]),
            resolution=value["resolution"],
            model_step=int(value["model_step"]),
            tta=str(value["tta"]),
            relation=value.get("relation", "unknown"),
            precision=str(value.get("precision", "")),
            models=tuple(map(str, value.get("models", ()))),
            at_default=ThresholdSummary.from_json(value),
            at_tuned=ThresholdSummary.from_json(value.get("tuned_threshold") or value["own_threshold"]),
            thresholds=CurveSummary(
                **{field.name: float(value["thresholds"][field.name]) for field in dataclasses.fields(CurveSummary)}
            ),
            lesion_area_quartiles=tuple(map(AreaScores.from_json, value["lesion_area_quartiles"])),
            subgroups=_subgroups_in(value["subgroups"]),
            ensemble=EnsembleSummary.from_json(ensemble) if ensemble else None,
            without_excluded=ExclusionSummary.from_json(excluded) if excluded else None,
        )


def _distinct(at_default: ThresholdSummary, at_tuned: ThresholdSummary) -> list[ThresholdSummary]:
    return [at_default] if at_tuned.threshold == at_default.threshold else [at_default, at_tuned]


def _scores_in(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"n": int(value["n"]), **{name: float(value[name]) for name in SCORE_NAMES}}


def _subgroups_in(value: Mapping[str, Any] | None) -> SubgroupSummary | None:
    if value is None:
        return None
    return SubgroupSummary(column=value["column"], groups=tuple(map(SubgroupScores.from_json, value["groups"])))
