"""hloc's extractor `dust3r_descriptor`: the descriptor of DUSt3R's encoder."""

from hloc.utils.base_model import BaseModel

from dust3r_sfm.hloc_plugin.images import network_input
from dust3r_sfm.models.descriptor import load_descriptor
from dust3r_sfm.models.dust3r import Dust3r


class Dust3rDescriptor(BaseModel):
    """A unit vector for each image."""

    default_conf = {"weights": None}
    required_inputs = ["image"]

    def _init(self, conf):
        self.net = load_descriptor(Dust3r.from_pretrained(conf["weights"]))

    def _forward(self, data):
        images, _ = network_input(data["image"], self.net.model.config)
        return {"global_descriptor": self.net(images)}
