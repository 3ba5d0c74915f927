"""Our descriptor and matcher among those of hloc, which has no entry points: its packages find ours by their path.

    import dust3r_sfm
    from hloc import extract_features, match_dense
    dust3r_sfm.register_with_hloc()
    extract_features.main(extract_features.confs["dust3r_sfm"], images, outputs)
    match_dense.main(match_dense.confs["dust3r_sfm"], pairs, images, outputs)

hloc's own command line does not see them: it lists its choices before anything can be added.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from dust3r_sfm.errors import InputError

HOME = Path(__file__).parent
RESIZE_MAX = 1024
"""Long side in pixels that hloc gives the photos; the network makes them smaller still."""
EXTRACTOR = {
    "output": "global-feats-dust3r_sfm",
    "model": {"name": "dust3r_descriptor"},
    "preprocessing": {"resize_max": RESIZE_MAX},
}
MATCHER = {
    "output": "matches-dust3r_sfm",
    "model": {"name": "dust3r_dense"},
    "preprocessing": {"grayscale": False, "resize_max": RESIZE_MAX, "dfactor": 16},
    # in pixels of the photo, of which several make one of the network's: keypoints repeat from pair to pair
    "max_error": 4,
    "cell_size": 4,
}


def register_with_hloc() -> None:
    """Add the extractor `dust3r_descriptor` and the dense matcher `dust3r_dense` to hloc, and their confs.

    Both confs are called `dust3r_sfm`; "weights" in their "model" names another checkpoint. A second
    call changes nothing.
    """
    try:
        extractors, matchers = import_module("hloc.extractors"), import_module("hloc.matchers")
        extract_features, match_dense = import_module("hloc.extract_features"), import_module("hloc.match_dense")
    except ImportError as error:
        raise InputError(f"hloc cannot be imported ({error}): install it beside dust3r_sfm first") from error
    for package, folder in ((extractors, HOME / "extractors"), (matchers, HOME / "matchers")):
        if str(folder) not in package.__path__:
            package.__path__.append(str(folder))
    extract_features.confs["dust3r_sfm"] = EXTRACTOR
    match_dense.confs["dust3r_sfm"] = MATCHER
