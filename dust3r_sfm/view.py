"""Stage: look at what reconstruct wrote, in the browser; or as one file that opens without a network."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import tyro
from jaxtyping import UInt8

from dust3r_sfm.errors import InputError
from dust3r_sfm.export_scene import load_scene_views
from dust3r_sfm.files import writing
from dust3r_sfm.formats.pictures import colorize, nearness
from dust3r_sfm.formats.scene_page import write_scene_page
from dust3r_sfm.formats.scenes import read_scenes
from dust3r_sfm.formats.undistortion import straight_views
from dust3r_sfm.formats.viewing import Edge, certainty, outlook, viewed_cloud
from dust3r_sfm.geometry.transforms import camera_center, inverse
from dust3r_sfm.scene import Scene
from dust3r_sfm.views import View

if TYPE_CHECKING:
    import viser

logger = logging.getLogger(__name__)

COLORS = ("photo", "confidence", "image")
PICTURES = ("photo", "depth", "confidence")
PHOTO_SIDE = 320
SHARE = 70
"""Percent of the points, the most confident ones, that are drawn at first."""
VISER_SCALE = 0.6
"""What viser calls a frustum's scale over its depth, for usual lenses."""
KEPT, DROPPED, WIRE = (69, 196, 140), (235, 105, 105), (120, 135, 160)


def main(
    folder: tyro.conf.Positional[Path],
    image_dir: Path | None = None,
    export: Path | None = None,
    max_points: int = 500_000,
    host: str = "127.0.0.1",
    port: int = 8080,
) -> None:
    """Look at a reconstruction in the browser: cameras with their photos, cloud, pair graph, depth.

    Args:
        folder: What reconstruct wrote, with scene.h5 and summary.json.
        image_dir: The folder of photos, where it is no longer the one that reconstruct was given.
        export: Write a single HTML file that opens without a network, such as scene.html, in place of serving.
        max_points: Points drawn, evenly taken from all depth maps.
        host: Address that is served; 0.0.0.0 lets other machines look too.
        port: Port that is served; the next free one where it is taken.
    """
    if max_points < 1:
        raise InputError(f"at least one point must be drawn, got max_points {max_points}")
    scenes, views, edges = load_run(folder, image_dir)
    if export is not None:
        with writing(export):
            write_scene_page(export, scenes, views, edges, max_points)
        logger.info("%s: %.1f MB, opens in any browser.", export, export.stat().st_size / 1e6)
        return
    server = serve(scenes, views, edges, max_points, host, port)
    where = "localhost" if host in ("127.0.0.1", "0.0.0.0") else host
    logger.info("Open http://%s:%d in a browser; Ctrl-C ends.", where, server.get_port())
    try:
        server.sleep_forever()
    except KeyboardInterrupt:
        server.stop()


def load_run(folder: Path, image_dir: Path | None = None) -> tuple[list[Scene], list[View], list[Edge]]:
    """The scenes of a run, their photos, and what became of its pairs."""
    if not (folder / "scene.h5").is_file():
        raise InputError(f"there is no scene.h5 in {folder}: expected a folder that reconstruct has written")
    scenes = read_scenes(folder / "scene.h5")
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except FileNotFoundError:
        summary = {}
    except ValueError as error:
        raise InputError(f"{folder / 'summary.json'} cannot be read ({error}): run reconstruct again") from error
    image_dir = image_dir or (Path(summary["image_dir"]) if summary.get("image_dir") else None)
    if image_dir is None or not image_dir.is_dir():
        where = f"are not in {image_dir}" if image_dir else f"of {folder} are not known"
        raise InputError(f"the photos {where}: say where they are with --image_dir")
    kept: dict[tuple[str, str], bool] = {}
    for pair in summary.get("pairs", []):
        key = tuple(sorted((pair["name0"], pair["name1"])))
        kept[key] = kept.get(key, False) or pair["kept"]
    views = straight_views(load_scene_views(scenes, image_dir), scenes)
    return scenes, views, [Edge(*names, is_kept) for names, is_kept in kept.items()]


