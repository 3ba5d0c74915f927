"""Modules import only from lower layers, and the folders of layer 2 do not import one another."""

import ast
from pathlib import Path

import dust3r_sfm

ROOT = Path(dust3r_sfm.__file__).parent
LAYERS = {"errors": 0, "files": 0, "geometry": 0, "views": 1, "pairs": 1, "graph": 1, "pair_graph": 1, "scene": 1}
LAYERS |= {"colmap_versions": 0, "schedule": 1}
LAYERS["depth_views"] = 1
LAYERS |= dict.fromkeys(["models", "formats", "alignment", "training", "retrieval"], 2)
STAGE_LAYER = 3


def imported_parts(source):
    """What is imported of the package: `geometry` for `from dust3r_sfm.geometry.camera import project`."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (f"{name}.__init__".split(".")[1] for name in names if name.split(".")[0] == "dust3r_sfm")


def violations(part, source):
    layer = LAYERS.get(part, STAGE_LAYER)
    for other in set(imported_parts(source)) - {part}:
        lower = LAYERS.get(other, STAGE_LAYER)
        if lower > layer or (lower == layer == 2):
            yield f"{part} (layer {layer}) imports {other} (layer {lower})"


def test_modules_import_only_from_lower_layers():
    parts = {path: path.relative_to(ROOT).parts[0].removesuffix(".py") for path in sorted(ROOT.rglob("*.py"))}
    found = {str(path): list(violations(part, path.read_text())) for path, part in parts.items() if part != "__init__"}
    assert not {path: lines for path, lines in found.items() if lines}


def test_the_check_sees_every_form_of_import():
    assert list(violations("geometry", "from dust3r_sfm import views"))
    assert list(violations("models", "def f():\n    import dust3r_sfm.formats.colmap"))
    assert list(violations("scene", "import dust3r_sfm as ds"))
    assert list(violations("scene", "from dust3r_sfm.align_scene import main"))
    assert not list(violations("models", "from dust3r_sfm.geometry.camera import project\nimport torch"))
