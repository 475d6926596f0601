"""Networks by name: torchvision's, and a callable in a file."""

import pytest
import torch
import torchvision
from torch import nn

from models import build_model
from models.any_network import NetworkError, is_name_of_network, load_network, network_file
from models.layer_groups import layer_groups

SHAPE = {"channels": 1, "classes": 3, "image_size": 8}
FILE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, channels, classes, width=4):
        super().__init__(nn.Conv2d(channels, width, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(36 * width, classes))

def make(channels, classes, image_size, **options):
    return Net(channels, classes, **options)

def number(**arguments):
    return 3

def fails(**arguments):
    raise RuntimeError("first line\\nno such thing as a last line")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def load(name, **options):
    return load_network(str(name), 1, 3, 8, options)


def test_names():
    assert is_name_of_network("torchvision:resnet18")
    assert is_name_of_network("nets/mine.py:make")
    assert not is_name_of_network("resnet18")
    assert not is_name_of_network("mine:make")
    assert network_file("torchvision:resnet18") is None
    assert str(network_file("a:b/mine.py:make")) == "a:b/mine.py"


@pytest.mark.parametrize("callable_", ["make", "Net"])
def test_a_callable_in_a_file(file, callable_):
    network = load(f"{file}:{callable_}", width=5)
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert network[0].out_channels == 5


def test_an_edited_file_is_another_network(file):
    assert len(load(f"{file}:make")) == 4
    file.write_text(FILE.replace("nn.ReLU(), ", "nn.ReLU(), nn.Identity(), "))
    assert len(load(f"{file}:make")) == 5


def test_the_weights_depend_on_the_seed_alone(file):
    one, same, other = (
        build_model(f"{file}:make", **SHAPE, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_the_proof_changes_no_weight_and_no_random_number(file):
    before = torch.get_rng_state()
    proven, plain = (
        build_model(f"{file}:make", **SHAPE, seed=1, proof=proof) for proof in (True, False)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in proven.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/mime.py:make", "mime.py: no such file; did you mean mine.py?"),
        ("{file}:mak", "mine.py: has no callable 'mak'; did you mean make?"),
        ("{file}:x", "has no callable 'x'; it has Net, make, number, fails"),
        ("{file}:number", "mine.py:number: returns an object of type int, not a torch.nn.Module"),
        (
            "{file}:fails",
            "called with channels=1, classes=3, image_size=8: RuntimeError: "
            "no such thing as a last line",
        ),
        ("torchvision:resnet19", "has no such classifier; did you mean resnet18?"),
        ("torchvision:zzz", "torchvision has no such classifier; there are alexnet, "),
    ],
)
def test_what_cannot_be_loaded_gets_one_line(file, name, message):
    with pytest.raises(NetworkError) as error:
        load(name.format(folder=file.parent, file=file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_that_the_callable_does_not_take(file):
    with pytest.raises(NetworkError, match="unexpected keyword argument 'depth'"):
        load(f"{file}:make", depth=3)
    with pytest.raises(NetworkError, match="unexpected keyword argument 'depth'"):
        load("torchvision:resnet18", depth=3)


def test_a_file_that_cannot_be_run(file):
    file.write_text("import torch\n1 / 0\n")
    with pytest.raises(NetworkError, match=r"mine.py: cannot be run: ZeroDivisionError: div"):
        load(f"{file}:make")
    file.write_text("def make(:\n")
    with pytest.raises(NetworkError, match=r"mine.py: cannot be run: SyntaxError"):
        load(f"{file}:make")


def test_torchvision_with_three_channels_is_torchvision_itself():
    torch.manual_seed(3)
    found = load_network("torchvision:shufflenet_v2_x0_5", 3, 7, 32, {})
    torch.manual_seed(3)
    expected = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=7)
    for key, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[key])


@pytest.mark.parametrize("channels", [1, 4])
def test_torchvisions_first_convolution_is_made_for_the_images(channels):
    network = load_network("torchvision:resnet18", channels, 5, 32, {})
    new, old = network.conv1, torchvision.models.resnet18().conv1
    assert (new.in_channels, new.out_channels, new.bias) == (channels, 64, None)
    assert (new.kernel_size, new.stride, new.padding) == (old.kernel_size, old.stride, old.padding)
    # He initialization by the number of outputs, as torchvision's.
    assert new.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.1)
    assert network.fc.out_features == 5


def test_torchvision_options_are_passed_on():
    network = load_network("torchvision:googlenet", 3, 5, 32, {"aux_logits": False})
    assert network.aux1 is None
    with pytest.raises(NetworkError, match="its output is a GoogLeNetOutputs, not a tensor"):
        build_model("torchvision:googlenet", channels=3, classes=5, image_size=32, seed=0)


def test_layers_of_torchvisions_resnet18():
    names = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    model = build_model("torchvision:resnet18", **SHAPE | {"image_size": 32}, seed=0, proof=False)
    assert [group.name for group in layer_groups(model)] == names
    assert layer_groups(model)[0].prefixes == ("conv1", "bn1")
    assert isinstance(model.bn1, nn.BatchNorm2d)
