"""The network made ready for many pairs: weights in the precision of the products, layouts and kernels for a GPU."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.models.heads import DptHead

_PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def ready(model: Dust3r, device: torch.device, dtype: torch.dtype, is_compiled: bool = False) -> Dust3r:
    """The model itself where nothing changes, else a copy on `device` whose matrices are rounded to `dtype` once.

    Autocast rounds them again for every batch. Norms, the residual stream and the heads' last layers
    stay in the model's own precision, so predictions are those of autocast. Compiled, a batch of
    another shape costs a minute: batches should have one shape.
    """
    if dtype == torch.float32 and device.type == "cpu" and not is_compiled:
        return model.eval()
    model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
    last_layers = {_last_layer(head) for head in (model.downstream_head1, model.downstream_head2)}
    for module in model.modules():
        if isinstance(module, _PRODUCTS) and module not in last_layers:
            module.to(dtype)
    if device.type == "cuda":
        for head in (model.downstream_head1, model.downstream_head2):
            head.to(memory_format=torch.channels_last)  # tokens as a map have this layout already
    return _compiled(model) if is_compiled else model


def _compiled(model: Dust3r) -> Dust3r:
    """One compiled block serves all layers: compiling the network as a whole takes minutes."""
    for block in [*model.enc_blocks, *model.dec_blocks, *model.dec_blocks2]:
        block.compile(dynamic=False)
    model._predict = torch.compile(model._predict, dynamic=False)
    for head in (model.downstream_head1, model.downstream_head2):
        head.finest = torch.compile(head.finest, dynamic=False)
    return model


def _last_layer(head: nn.Module) -> nn.Module:
    return head.dpt.head[-1] if isinstance(head, DptHead) else head.proj


def normalized(images: Tensor) -> Tensor:
    """Bytes (b h w 3) as the network's input (b 3 h w) in [-1, 1], on their device."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
