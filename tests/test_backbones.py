import pytest
import torch
from torch import nn

from clframe.backbones import cnn_small, from_torchvision, mlp, mlp_100, resnet18, resnet32
from clframe.errors import DataError, UsageError
from clframe.model import Backbone, IncrementalNet
from clframe.options import options_of, validated

VARIANT = "shufflenet_v2_x0_5"  # torchvision's smallest


def parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("factory", "shape", "options", "width", "count"),
    [
        (mlp, (1, 28, 28), {}, 400, 784 * 400 + 400 + 400 * 400 + 400),
        (mlp, (1, 8, 8), {"hidden": [7]}, 7, 64 * 7 + 7),
        (mlp, (5,), {"hidden": [4, 3]}, 3, 5 * 4 + 4 + 4 * 3 + 3),
        (mlp_100, (1, 8, 8), {}, 100, 64 * 100 + 100 + 100 * 100 + 100),
        (cnn_small, (1, 8, 8), {}, 64, 9 * (1 * 32 + 32 * 32 + 32 * 64) + 2 * (32 + 32 + 64)),
        (cnn_small, (1, 28, 28), {}, 64, 9 * (1 * 32 + 32 * 32 + 32 * 64) + 2 * (32 + 32 + 64)),
        (resnet32, (3, 32, 32), {}, 64, 463_504),
        (resnet32, (1, 8, 8), {}, 64, 463_504 - 2 * 9 * 16),
        (resnet18, (3, 32, 32), {}, 512, 11_173_962 - 5_130),
        (resnet18, (3, 64, 64), {"form": "imagenet"}, 512, 11_689_512 - 513_000),
    ],
)
def test_each_backbone_has_its_width_and_number_of_parameters(factory, shape, options, width, count):
    net = factory(shape, **options)
    x = torch.randn(2, *shape)
    assert isinstance(net, nn.Module)
    assert isinstance(net, Backbone)
    assert net.width == width
    assert net.features(x).shape == (2, width)
    net.eval()
    assert torch.equal(net(x), net.features(x))
    assert parameters(net) == count


@pytest.mark.parametrize(
    ("net", "classes", "count"),
    [
        (resnet32((3, 32, 32)), 10, 464_154),  # 0.46 M in table 6 of the paper
        (resnet18((3, 32, 32)), 10, 11_173_962),
        (resnet18((3, 224, 224), form="imagenet"), 1000, 11_689_512),
    ],
)
def test_residual_networks_have_their_published_size(net, classes, count):
    assert parameters(IncrementalNet(net, blocks=[classes])) == count


def test_the_mlp_is_the_formula():
    net = mlp((1, 2, 2), hidden=[3, 2])
    (first, second), x = [m for m in net.modules() if isinstance(m, nn.Linear)], torch.randn(5, 1, 2, 2)
    expected = ((x.reshape(5, 4) @ first.weight.T + first.bias).relu() @ second.weight.T + second.bias).relu()
    torch.testing.assert_close(net(x), expected)


def test_an_mlp_without_layers_is_refused():
    with pytest.raises(UsageError, match=r"`model\.hidden` is empty"):
        mlp((4,), hidden=[])


def test_resnet32_is_32_layers_deep_with_shortcuts_that_have_no_parameters():
    net = resnet32((3, 32, 32))
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == 32  # and the head
    assert {m.kernel_size for m in convolutions} == {(3, 3)}


