"""Names of the files of a run folder, and what is read of them without torch."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from clframe.errors import DataError, UsageError
from clframe.options import explain
from clframe.renamed import update_config
from clframe.settings import Config
from clframe.strict_yaml import parse_yaml
from clframe.system.reading import read_text
from clframe.system.texts import cut

LOCK = ".lock"
BASE = "base.json"  # description of the run that this one extends
ENVIRONMENT = "environment.json"
SPLIT = "split.json"
CONFIG = "config.yaml"
CONFIG_LIMIT = 1_000_000  # bytes
MODEL = "model.safetensors"
CHECKPOINTS = "checkpoints"
TREE = "tree.json"  # of a checkpoint
CHECKPOINT_NAME = re.compile(r"[0-9]{1,18}")


def read_config(path: Path) -> Config:
    """Return the resolved configuration in the run folder `path`. Raises `DataError` if it cannot be read."""
    file = path / CONFIG
    try:
        return Config.model_validate(update_config(parse_yaml(read_text(file, CONFIG_LIMIT), str(file))))
    except (DataError, UsageError, ValidationError) as error:
        problems = explain(error, "") if isinstance(error, ValidationError) else [str(error)]
        raise DataError(f"{file} cannot be read: {cut(' '.join(problems), 2000)}") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if CHECKPOINT_NAME.fullmatch(p.name)), key=lambda p: int(p.name))
