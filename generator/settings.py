"""Best sampling settings of a model for each k: sampling.json beside its weights."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config import InputError
from common.files import read_json, write_text
from generator.config import SamplingConfig

logger = logging.getLogger(__name__)
SETTINGS_FILE = "sampling.json"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Default sampling settings of a model.

    by_num_tokens: for some k the settings that were found best there; empty: the plain ones everywhere.
    fingerprint: of the model that they were found for; those of another are not used.
    measured: how they were found, for people to read; JSON values.
    """

    by_num_tokens: dict[int, SamplingConfig]
    fingerprint: str
    measured: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str) -> "ModelSettings":
        """Read a generator's folder; plain settings without the file, or with one of another `fingerprint`.

        Raises:
            InputError: a file that is damaged, or holds settings that are not allowed.
        """
        path, plain = Path(folder) / SETTINGS_FILE, cls(by_num_tokens={}, fingerprint=fingerprint, measured={})
        if not path.is_file():
            return plain
        content = read_json(path)
        try:
            found = {int(k): SamplingConfig.from_file(entry, path) for k, entry in content["by_num_tokens"].items()}
            settings = cls(by_num_tokens=found, fingerprint=content["model"], measured=dict(content["measured"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} holds no settings ({error}); remove it, or measure again") from error
        if settings.fingerprint != fingerprint:
            logger.warning("%s was measured for other weights and is not used; measure again", path)
            return plain
        return settings

    def save(self, folder: str | Path) -> None:
        """Write the file, whole."""
        content = {
            "by_num_tokens": {str(k): asdict(self.by_num_tokens[k]) for k in sorted(self.by_num_tokens)},
            "model": self.fingerprint,
            "measured": self.measured,
        }
        write_text(Path(folder) / SETTINGS_FILE, json.dumps(content, indent=1))

    def of(self, num_tokens: int) -> SamplingConfig:
        """For a drawing that ends at k: the settings of the least k from there up that has some; else of the last."""
        there = sorted(self.by_num_tokens)
        if not there:
            return SamplingConfig()
        return self.by_num_tokens[next((k for k in there if k >= num_tokens), there[-1])]
