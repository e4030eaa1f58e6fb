"""Every error a caller may meet, and the exit code the command line gives it.

HbxtError                 1
|-- UsageError            2   an argument is missing, unknown or out of range
|-- RecipeError           2   a YAML file (recipe, prompt set, suite) is not valid
|-- PlanError             2   a recipe does not fit the model
|-- SourceError           2   a model folder is missing, damaged or of another kind
|-- ArtifactError         2   an artifact is damaged, tampered with or too new
|-- StoreError            1   the result store cannot be read or written
|-- DiskFull              1   no space or quota is left, or a file may not grow
|-- RankLost              1   another process of the same run is gone
|-- CalibrationError      1   calibration saw nothing, or non-finite numbers
|-- ExportError           1   a graph could not be made, or differs from its model
|-- HealthError           1   generated clips are black, constant or non-finite
|-- RuntimeUnavailable    1   the execution provider asked for is not there
|-- CheckFailed           3   a target's runtime will refuse or misread a graph
`-- QualityGateFailed     3   a promise of the recipe is broken
    `-- QualityUndecided  4   too few clips to decide it

A message says what (numbers), where (all offenders) and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CheckFailed",
    "DiskFull",
    "ExportError",
    "HbxtError",
    "HealthError",
    "PlanError",
    "QualityGateFailed",
    "QualityUndecided",
    "RankLost",
    "RecipeError",
    "RuntimeUnavailable",
    "SourceError",
    "StoreError",
    "UsageError",
    "listing",
]

_MOST_LISTED = 20


class HbxtError(Exception):
    exit_code = 1


class UsageError(HbxtError):
    exit_code = 2


class RecipeError(HbxtError):
    exit_code = 2


class PlanError(HbxtError):
    exit_code = 2


class SourceError(HbxtError):
    exit_code = 2


class ArtifactError(HbxtError):
    exit_code = 2


class StoreError(HbxtError):
    pass


class DiskFull(HbxtError):
    pass


class RankLost(HbxtError):
    pass


class CalibrationError(HbxtError):
    pass


class ExportError(HbxtError):
    pass


class HealthError(HbxtError):
    pass


class RuntimeUnavailable(HbxtError):
    pass


class CheckFailed(HbxtError):
    exit_code = 3


class QualityGateFailed(HbxtError):
    exit_code = 3


class QualityUndecided(QualityGateFailed):
    exit_code = 4


def listing(offenders: Sequence[str]) -> str:
    """The offenders, one a line and indented; at most 20, then how many more."""
    lines = [f"  {offender}" for offender in offenders[:_MOST_LISTED]]
    if len(offenders) > _MOST_LISTED:
        lines.append(f"  ... and {len(offenders) - _MOST_LISTED} more")
    return "\n".join(lines)
