"""AP-GeM: formulas of its parts, and a checkpoint of the published form read without running anything in it."""

import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch

from dust3r_sfm.__main__ import main
from dust3r_sfm.errors import InputError
from dust3r_sfm.models import apgem
from dust3r_sfm.models.apgem import ApGem, ApGemConfig, Gem, Whitening, load_apgem, read_published, save_apgem


@pytest.fixture(scope="module", autouse=True)
def timm():
    if find_spec("timm") is None or find_spec("torchvision") is None:
        pytest.skip("AP-GeM needs the extra [retrieval]")
    return apgem.import_timm()


def published_state(timm, dim):
    """Random weights under the names of the published network, its trunk from timm."""
    torch.manual_seed(0)
    trunk = timm.create_model("resnet18", num_classes=0, global_pool="")
    state = {f"module.{name}": x for name, x in trunk.state_dict().items()}
    fc = torch.nn.Linear(512, dim)
    state |= {"module.adpool.p": torch.tensor([2.7]), "module.fc.weight": fc.weight.data}
    return trunk.eval(), state | {"module.fc.bias": fc.bias.data}


@pytest.fixture
def sklearn_pca(monkeypatch):
    """A class that pickles as scikit-learn 0.20's PCA did, known only while the checkpoint is written."""
    module = ModuleType("sklearn.decomposition.pca")
    module.PCA = type("PCA", (), {"__module__": module.__name__, "__getstate__": lambda self: vars(self).copy()})
    for name in ("sklearn", "sklearn.decomposition"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.PCA


def make_pca(kind, dim, num_components):
    rng = np.random.default_rng(1)
    pca = kind()
    vars(pca).update(
        n_components=num_components,
        copy=True,
        whiten=False,
        svd_solver="auto",
        tol=0.0,
        iterated_power="auto",
        random_state=None,
        mean_=rng.normal(size=dim).astype(np.float32),
        components_=np.linalg.qr(rng.normal(size=(dim, dim)))[0][:num_components].astype(np.float32),
        explained_variance_=np.sort(rng.uniform(0.1, 2, num_components))[::-1].astype(np.float32),
        explained_variance_ratio_=np.ones(num_components, np.float32),
        singular_values_=np.ones(num_components, np.float32),
        noise_variance_=np.float64(0.25),
        n_samples_=1000,
        n_features_=dim,
        n_components_=num_components,
        _fit_svd_solver="full",
        _sklearn_version="0.20.2",
    )
    return pca


@pytest.fixture(params=["old torch and numpy", "new torch"])
def checkpoint(request, timm, sklearn_pca, tmp_path, monkeypatch):
    """A file of the published form, and what lies in it."""
    dim = 24
    trunk, state = published_state(timm, dim)
    content = {
        "state_dict": state,
        "model_options": {"arch": "resnet18_rmac", "out_dim": dim, "pooling": "gem", "gemp": 3, "norm_features": False},
        "preprocess": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "input_size": 224},
        "pca": {"Landmarks_clean": make_pca(sklearn_pca, dim, 16)},
        "current_iter": 296,
    }
    path, is_old = tmp_path / "Resnet-101-AP-GeM.pt", request.param.startswith("old")
    torch.save(content, path, _use_new_zipfile_serialization=not is_old)
    if is_old:  # numpy 1 knew its modules by other names
        data = path.read_bytes()
        assert b"cnumpy._core.multiarray\n" in data
        path.write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    pca = content["pca"]["Landmarks_clean"]
    monkeypatch.undo()  # scikit-learn is gone
    return path, trunk, state, pca


