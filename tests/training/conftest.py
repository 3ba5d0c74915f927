"""Textures, and the fused kernel built by g++ where there is one: with it tests render ten times faster."""

from functools import partial

import pytest

from dust3r_sfm.training import render as r
from dust3r_sfm.training import synthetic
from dust3r_sfm.training.textures import generated_textures, with_mipmaps


@pytest.fixture(scope="session")
def textures():
    """Eight, as the renderer takes them."""
    return with_mipmaps(generated_textures(8, seed=3))


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    """The fused renderer for the CPU, None where there is no g++; built anew, not out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        r.load_kernel.cache_clear()
        return r.load_kernel("cpu")


@pytest.fixture(scope="module")
def fast_render(kernel):
    """Whatever renders does so by the fused kernel; without g++ all stays as it is, and is slower."""
    with pytest.MonkeyPatch.context() as patch:
        if kernel is not None:
            patch.setattr(r, "render", partial(r.render_fused, kernel))
            patch.setattr(synthetic, "_render_depth", partial(_depth, kernel))
        yield


def _depth(kernel, primitives, lights, cameras, height, width, textures):
    return r.render_fused(kernel, primitives, lights, cameras, textures, height, width, with_color=False)[1]
