"""What a job may ask for, as a schema: where its photos come from, options of the run, where the result goes."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from dust3r_sfm import reconstruct
from dust3r_sfm.errors import InputError
from dust3r_sfm.export_scene import ExportConfig
from dust3r_sfm.extract_frames import FrameConfig
from dust3r_sfm.serving.transfer import without_query

RUN_OPTIONS = ("pairs", "window", "num_matched", "refine", "on_bad_image", "text")
"""Those of reconstruct itself; what is a path or a model is not for strangers to name."""
BOUNDS = {
    "window": Field(ge=1, le=50),
    "num_matched": Field(ge=1, le=100),
    "downscale": Field(max_length=4),
    "formats": Field(min_length=1, max_length=20),
    "fps": Field(gt=0, le=60),
    "max_frames": Field(ge=2),
}
MAX_SHOWN = 100
"""Characters of a wrong value that are said again."""
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
Url = Annotated[str, Field(min_length=9, max_length=8192, pattern=r"^https?://")]
Place = Annotated[str, Field(min_length=1, max_length=1024)]


def _options() -> type[BaseModel]:
    """The options of reconstruct that a job may set, with their own types and defaults."""
    hints = typing.get_type_hints(reconstruct.main)
    parameters = inspect.signature(reconstruct.main).parameters
    found = {name: (hints[name], parameters[name].default) for name in RUN_OPTIONS}
    for config in (ExportConfig, FrameConfig):
        hints = typing.get_type_hints(config)
        found |= {field.name: (hints[field.name], field.default) for field in dataclasses.fields(config)}
    found = {name: (_from_json(name, kind), _listed(default)) for name, (kind, default) in found.items()}
    return create_model("Options", __config__=STRICT, **found)


def _from_json(name: str, kind: Any) -> Any:
    """The type as JSON has it: lists for tuples, one choice for several; with the bounds of its values."""
    choices = [typing.get_args(part) for part in typing.get_args(kind) if typing.get_origin(part) is typing.Literal]
    if choices and typing.get_origin(kind) is not tuple:
        kind = typing.Literal[tuple(itertools.chain(*choices))]
    if typing.get_origin(kind) is tuple:
        kind = list[typing.get_args(kind)[0]]
    return Annotated[kind, BOUNDS[name]] if name in BOUNDS else kind


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


Options = _options()


class Request(BaseModel):
    """One job: exactly one source, and a place for the result or two."""

    model_config = STRICT

    images: Annotated[list[Url], Field(min_length=2)] | None = None
    """Addresses of photos."""
    archive: Url | None = None
    """Address of a zip or tar file of photos."""
    video: Url | None = None
    """Address of a video."""
    volume_path: Place | None = None
    """A folder of photos, an archive or a video below the volume."""
    demo: Annotated[int, Field(ge=2, le=20)] | None = None
    """So many rendered photos, to see that a worker works; needs no place for the result."""
    options: Options = Options()
    output_url: Url | None = None
    """A presigned address that takes a zip file of the result by PUT."""
    output_path: Place | None = None
    """A new folder below the volume for the result."""

    @model_validator(mode="after")
    def _one_source_and_a_target(self) -> Request:
        sources = [self.images, self.archive, self.video, self.volume_path, self.demo]
        if sum(source is not None for source in sources) != 1:
            raise ValueError("expected exactly one of images, archive, video, volume_path and demo")
        if self.output_url is None and self.output_path is None and self.demo is None:
            raise ValueError("expected output_url or output_path: the result is not sent back inline")
        return self


def parse_request(content: Any) -> Request:
    """The request that a job's input is; InputError says all that is wrong with it."""
    try:
        return Request.model_validate(content)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'])) or 'input'}: {_sentence(e)}" for e in error.errors(include_url=False)]
        raise InputError(f"the input is not as expected: {'; '.join(wrong)}") from None


def _sentence(error: Mapping[str, Any]) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return "there is no such field"
    given = error.get("input")
    return message if isinstance(given, dict | list) else f"{message}, got {without_query(str(given))[:MAX_SHOWN]!r}"


def arguments_of(request: Request, source: Path, output: Path, model: str, max_images: int) -> list[str]:
    """The command line of `reconstruct` for a job whose photos or video are at `source`."""
    options = request.options.model_dump()
    options["max_frames"] = min(options["max_frames"], max_images)
    arguments = ["--video" if source.is_file() else "--image_dir", str(source), "--output", str(output)]
    arguments += ["--model", model] if model else []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments += [f"--{name}" if value else f"--no_{name}"]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            arguments += [f"--{name}", *map(str, value)] if value else []
        else:
            arguments += [f"--{name}", str(value)]
    return arguments