def test_option_a_takes_every_second_pixel_and_pads_with_zero_channels():
    block = resnet32((3, 8, 8)).layer2[0].eval()
    with torch.no_grad():
        block.bn2.weight.zero_()  # only the shortcut is left
    x = torch.rand(2, 16, 8, 8)
    out = block(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == out[:, 24:].abs().sum() == 0


def test_last_relu_is_a_switch_on_the_last_block_alone():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    usual, icarl = resnet32((3, 8, 8)), resnet32((3, 8, 8), last_relu=False)
    icarl.load_state_dict(usual.state_dict())
    last = []
    icarl.layer3[4].register_forward_hook(lambda module, inputs, output: last.append(output))
    features = icarl(x)
    assert features.min() < 0 <= usual(x).min()
    torch.testing.assert_close(usual(x), last[0].relu().mean((2, 3)))
    blocks = [*icarl.layer1, *icarl.layer2, *icarl.layer3]
    assert [isinstance(block.last, nn.ReLU) for block in blocks] == [True] * 14 + [False]


def test_the_imagenet_form_of_resnet18_is_torchvisions_to_the_weight():
    models = pytest.importorskip("torchvision.models")
    theirs, ours = models.resnet18().eval(), resnet18((3, 64, 64), form="imagenet").eval()
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    ours.load_state_dict(state)
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_building_twice_from_one_seed_gives_the_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(resnet32((3, 8, 8)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("factory", [cnn_small, resnet32, resnet18])
def test_a_convolutional_network_refuses_rows_of_a_table(factory):
    with pytest.raises(UsageError, match=r"takes images \[channels, height, width\], .* is \(20,\)"):
        factory((20,))


def test_options_are_documented_and_checked():
    assert [(o.name, bool(o.doc)) for o in options_of(resnet18, skip=("input_shape",))] == [
        ("form", True),
        ("last_relu", True),
    ]
    assert options_of(mlp, skip=("input_shape",))[0].doc == "width of each layer."
    assert options_of(from_torchvision, skip=("input_shape", "variant"))[0].name == "weights"
    assert validated(mlp, {}, "model", skip=("input_shape",)) == {"hidden": [400, 400]}
    with pytest.raises(UsageError, match=r"`model\.form` is 'cifa'"):
        validated(resnet18, {"form": "cifa"}, "model", skip=("input_shape",))
    with pytest.raises(UsageError, match=r"`model\.hidden\.1` is 0"):
        validated(mlp, {"hidden": [5, 0]}, "model", skip=("input_shape",))


# -------------------------------------------------------------------------- torchvision's networks


@pytest.mark.parametrize(
    ("variant", "width"),
    [(VARIANT, 1024), ("mobilenet_v3_small", 1024), ("resnet18", 512)],
)
def test_a_classifier_of_torchvision_loses_its_last_layer(variant, width):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    ours = from_torchvision((3, 64, 64), variant)
    assert ours.width == width
    assert all(module.training for module in ours.modules())
    torch.manual_seed(0)
    theirs = models.get_model(variant).eval()
    x = torch.randn(2, 3, 64, 64)
    last = [module for module in theirs.modules() if isinstance(module, nn.Linear)][-1]
    torch.testing.assert_close(last(ours.eval()(x)), theirs(x))


def test_looking_at_a_network_of_torchvision_moves_no_running_statistics():
    net = from_torchvision((3, 64, 64), VARIANT)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {0}


def test_an_unknown_classifier_of_torchvision_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"torchvision has no classifier `resnet19`\. Did you mean `resnet1"):
        from_torchvision((3, 32, 32), "resnet19")


def test_a_grey_scenario_is_refused_before_anything_is_built():
    with pytest.raises(UsageError, match=r"`torchvision:vgg16` .* 3 channels, .* 1"):
        from_torchvision((1, 28, 28), "vgg16")


def test_networks_without_one_linear_layer_at_the_end_are_refused():
    with pytest.raises(UsageError, match=r"`torchvision:squeezenet1_1` .*linear layer"):
        from_torchvision((3, 64, 64), "squeezenet1_1")


def test_images_of_the_wrong_size_are_refused_in_the_networks_own_words():
    with pytest.raises(UsageError, match=r"`torchvision:alexnet` .*16x16"):
        from_torchvision((3, 16, 16), "alexnet")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder for torchvision's weights."""
    before = torch.hub._hub_dir
    torch.hub.set_dir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    torch.hub._hub_dir = before


def file_of(hub, variant):
    models = pytest.importorskip("torchvision.models")
    return hub / models.get_model_weights(variant).DEFAULT.url.rsplit("/", 1)[-1]


@pytest.mark.parametrize("weights", [True, "DEFAULT", "IMAGENET1K_V1"])
def test_weights_that_are_there_are_loaded(hub, weights):
    models = pytest.importorskip("torchvision.models")
    theirs = models.get_model(VARIANT).eval()
    torch.save(theirs.state_dict(), file_of(hub, VARIANT))
    ours = from_torchvision((3, 64, 64), VARIANT, weights=weights).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs.fc(ours(x)), theirs(x))


def test_weights_that_do_not_exist_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"`model\.weights` is 'IMAGENET1K_V9'.* Did you mean `IMAGENET1K_V1`\?"):
        from_torchvision((3, 64, 64), VARIANT, weights="IMAGENET1K_V9")


def test_no_network_says_which_file_to_put_where(hub, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        from urllib.error import URLError

        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    name = file_of(hub, VARIANT).name
    with pytest.raises(DataError, match=rf"no route to host.*put the file of \S*{name} into {hub}") as caught:
        from_torchvision((3, 64, 64), VARIANT, weights=True)
    assert "\n" not in str(caught.value)
    assert list(hub.iterdir()) == []
    assert capsys.readouterr().out == ""


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a file of weights was run')",))


@pytest.mark.parametrize("damage", ["truncated", "pickle"])
def test_a_damaged_or_dangerous_file_of_weights_is_refused(hub, damage):
    models = pytest.importorskip("torchvision.models")
    file = file_of(hub, VARIANT)
    torch.save(Evil() if damage == "pickle" else models.get_model(VARIANT).state_dict(), file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(DataError, match=f"could not be read from {file}: delete the file"):
        from_torchvision((3, 64, 64), VARIANT, weights=True)
