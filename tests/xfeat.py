"""A network of XFeat's published form with random weights, and its checkpoint."""

import torch
from torch import nn


def basic(i, o, kernel=3, stride=1):
    convolution = nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)
    return nn.ModuleDict({"layer": nn.Sequential(convolution, nn.BatchNorm2d(o, affine=False), nn.ReLU())})


class Published(nn.Module):
    """XFeat as its paper has it, batch normalisation and all; parameters bear the names of its checkpoint."""

    def __init__(self):
        super().__init__()
        self.skip1 = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(1, 24, 1))
        self.block1 = nn.ModuleList([basic(1, 4), basic(4, 8, 3, 2), basic(8, 8), basic(8, 24, 3, 2)])
        self.block2 = nn.ModuleList([basic(24, 24), basic(24, 24)])
        self.block3 = nn.ModuleList([basic(24, 64, 3, 2), basic(64, 64), basic(64, 64, 1)])
        self.block4 = nn.ModuleList([basic(64, 64, 3, 2), basic(64, 64), basic(64, 64)])
        self.block5 = nn.ModuleList([basic(64, 128, 3, 2), basic(128, 128), basic(128, 128), basic(128, 64, 1)])
        self.block_fusion = nn.ModuleList([basic(64, 64), basic(64, 64), nn.Conv2d(64, 64, 1)])
        self.heatmap_head = nn.Conv2d(64, 1, 1)  # one of the parts that are not wanted

    def forward(self, image):
        x = nn.functional.instance_norm(image.mean(1, keepdim=True))

        def run(block, x):
            for layer in block:
                x = layer["layer"](x) if isinstance(layer, nn.ModuleDict) else layer(x)
            return x

        x3 = run(self.block3, run(self.block2, run(self.block1, x) + self.skip1(x)))
        x4 = run(self.block4, x3)
        up = nn.Upsample(x3.shape[-2:], mode="bilinear")
        return run(self.block_fusion, x3 + up(x4) + up(run(self.block5, x4)))


def write_xfeat(path):
    """The network, in evaluation mode; its state goes to the file."""
    torch.manual_seed(0)
    network = Published().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    torch.save(network.state_dict(), path)
    return network
