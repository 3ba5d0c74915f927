"""AP-GeM (Revaud et al., ICCV 2019): ResNet features, generalised-mean pooling, a projection, perhaps whitening."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dust3r_sfm.errors import InputError
from dust3r_sfm.files import write_bytes
from dust3r_sfm.models.released import unpickle_data

FORMAT = "dust3r_sfm.apgem.1"
ARCHITECTURES = ("resnet18", "resnet50", "resnet101", "resnet152")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PCA_FIELDS = ("mean", "components", "explained_variance")
MAX_SIDE = 1024
"""Long side that photos are scaled down to, as hloc does."""


@dataclass(frozen=True, kw_only=True)
class ApGemConfig:
    architecture: str = "resnet101"
    """Name of timm's trunk."""
    dim: int = 2048
    """Numbers of a descriptor."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    """Of the colours in [0, 1] that the trunk was trained on."""


class Gem(nn.Module):
    """Generalised mean over all places: p = 1 is the average, large p the maximum."""

    def __init__(self, p: float = 3.0) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))

    def forward(self, features: Float[Tensor, "b c *places"]) -> Float[Tensor, "b c"]:
        return features.clamp(min=1e-6).pow(self.p).flatten(2).mean(dim=2).pow(1 / self.p)


class Whitening(nn.Module):
    """Principal components, each divided by its variance to a power."""

    def __init__(self, dim: int, num_components: int, power: float = 0.25) -> None:
        super().__init__()
        self.power = power
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("components", torch.eye(num_components, dim))
        self.register_buffer("explained_variance", torch.ones(num_components))

    def forward(self, descriptors: Float[Tensor, "b d"]) -> Float[Tensor, "b c"]:
        return (descriptors - self.mean) @ self.components.mT / self.explained_variance**self.power


class ApGem(nn.Module):
    """Unit descriptors of images in [-1, 1]."""

    def __init__(self, config: ApGemConfig = ApGemConfig()) -> None:
        super().__init__()
        self.config = config
        self.backbone = import_timm().create_model(config.architecture, num_classes=0, global_pool="", pretrained=False)
        self.gem = Gem()
        self.fc = nn.Linear(self.backbone.num_features, config.dim)
        self.pca: Whitening | None = None

    @property
    def dim(self) -> int:
        return self.fc.out_features if self.pca is None else len(self.pca.components)

    def forward(self, image: Float[Tensor, "b 3 h w"], scales: tuple[float, ...] = (1.0,)) -> Float[Tensor, "b d"]:
        """The descriptors over several scales are averaged before they are whitened."""
        mean, std = (image.new_tensor(x)[:, None, None] for x in (self.config.mean, self.config.std))
        normalized = ((image + 1) / 2 - mean) / std
        descriptors = torch.stack([self._describe(_rescaled(normalized, scale)) for scale in scales]).mean(dim=0)
        descriptors = nn.functional.normalize(descriptors, dim=-1)
        return descriptors if self.pca is None else nn.functional.normalize(self.pca(descriptors), dim=-1)

    def _describe(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return nn.functional.normalize(self.fc(self.gem(self.backbone(image))), dim=-1)


def load_apgem(path: Path) -> ApGem:
    """The network of a `convert_weights` file or of a published checkpoint, in evaluation mode."""
    if not path.is_file():
        raise InputError(f"there are no AP-GeM weights at {path}: expected a .safetensors or the published .pt")
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # a header in JSON, after its length
        return _read_own(path) if is_safetensors else read_published(path)
    except InputError as error:
        raise InputError(f"cannot load AP-GeM weights from {path}: {error}") from error


def save_apgem(model: ApGem, path: Path) -> None:
    """The weights in float32, with the config in the file's header."""
    state = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    metadata = {"format": FORMAT, "config": json.dumps(asdict(model.config))}
    if model.pca is not None:
        metadata["whitening_power"] = repr(model.pca.power)
    write_bytes(path, save(state, metadata=metadata))


def read_published(path: Path, whitening: str | None = "Landmarks_clean") -> ApGem:
    """The network of a checkpoint of the AP-GeM authors; nothing that the file asks for is run.

    `whitening` names one of the file's PCAs; a file that has none gives a network without.
    """
    content = unpickle_data(path, _safe_globals())
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise InputError("it holds no 'state_dict' with weights")
    state = {str(name).removeprefix("module."): x for name, x in content["state_dict"].items()}
    if not all(isinstance(x, Tensor) for x in state.values()) or "fc.weight" not in state:
        raise InputError("its 'state_dict' has no projection fc.weight: it is no AP-GeM network")
    config = _config_of(content, len(state["fc.weight"]))
    named = {_OWN_NAMES.get(name, f"backbone.{name}"): x for name, x in state.items()}
    named["gem.p"] = named.get("gem.p", torch.tensor([3.0])).reshape(1)
    pcas = content.get("pca") or {}
    if whitening is not None and pcas:
        named |= _pca_tensors(pcas, whitening)
    return _build(config, named)


