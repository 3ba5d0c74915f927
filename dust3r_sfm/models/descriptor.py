"""A descriptor of an image that needs no second network: pooled tokens of DUSt3R's encoder, projected."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.models.dust3r import Dust3r

FORMAT = "dust3r_sfm.descriptor.1"
SHIPPED = Path(__file__).parent / "weights" / "descriptor_small.safetensors"
"""The projection that belongs to the shipped weights."""


class EncoderDescriptor(nn.Module):
    """Unit descriptors of images in [-1, 1].

    The generalised mean with learned power (GeM) is taken over the tokens, of the positive and of the negative parts
    of each channel, as tokens have either sign; then a linear map, if there is one, and unit length.
    """

    def __init__(self, model: Dust3r, projection: nn.Linear | None = None, p: float = 3.0) -> None:
        super().__init__()
        self.model = model
        self.p = nn.Parameter(torch.tensor(p))
        self.projection = projection

    @property
    def dim(self) -> int:
        return 2 * self.model.config.enc_embed_dim if self.projection is None else self.projection.out_features

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.describe(self.model.encode(image).features)

    def describe(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b d"]:
        """Descriptors of encoded images."""
        pooled = self.pool(tokens.to(self.p.dtype))
        with torch.autocast(tokens.device.type, enabled=False):
            projected = pooled if self.projection is None else self.projection(pooled)
            return nn.functional.normalize(projected, dim=-1)

    def pool(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b 2*c"]:
        signed = torch.cat([tokens, -tokens], dim=-1).clamp(min=1e-6)
        return signed.pow(self.p).mean(dim=1).pow(1 / self.p)


def load_descriptor(model: Dust3r, path: Path | None = None) -> EncoderDescriptor:
    """The descriptor of a network, with the projection of a file, or the shipped one where that is of this encoder.

    Networks that no projection was learned for are described without one.
    """
    if path is None:
        if not SHIPPED.is_file() or _header(SHIPPED).get("encoder") != encoder_fingerprint(model):
            return EncoderDescriptor(model).eval()
        path = SHIPPED
    header = _header(path)
    if header.get("encoder") != encoder_fingerprint(model):
        raise InputError(f"the projection {path} was learned for another encoder than that of {model.name}")
    with safe_open(path, framework="pt") as file:
        weight, bias, p = (file.get_tensor(name).float() for name in ("weight", "bias", "p"))
    projection = nn.Linear(weight.shape[1], weight.shape[0])
    projection.load_state_dict({"weight": weight, "bias": bias})
    return EncoderDescriptor(model, projection, float(p)).eval()


def save_descriptor(descriptor: EncoderDescriptor, path: Path) -> None:
    """The power and the projection, in float16, and which encoder they belong to."""
    assert descriptor.projection is not None, "there is nothing to save"
    values = {"weight": descriptor.projection.weight, "bias": descriptor.projection.bias}
    state = {name: x.detach().to("cpu", torch.float16).contiguous() for name, x in values.items()}
    state["p"] = descriptor.p.detach().cpu().reshape(())
    write_bytes(path, save(state, metadata={"format": FORMAT, "encoder": encoder_fingerprint(descriptor.model)}))


def encoder_fingerprint(model: Dust3r) -> str:
    """A hash of the encoder's weights, rounded as the shipped file rounds them."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        if name.startswith(("patch_embed.", "stem.", "enc_")):
            digest.update(name.encode())
            digest.update(x.detach().to("cpu", torch.float16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"the projection {path} cannot be read ({str(error).splitlines()[0]})") from error
    if header.get("format") != FORMAT:
        raise InputError(f"{path} is no projection of descriptors (expected format {FORMAT!r})")
    return header
