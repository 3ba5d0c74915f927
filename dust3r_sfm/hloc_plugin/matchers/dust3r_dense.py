"""hloc's dense matcher `dust3r_dense`: reciprocal matches of DUSt3R's pointmaps."""

import torch
from hloc.utils.base_model import BaseModel

from dust3r_sfm.hloc_plugin.images import network_input
from dust3r_sfm.match_dense import match_pair
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.pairs import PairPrediction


class Dust3rDense(BaseModel):
    """Keypoints in pixels of the images that hloc gives, counted from the first one's centre, and scores."""

    default_conf = {"weights": None}
    required_inputs = ["image0", "image1"]

    def _init(self, conf):
        self.net = Dust3r.from_pretrained(conf["weights"]).eval()

    def _forward(self, data):
        images, maps = zip(*(network_input(data[f"image{k}"], self.net.config) for k in (0, 1)), strict=True)
        tokens = [self.net.encode(image) for image in images]
        there, back = (_single(self.net.decode(tokens[k], tokens[1 - k])) for k in (0, 1))
        found = match_pair(there, reverse=back)
        device = data["image0"].device
        keypoints = [_to_image(xy, maps[k]).to(device) for k, xy in enumerate((found.keypoints0, found.keypoints1))]
        return {"keypoints0": keypoints[0], "keypoints1": keypoints[1], "scores": found.scores.to(device)}


def _single(prediction):
    """The first of a batch, on the CPU in float32."""
    return PairPrediction(
        prediction.pointmap0_in_cam0[0].float().cpu(),
        prediction.confidence0[0].float().cpu(),
        prediction.pointmap1_in_cam0[0].float().cpu(),
        prediction.confidence1[0].float().cpu(),
    )


def _to_image(xy, net_from_img):
    linear, shift = net_from_img[:2, :2], net_from_img[:2, 2]
    return ((xy.double() - shift) @ torch.linalg.inv(linear).T - 0.5).float()