_OWN_NAMES = {"adpool.p": "gem.p", "fc.weight": "fc.weight", "fc.bias": "fc.bias"}


class PcaState:
    """Stands in for scikit-learn's PCA in a checkpoint: keeps what was stored and can do nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _safe_globals() -> list[Any]:
    """What the checkpoint's arrays and PCA are made of: data alone, in old and new places of numpy and scikit-learn."""
    import numpy._core.multiarray as multiarray

    safe: list[Any] = [(PcaState, f"sklearn.decomposition.{module}.PCA") for module in ("pca", "_pca")]
    for place in ("numpy.core.multiarray", "numpy._core.multiarray"):
        safe += [(multiarray._reconstruct, f"{place}._reconstruct"), (multiarray.scalar, f"{place}.scalar")]
    return [*safe, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))]


def _config_of(content: Mapping[str, Any], dim: int) -> ApGemConfig:
    options, preprocess = content.get("model_options") or {}, content.get("preprocess") or {}
    arch = str(options.get("arch", "resnet101"))
    architecture = next((name for name in reversed(ARCHITECTURES) if arch.split("_")[0] == name), None)
    if architecture is None or options.get("norm_features"):
        reason = "normalised features" if architecture else f"the network {arch!r}"
        raise InputError(f"it is of {reason}; expected one of {', '.join(ARCHITECTURES)} without normalised features")
    try:
        mean, std = (
            tuple(float(x) for x in preprocess.get(name, usual))
            for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
        )
    except (TypeError, ValueError) as error:
        raise InputError("its 'preprocess' has no mean and std of three colours") from error
    return _checked(ApGemConfig(architecture=architecture, dim=dim, mean=mean, std=std))


def _pca_tensors(pcas: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    if name not in pcas:
        raise InputError(f"it has no whitening {name!r}; there are: {', '.join(map(str, pcas))}")
    values = {field: getattr(pcas[name], f"{field}_", None) for field in PCA_FIELDS}
    if not all(isinstance(value, np.ndarray) for value in values.values()):
        raise InputError(f"its whitening {name!r} lacks {', '.join(f'{field}_' for field in PCA_FIELDS)}")
    return {f"pca.{field}": torch.from_numpy(value.astype(np.float32)) for field, value in values.items()}


def _read_own(path: Path) -> ApGem:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError("it is a safetensors file, but none that convert_weights made")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        values = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(metadata["config"]).items()}
        config, power = ApGemConfig(**values), float(metadata.get("whitening_power", 0.25))
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"it is damaged ({str(error).splitlines()[0]})") from error
    return _build(_checked(config), state, power)


def _checked(config: ApGemConfig) -> ApGemConfig:
    colors = (*config.mean, *config.std)
    if config.architecture not in ARCHITECTURES or len(colors) != 6 or min(config.std) <= 0:
        raise InputError(f"its settings describe no AP-GeM network: {config}")
    return config


def _build(config: ApGemConfig, state: dict[str, Tensor], power: float = 0.25) -> ApGem:
    """The network with exactly these weights."""
    model = ApGem(config)
    if "pca.components" in state and state["pca.components"].ndim == 2:
        num_components, dim = state["pca.components"].shape
        model.pca = Whitening(dim, num_components, power)
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    for what, names in (("lacks", expected.keys() - state.keys()), ("has the unknown", state.keys() - expected.keys())):
        if names:
            raise InputError(f"it {what} weights {', '.join(sorted(names)[:3])} ({len(names)} in all)")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise InputError(f"its {name} is {tuple(state[name].shape)}, where the network needs {shape}")
        if not state[name].isfinite().all():
            raise InputError(f"its {name} holds numbers that are not finite")
    model.load_state_dict(state)
    return model.eval()


def _rescaled(image: Float[Tensor, "b 3 h w"], scale: float) -> Float[Tensor, "b 3 h1 w1"]:
    if scale == 1:
        return image
    return nn.functional.interpolate(image, scale_factor=scale, mode="bilinear", antialias=True, align_corners=False)


_OPERATORS: list[Any] = []  # torch forgets what a library declares once the library is gone


@cache
def import_timm() -> ModuleType:
    """timm, whose trunk AP-GeM has; InputError that says what to install where it cannot be imported.

    timm imports torchvision, which fails beside a torch of another build (the CPU's, say) as its compiled operators
    are then not there. The trunk uses none of them: the two that are looked up at import are declared, without code.
    """
    try:
        return _import_timm()
    except ImportError as error:
        raise InputError(
            f"AP-GeM needs timm and torchvision ({error}): install them with pip install 'dust3r_sfm[retrieval]', "
            "or use the encoder's descriptors, which need neither"
        ) from error


def _import_timm() -> ModuleType:
    try:
        import timm
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)
        import timm
    return timm
