"""What a provider is told on the GPU that is here: the manifest's settings for that target.

MIGraphX reads its variables when it compiles a graph. They are set for the process before the first
graph is opened, unless the user has set them otherwise, which is said and respected.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hbxt_compress.manifest import TargetRecord
from hbxt_compress.runtime.gpus import Gpu

__all__ = ["ProviderSettings", "cache_folder", "settings_for"]

_log = logging.getLogger(__name__)
_CACHE = "{cache}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderSettings:
    """Of one provider. environment: variables. options: the provider's own."""

    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)

    def set_variables(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Sets the variables that are not set; of those that differ a warning is given."""
        for name, value in self.environment.items():
            found = environment.setdefault(name, value)
            if found != value:
                _log.warning("%s is %s here; this artifact was made for %s", name, found, value)


def settings_for(
    targets: Mapping[str, TargetRecord], gpus: Sequence[Gpu], cache: Path | None = None
) -> dict[str, ProviderSettings]:
    """By provider, what the first GPU needs; {} without a GPU, or for one that nobody checked.

    cache: where compiled graphs are kept; None: in the user's cache folder.
    """
    if not gpus or not targets:
        return {}
    target = gpus[0].target
    if target not in targets:
        _log.warning(
            "this artifact was checked for %s, not for the GPU here, %s: try `hbxt check --target "
            "%s` on it, and name it in the recipe's export: targets",
            ", ".join(targets),
            target,
            target,
        )
        return {}
    folder = cache or cache_folder() / "compiled"
    return {
        provider: ProviderSettings(
            environment=told["environment"],
            options={k: v.replace(_CACHE, str(folder)) for k, v in told["options"].items()},
        )
        for provider, told in targets[target].settings.items()
    }


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this user's caches of hbxt are; nothing is lost if it is deleted."""
    base = environment.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "hbxt"