def descriptor_in_numpy(trunk, state, pca, image):
    """The published formulas, step by step in float64."""
    normalized = (image - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    with torch.no_grad():
        features = trunk(normalized[None])[0].double().numpy()
    p = float(state["module.adpool.p"])
    pooled = (np.maximum(features, 1e-6) ** p).mean(axis=(1, 2)) ** (1 / p)
    x = state["module.fc.weight"].double().numpy() @ pooled + state["module.fc.bias"].double().numpy()
    x = x / np.linalg.norm(x)
    x = (x - pca.mean_) @ pca.components_.T / pca.explained_variance_.astype(np.float64) ** 0.25
    return x / np.linalg.norm(x)


def test_a_published_checkpoint_gives_its_descriptors_before_and_after_conversion(checkpoint, tmp_path, caplog):
    path, trunk, state, pca = checkpoint
    output = tmp_path / "apgem.safetensors"
    assert main(["convert-weights", "--checkpoint", str(path), "--output", str(output)]) == 0
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = descriptor_in_numpy(trunk, state, pca, image)
    for file in (path, output):
        with torch.no_grad():
            found = load_apgem(file)(image[None] * 2 - 1)[0]
        assert np.allclose(found.numpy(), expected, atol=1e-4)
    assert "whitened by Landmarks_clean" in caplog.text


def test_the_trunk_has_the_published_networks_names():
    model = ApGem()
    assert len(model.state_dict()) == 627
    assert sum(x.numel() for x in model.parameters()) == pytest.approx(46.7e6, rel=1e-3)


def test_a_checkpoint_that_asks_to_run_something_is_refused_and_nothing_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    path = tmp_path / "evil.pt"
    torch.save({"state_dict": {}, "pca": Evil()}, path)
    with pytest.raises(InputError, match=r"asks to run \S*open, which no weights need"):
        load_apgem(path)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "holds no 'state_dict'"),
        ({"state_dict": {"fc.bias": torch.ones(2)}}, "no AP-GeM network"),
        ({"state_dict": {"fc.weight": torch.ones(4, 4)}, "model_options": {"arch": "vgg16"}}, "network 'vgg16'"),
        (
            {"state_dict": {"fc.weight": torch.ones(4, 512)}, "model_options": {"arch": "resnet18_rmac"}},
            "lacks weights",
        ),
    ],
)
def test_other_checkpoints_are_refused_with_the_reason(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match=message):
        read_published(tmp_path / "other.pt")


def test_files_that_are_none_are_refused_with_the_reason(tmp_path, capsys):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{cut")
    with pytest.raises(InputError, match="damaged"):
        load_apgem(tmp_path / "cut.safetensors")
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(InputError, match="damaged, or"):
        load_apgem(tmp_path / "text.pt")
    assert main(["convert-weights", "--checkpoint", str(tmp_path / "none.pt"), "--output", str(tmp_path / "o")]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


def test_a_whitening_that_is_not_there_is_named_with_those_that_are(checkpoint):
    with pytest.raises(InputError, match="no whitening 'Oxford'; there are: Landmarks_clean"):
        read_published(checkpoint[0], "Oxford")
    assert read_published(checkpoint[0], None).pca is None


def test_several_scales_average_the_descriptors_of_each():
    torch.manual_seed(0)
    model = ApGem(ApGemConfig(architecture="resnet18", dim=8)).eval()
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    half = torch.nn.functional.interpolate(image, scale_factor=0.5, mode="bilinear", antialias=True)
    with torch.no_grad():
        both = model(image, (1.0, 0.5))
        expected = torch.nn.functional.normalize(model(image) + model(half), dim=1)
    assert torch.allclose(both, expected, atol=1e-6)


def test_generalised_mean_of_one_power_is_the_average_and_of_a_high_one_the_maximum():
    features = torch.rand(2, 5, 4, 6, dtype=torch.float32) + 0.1
    assert torch.allclose(Gem(1.0)(features), features.mean(dim=(2, 3)), atol=1e-6)
    assert torch.allclose(Gem(150.0)(features), features.amax(dim=(2, 3)), rtol=0.05)


def test_whitening_of_half_the_variance_gives_unit_variance():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 4, generator=generator) * torch.tensor([3.0, 2.0, 1.0, 0.5]) + 7
    whitening = Whitening(4, 4, power=0.5)
    whitening.mean, whitening.explained_variance = x.mean(dim=0), x.var(dim=0)
    assert torch.allclose(whitening(x).var(dim=0), torch.ones(4), atol=1e-4)


def test_weights_that_are_written_are_read_back(tmp_path):
    model = ApGem(ApGemConfig(architecture="resnet18", dim=8)).eval()
    save_apgem(model, tmp_path / "a.safetensors")
    again = load_apgem(tmp_path / "a.safetensors")
    assert again.config == model.config
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


def test_without_timm_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    apgem.import_timm.cache_clear()
    try:
        with pytest.raises(InputError, match=r"needs timm and torchvision .*dust3r_sfm\[retrieval\]"):
            ApGem(ApGemConfig(architecture="resnet18"))
    finally:
        apgem.import_timm.cache_clear()
