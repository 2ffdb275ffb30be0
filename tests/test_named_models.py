"""Models by name, and what trains a step of any of them."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tdeconv.named_models import load_model, random_input, some_loss, to_layout


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a module ``nets``, and one that cannot be imported."""
    code = """
        from torch import nn

        class Net(nn.Linear):
            def __init__(self):
                super().__init__(3, 2)

        def pixels():
            return nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU())

        def sized(width):
            return nn.Linear(width, 2)

        def broken():
            return nn.Linear("three", 2)

        def number():
            return 3
    """
    (tmp_path / "nets.py").write_text(textwrap.dedent(code))
    (tmp_path / "needy.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)


@pytest.fixture
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a download was asked for: {args}")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.mark.usefixtures("no_downloads")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("squeezenet1_1", "SqueezeNet"),
        ("torchvision:squeezenet1_1", "SqueezeNet"),
        ("torchvision:lraspp_mobilenet_v3_large", "LRASPP"),  # its backbone has weights of its own
        ("timm:resnet10t", "ResNet"),
        ("timm:resnet10t.c3_in1k", "ResNet"),
    ],
)
def test_a_librarys_model_by_name(name: str, kind: str) -> None:
    model = load_model(name)
    assert type(model).__name__ == kind
    assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.usefixtures("nets")
def test_options_are_the_models() -> None:
    assert load_model("squeezenet1_1", num_classes=7).num_classes == 7
    assert load_model("timm:resnet10t", num_classes=7).fc.out_features == 7
    assert load_model("nets:sized", width=7).in_features == 7
    with pytest.raises(ValueError, match="'nets:pixels' cannot be made: the function must take width: "):
        load_model("nets:pixels", width=7)


@pytest.mark.parametrize(
    ("name", "refusal", "more"),
    [
        (
            "resnet81",
            "torchvision has no such model; similar: ",
            ["resnet18", "; give NAME or torchvision:NAME, timm:"],
        ),
        ("torchvision:resnet81", "torchvision has no such model; similar: ", ["resnet18"]),
        ("torchvision:", "torchvision has no such model", []),
        ("timm:efficientnet_b00", "timm has no such model; similar: ", ["efficientnet_b0"]),
        ("timm:hf-hub:someone/something", "timm has no such model", []),  # nothing is looked for on the network
    ],
)
def test_an_unknown_name_is_refused_with_similar_ones(name: str, refusal: str, more: list[str]) -> None:
    with pytest.raises(ValueError, match="no such model") as caught:
        load_model(name, argument="--model")
    message = str(caught.value)
    assert message.startswith(f"--model {name!r}: {refusal}")
    assert all(part in message for part in more)


def test_an_unknown_tag_of_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MODEL 'timm:resnet18.nobodys' cannot be made: Invalid pretrained tag"):
        load_model("timm:resnet18.nobodys")


@pytest.mark.parametrize(("name", "module"), [("timm:resnet18", "timm"), ("resnet18", "torchvision")])
def test_a_missing_library_is_not_an_unknown_model(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it then raises
    with pytest.raises(ModuleNotFoundError) as caught:
        load_model(name)
    assert caught.value.name == module


@pytest.mark.usefixtures("nets")
def test_a_function_or_class_of_the_working_directory() -> None:
    assert isinstance(load_model("nets:pixels"), nn.Sequential)
    assert isinstance(load_model("nets:Net"), nn.Linear)


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nets:pixel", "MODEL 'nets:pixel' cannot be made: module 'nets' has no function 'pixel'; similar: pixels"),
        ("nowhere:model", "MODEL 'nowhere:model' cannot be made: No module named 'nowhere'; give NAME or torchvision:"),
        ("needy:model", "MODEL 'needy:model' cannot be made: No module named 'nothing_of_this_name'"),
        (":model", "MODEL ':model' cannot be made: Empty module name"),
        ("nets:", "MODEL 'nets:' cannot be made: module 'nets' has no function ''"),
        ("nets:sized", "cannot be made: the function must do without arguments: missing a required argument: 'width'"),
        ("nets:number", "MODEL 'nets:number' gave int, not a torch.nn.Module"),
    ],
)
def test_what_makes_no_model_is_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError, match="MODEL") as caught:
        load_model(name)
    assert text in str(caught.value)
    assert ("give NAME" in str(caught.value)) == ("give NAME" in text or name == ":model")


@pytest.mark.usefixtures("nets")
def test_an_error_inside_the_function_is_its_authors() -> None:
    with pytest.raises(TypeError):
        load_model("nets:broken")


def test_images_and_weights_take_the_layout() -> None:
    device = torch.device("cpu")
    model = nn.Conv2d(4, 5, 3)
    for layout, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        assert random_input((2, 4, 8, 9), layout, device).is_contiguous(memory_format=memory_format)
        assert to_layout(model, layout).weight.is_contiguous(memory_format=memory_format)
    assert random_input((2, 4), "channels_last", device).shape == (2, 4)


@pytest.mark.exact
def test_the_loss_takes_every_differentiable_tensor_of_any_output() -> None:
    x, y, still = torch.full((2,), 3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True), torch.tensor(9.0)
    assert some_loss(x) == 9
    assert some_loss({"a": x, "b": [y, (still, None)]}) == 9 + 4
    with pytest.raises(ValueError, match="the model's output, a list, holds no differentiable tensor"):
        some_loss([still, 3])