def serve(
    scenes: Sequence[Scene], views: Sequence[View], edges: Sequence[Edge], max_points: int, host: str, port: int
) -> viser.ViserServer:
    """A viser server of the scenes; it runs until it is stopped."""
    try:
        import viser
    except ImportError as error:
        raise InputError('the viewer needs viser: pip install "dust3r_sfm[view]", or use --export') from error
    server = viser.ViserServer(host=host, port=port, label="dust3r_sfm", verbose=False)
    server.gui.configure_theme(dark_mode=True, show_logo=False, control_width="medium")
    share = max_points / sum(len(scene.names) for scene in scenes)
    shown: list[_Shown] = []

    def show(index: int) -> None:
        for one in shown:
            one.remove()
        shown[:] = [_Shown(server, scenes[index], views, edges, max(1, int(share * len(scenes[index].names))))]

    if len(scenes) > 1:
        names = [f"{i}: {len(scene.names)} images" for i, scene in enumerate(scenes)]
        chosen = server.gui.add_dropdown("Model", names)
        chosen.on_update(lambda _: show(names.index(chosen.value)))
    show(0)
    server.on_client_connect(lambda client: shown[0].look(client))
    return server


class _Shown:
    """One scene on a server: its nodes, its controls and what they do."""

    def __init__(
        self, server: viser.ViserServer, scene: Scene, views: Sequence[View], edges: Sequence[Edge], max_points: int
    ) -> None:
        view_of = {view.name: view for view in views}
        self.server, self.scene, self.views = server, scene, [view_of[name] for name in scene.names]
        self.cloud = viewed_cloud(scene, self.views, max_points)
        self.outlook = outlook(scene, self.cloud)
        self.poses = inverse(scene.cam_from_world.detach().cpu().double()).numpy()
        server.scene.set_up_direction(self.outlook.up.numpy())
        self.frustums = [self._add_frustum(i) for i in range(len(self.views))]
        self.lines = {kept: self._add_pairs(edges, kept) for kept in (True, False)}
        self.folders = [self._cloud_controls(), self._camera_controls(), self._image_controls()]
        self._draw_cloud()

    def look(self, client: viser.ClientHandle) -> None:
        """The view that a browser begins with."""
        client.camera.up_direction = self.outlook.up.numpy()
        client.camera.position = self.outlook.eye.numpy()
        client.camera.look_at = self.outlook.target.numpy()

    def remove(self) -> None:
        for handle in (*self.frustums, *self.lines.values(), self.points, *self.folders):
            handle.remove()

    def _cloud_controls(self) -> viser.GuiFolderHandle:
        with self.server.gui.add_folder("Cloud") as folder:
            self.color = self.server.gui.add_dropdown("Colour", COLORS)
            self.share = self.server.gui.add_slider("Most confident %", 1, 100, 1, SHARE)
            self.size = self.server.gui.add_slider("Size of points", 0.2, 4.0, 0.1, 1.0)
            self.only = self.server.gui.add_checkbox("Only the image's", False)
            for control in (self.color, self.share, self.size, self.only):
                control.on_update(lambda _: self._draw_cloud())
        return folder

    def _camera_controls(self) -> viser.GuiFolderHandle:
        with self.server.gui.add_folder("Cameras and pairs") as folder:
            cameras = self.server.gui.add_checkbox("Cameras", True)
            size = self.server.gui.add_slider("Size of cameras", 0.2, 4.0, 0.1, 1.0)
            kept = self.server.gui.add_checkbox("Pairs kept", False)
            dropped = self.server.gui.add_checkbox("Pairs dropped", False)

            def show(_: object) -> None:
                for frustum in self.frustums:
                    frustum.visible = cameras.value
                    frustum.scale = self.outlook.camera_size * VISER_SCALE * size.value
                self.lines[True].visible, self.lines[False].visible = kept.value, dropped.value

            for control in (cameras, size, kept, dropped):
                control.on_update(show)
        return folder

    def _image_controls(self) -> viser.GuiFolderHandle:
        with self.server.gui.add_folder("Image") as folder:
            self.image = self.server.gui.add_dropdown("Name", self.scene.names)
            self.kind = self.server.gui.add_dropdown("Show", PICTURES, initial_value="depth")
            self.picture = self.server.gui.add_image(self._picture())
            go = self.server.gui.add_button("Look from here")

        def show(_: object) -> None:
            self.picture.image = self._picture()
            if self.only.value:
                self._draw_cloud()

        self.image.on_update(show)
        self.kind.on_update(show)
        go.on_click(lambda event: self._look_from(event.client))
        return folder

    def _look_from(self, client: viser.ClientHandle | None) -> None:
        pose = self.poses[self.scene.names.index(self.image.value)]
        if client is not None:
            reach = np.linalg.norm(self.outlook.target.numpy() - pose[:3, 3])
            client.camera.position = pose[:3, 3]
            client.camera.look_at = pose[:3, 3] + reach * pose[:3, 2]

    def _picture(self) -> UInt8[np.ndarray, "h w 3"]:
        index = self.scene.names.index(self.image.value)
        if self.kind.value == "photo":
            return self.views[index].image.numpy()
        if self.kind.value == "depth":
            return colorize(nearness(self.scene.depth[index].cpu().float())).numpy()
        confidence = self.scene.confidence[index].cpu().float().clamp(min=1)
        return colorize(certainty(confidence, self.cloud.confidence)).numpy()

    def _draw_cloud(self) -> None:
        cloud, number = self.cloud, round(len(self.cloud.points) * self.share.value / 100)
        colors = cloud.colors
        if self.color.value == "confidence":
            colors = colorize(cloud.certainty())
        if self.color.value == "image":
            colors = colorize((cloud.image_indices * 0.618034) % 1)
        chosen = torch.arange(number)
        if self.only.value:
            chosen = chosen[cloud.image_indices[:number] == self.scene.names.index(self.image.value)]
        self.points = self.server.scene.add_point_cloud(
            "/points",
            cloud.points[chosen].numpy(),
            colors[chosen].numpy(),
            point_size=self.outlook.point_size * self.size.value,
            point_shape="circle",
            precision="float32",
        )

    def _add_frustum(self, index: int) -> viser.CameraFrustumHandle:
        from viser.transforms import SO3

        view, pose = self.views[index], self.poses[index]
        height, width = view.size
        stride = -(-max(view.size) // PHOTO_SIDE)
        frustum = self.server.scene.add_camera_frustum(
            f"/cameras/{index}",
            fov=2 * float(np.arctan(height / 2 / float(self.scene.K[index, 1, 1]))),
            aspect=width / height,
            scale=self.outlook.camera_size * VISER_SCALE,
            thickness=1.5,
            thickness_units="screen",
            color=WIRE,
            image=view.image[::stride, ::stride].numpy(),
            format="jpeg",
            wxyz=SO3.from_matrix(pose[:3, :3]).wxyz,
            position=pose[:3, 3],
        )

        @frustum.on_click
        def _(_: object) -> None:
            self.image.value = self.scene.names[index]

        return frustum

    def _add_pairs(self, edges: Sequence[Edge], kept: bool) -> viser.LineSegmentsHandle:
        number = {name: i for i, name in enumerate(self.scene.names)}
        ends = [
            [number[e.name0], number[e.name1]] for e in edges if e.kept == kept and {e.name0, e.name1} <= set(number)
        ]
        centers = camera_center(self.scene.cam_from_world.detach().cpu().float()).numpy()
        return self.server.scene.add_line_segments(
            "/pairs/kept" if kept else "/pairs/dropped",
            centers[np.array(ends, dtype=int).reshape(-1, 2)],
            KEPT if kept else DROPPED,
            thickness=1.5,
            thickness_units="screen",
            visible=False,
        )


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["view", *sys.argv[1:]]))
