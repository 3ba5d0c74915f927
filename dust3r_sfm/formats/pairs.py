"""hloc's pair files: a line `name0 name1` for each pair.

Names with spaces are written with a tab between the two. They are read back here without
doubt; hloc itself, which splits at any white space, cannot use them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.pairs import Pair


def read_pairs(path: Path | str, names: Collection[str]) -> list[Pair]:
    """The directed pairs of a file in its order, once each; pairs of an image with itself are left out.

    Names must be among `names`; a line with further spaces is split where both parts are.
    """
    path, known = Path(path), frozenset(names)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"there is no pairs file {path}") from None
    except OSError as error:
        raise InputError(f"the pairs file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InputError(f"{path} is no pairs file: expected lines `name0 name1` in UTF-8") from None
    pairs = [_parse_line(line, f"{path}, line {i}", known) for i, line in enumerate(lines, 1) if line.strip()]
    pairs = [pair for pair in dict.fromkeys(pairs) if pair.name0 != pair.name1]
    if not pairs:
        raise InputError(f"{path} holds no pairs of two images: expected lines `name0 name1`")
    return pairs


def write_pairs(path: Path | str, pairs: Iterable[Pair]) -> None:
    """Writes the pairs as hloc does, without a newline at the end; the file appears whole or not at all."""
    write_bytes(Path(path), "\n".join(_format_line(pair) for pair in pairs).encode())


def _parse_line(line: str, place: str, known: frozenset[str]) -> Pair:
    parts = line.split()
    if len(parts) == 2 and known.issuperset(parts):
        return Pair(*parts)
    if line.count("\t") == 1 and known.issuperset(line.split("\t")):
        return Pair(*line.split("\t"))
    splits = {(line[:i].strip(), line[i + 1 :].strip()) for i, character in enumerate(line) if character.isspace()}
    found = [split for split in splits if known.issuperset(split)]
    if len(found) == 1:
        return Pair(*found[0])
    if found:
        raise InputError(f"{place}: {line.strip()!r} can be split into two names in {len(found)} ways: use a tab")
    if len(parts) != 2:
        raise InputError(f"{place}: expected `name0 name1`, got {line.strip()!r}")
    unknown = " and ".join(part for part in dict.fromkeys(parts) if part not in known)
    raise InputError(f"{place}: there is no image {unknown} (names are paths below the image folder)")


def _format_line(pair: Pair) -> str:
    if any(character in name for name in pair for character in "\t\r\n"):
        raise InputError(f"image names with tabs or line breaks do not fit into a pairs file: {tuple(pair)}")
    has_space = any(character.isspace() for name in pair for character in name)
    return ("\t" if has_space else " ").join(pair)
