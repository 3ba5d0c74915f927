"""Photos in, a COLMAP model out, without knowing any camera."""

import zlib  # noqa: F401  pycolmap 4.1 to 4.2.1 crash later where zlib was not loaded before them
from importlib import import_module, metadata
from sys import modules
from types import ModuleType

__version__ = metadata.version("dust3r_sfm")

_HOMES = {
    "Dust3r": "models.dust3r",
    "InputError": "errors",
    "Matches": "pairs",
    "Pair": "pairs",
    "PairPrediction": "pairs",
    "PointmapFile": "formats.pointmaps",
    "ReconstructionError": "errors",
    "Scene": "scene",
    "Tracks": "scene",
    "View": "views",
    "align": "alignment.align",
    "align_components": "alignment.align",
    "build_tracks": "alignment.tracks",
    "filter_pairs": "filter_pairs",
    "infer_pairs": "infer_pairs",
    "load_view": "views",
    "load_views": "views",
    "localize": "localize",
    "match_dense": "match_dense",
    "pairs_exhaustive": "graph",
    "pairs_from_file": "formats.pairs",
    "pairs_from_retrieval": "pairs_from_retrieval",
    "pairs_logarithmic": "graph",
    "pairs_one_reference": "graph",
    "pairs_sequential": "graph",
    "read_colmap": "formats.colmap",
    "register_with_hloc": "hloc_plugin",
    "symmetrize": "graph",
    "write_colmap": "formats.colmap",
    "write_database": "formats.database",
}
"""The public names and the modules they live in; each is imported when it is first used."""

_NAMES_AT_HOME = {"pairs_from_file": "read_pairs"}

__all__ = list(_HOMES)  # noqa: PLE0604


class _Package(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'dust3r_sfm' has no attribute '{name}'")
        value = getattr(import_module(f"dust3r_sfm.{_HOMES[name]}"), _NAMES_AT_HOME.get(name, name))
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # the import of the stage `infer_pairs` would put the module over the function of the same name
        is_stage = name in _HOMES and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_stage else value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


modules[__name__].__class__ = _Package
