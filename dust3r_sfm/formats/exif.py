"""What a photo's EXIF says of its camera: where it stood, which one it was, how long its focal is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from jaxtyping import Float64
from PIL import ExifTags, Image

from dust3r_sfm.views import DECODE_ERRORS

GPS, BASE = ExifTags.GPS, ExifTags.Base


@dataclass(frozen=True)
class GpsFix:
    """WGS84."""

    latitude_deg: float
    longitude_deg: float
    altitude_m: float | None = None
    error_m: float | None = None
    """Horizontal, as the receiver estimates it."""


@dataclass(frozen=True)
class PhotoExif:
    gps: GpsFix | None = None
    camera: str | None = None
    """Maker, model, serial number and focal length: equal for photos of one camera and zoom."""


def read_exif(path: Path) -> PhotoExif:
    """What is known of a photo; nothing where its metadata are broken or there are none."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            exif = image.getexif()
            details = exif.get_ifd(ExifTags.IFD.Exif)
            gps = _gps(exif.get_ifd(ExifTags.IFD.GPSInfo))
            parts = [exif.get(BASE.Make), exif.get(BASE.Model), details.get(BASE.BodySerialNumber)]
            parts += [details.get(BASE.LensModel), details.get(BASE.FocalLength)]
    except DECODE_ERRORS:
        return PhotoExif()
    camera = " ".join(str(part).strip("\0 ") for part in parts if part) if parts[1] else None
    return PhotoExif(gps, camera)


def exif_focal_px(path: Path, size: tuple[int, int]) -> float | None:
    """The focal length that COLMAP reads out of a photo's EXIF, in pixels of the stored file."""
    try:
        camera = pycolmap.infer_camera_from_image(path)
    except (RuntimeError, ValueError):  # of formats that it does not know
        return None
    is_told = camera.has_prior_focal_length and (camera.width, camera.height) == size
    return float(camera.mean_focal_length()) if is_told else None


def enu_positions(
    fixes: Mapping[str, GpsFix],
) -> tuple[GpsFix, dict[str, Float64[np.ndarray, "3"]]]:
    """The origin, which is the median of the fixes, and metres east, north and up of it; up 0 without altitude."""
    values = np.array([[f.latitude_deg, f.longitude_deg, f.altitude_m or 0.0] for f in fixes.values()])
    known = [f.altitude_m for f in fixes.values() if f.altitude_m is not None]
    usual = float(np.median(known)) if known else 0.0
    values[:, 2] = [usual if f.altitude_m is None else f.altitude_m for f in fixes.values()]
    values[:, 1] = values[0, 1] + (values[:, 1] - values[0, 1] + 180) % 360 - 180  # not around the globe
    origin = np.median(values, axis=0)
    earth = pycolmap.GPSTransform()  # its own east, north and up take no altitude in 3.13
    in_earth = np.asarray(earth.ellipsoid_to_ecef(values)) - np.asarray(earth.ellipsoid_to_ecef(origin[None]))
    enu = in_earth @ _enu_from_earth(*np.deg2rad(origin[:2])).T
    return GpsFix(*map(float, origin)), dict(zip(fixes, enu, strict=True))


def _enu_from_earth(latitude: float, longitude: float) -> Float64[np.ndarray, "3 3"]:
    """East, north and up at a place given in radians, as rows in the frame of the earth's axes."""
    east = [-np.sin(longitude), np.cos(longitude), 0]
    up = [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)]
    return np.array([east, np.cross(up, east), up])


def _gps(tags: Mapping[int, Any]) -> GpsFix | None:
    latitude = _degrees(tags.get(GPS.GPSLatitude), tags.get(GPS.GPSLatitudeRef), "S")
    longitude = _degrees(tags.get(GPS.GPSLongitude), tags.get(GPS.GPSLongitudeRef), "W")
    if latitude is None or longitude is None or abs(latitude) > 90 or abs(longitude) > 180:
        return None
    if latitude == longitude == 0:  # what receivers without a fix write
        return None
    altitude = _number(tags.get(GPS.GPSAltitude))
    if altitude is not None and tags.get(GPS.GPSAltitudeRef) in (1, b"\x01"):
        altitude = -altitude
    error = _number(tags.get(GPS.GPSHPositioningError))
    return GpsFix(latitude, longitude, altitude, error if error else None)


def _degrees(values: Any, direction: Any, negative: str) -> float | None:
    try:
        degrees, minutes, seconds = (float(x) for x in values)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    total = degrees + minutes / 60 + seconds / 3600
    if not math.isfinite(total):
        return None
    return -total if str(direction).strip("\0 ").upper() == negative else total


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) else None
