"""The stages of the curriculum as files: settings that replace a config's defaults, read strictly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from dust3r_sfm.errors import InputError

FOLDER = Path(__file__).parent / "configs"
ABOUT = "about"
"""What a stage is for, in words; no setting."""

Config = TypeVar("Config")


def stage_names() -> list[str]:
    """The stages that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def with_stage(default: Config, stage: str) -> Config:
    """A config with the settings of a stage, by its name or its JSON file. InputError for what it does not know."""
    path = FOLDER / f"{stage}.json" if stage in stage_names() else Path(stage)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        known = ", ".join(stage_names())
        raise InputError(f"there is no stage {stage}: expected {known}, or a JSON file of settings") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold an object of settings, got {type(values).__name__}")
    values.pop(ABOUT, None)
    return _replaced(default, values, str(path))


def _replaced(default: Config, values: dict[str, Any], where: str) -> Config:
    names = [field.name for field in dataclasses.fields(default)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise InputError(f"{where} has the unknown setting {unknown[0]}: there are {', '.join(names)}")
    new = {name: _converted(getattr(default, name), value, f"{where}: {name}") for name, value in values.items()}
    try:
        return dataclasses.replace(default, **new)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _converted(default: Any, value: Any, where: str) -> Any:
    """The value as what the default is, where it is of its kind."""
    if dataclasses.is_dataclass(default) and isinstance(value, dict):
        return _replaced(default, value, where)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(_converted(default[0], item, where) if default else item for item in value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise InputError(f"{where} must be of the kind of {default!r}, got {value!r}")
    return value
