"""Modules that are wrapped, parametrised or replaced, before noise came and after."""

import copy
import importlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import selfensemble as rse
from selfensemble.noise.resize_pad import ResizePadConfig, ResizePadNetwork

from .acting import compiled, convolutions, layers_that_draw, rules

# Of torch's own compiler and wrappers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


class LowRank(nn.Module):
    """An adapter in place of a convolution, as peft's: `base(x) + B(A(x))`."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base
        size, stride, padding = base.kernel_size, base.stride, base.padding
        down = nn.Conv2d(base.in_channels, 2, size, stride, padding, bias=False)  # type: ignore[arg-type]
        up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})

    def forward(self, inputs: Tensor) -> Tensor:
        moved: Tensor = self.lora_B["default"](self.lora_A["default"](inputs))
        output: Tensor = self.base_layer(inputs)
        return output + moved


@pytest.mark.parametrize("warm", [True, False])
def test_adapters(net: nn.Sequential, images: Tensor, warm: bool) -> None:
    forward = compiled(net) if warm else net
    layers_that_draw(forward, images)
    rse.inject_noise_(net)
    net[2] = LowRank(net[2])  # type: ignore[arg-type]
    assert layers_that_draw(forward, images) == 2
    # The other path of the adapter reads what the noise of the base layer is not in.
    assert rules(net, images)["partly-noisy"] == ["2"]
    rse.inject_noise_(rse.remove_noise_(net))
    assert convolutions(net) == 4
    assert list(rse.noise_layers(net)) == ["0", "2"]  # once, in front of both paths
    assert layers_that_draw(forward, images) == 2
    assert rules(net, images) == {}
    rse.remove_noise_(net)
    net[2] = net[2].base_layer  # type: ignore[assignment]
    rse.inject_noise_(net)
    assert layers_that_draw(forward, images) == 2


def remove_parametrizations(module: nn.Module) -> None:
    parametrize.remove_parametrizations(module, "weight")


PARAMETRIZATIONS: dict[str, tuple[Callable[[Any], object], Callable[[Any], object]]] = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "parametrized weight_norm": (parametrizations.weight_norm, remove_parametrizations),
    "parametrized spectral_norm": (parametrizations.spectral_norm, remove_parametrizations),
    "parametrized": (
        lambda module: parametrize.register_parametrization(module, "weight", nn.Tanh()),
        remove_parametrizations,
    ),
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("before", [True, False])
def test_parametrizations_come_and_go(net: nn.Sequential, images: Tensor, name: str, before: bool) -> None:
    add, remove = PARAMETRIZATIONS[name]
    if before:
        add(net[2])
    forward = compiled(net)
    layers_that_draw(forward, images)
    rse.inject_noise_(net)
    if not before:
        add(net[2])
    layers_that_draw(net, images)
    for model in (net, copy.deepcopy(net)):
        assert layers_that_draw(model, images) == 2
        assert rules(model, images) == {}
    assert layers_that_draw(forward, images) == 2
    copy.deepcopy(net)  # which looking at the network must not prevent
    remove(net[2])
    assert layers_that_draw(net, images) == layers_that_draw(forward, images) == 2
    assert rules(net, images) == {}
    rse.remove_noise_(net)
    assert layers_that_draw(net, images) == 0
    assert not net[2]._forward_pre_hooks


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fsdp(model: nn.Module, each: bool = False) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({nn.Conv2d}) if each else None
    cpu = torch.device("cpu")
    wrapped: nn.Module = FullyShardedDataParallel(model, device_id=cpu, auto_wrap_policy=policy)
    return wrapped


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for module in (model.get_submodule("0"), model.get_submodule("2"), model):
        fully_shard(module, mesh=mesh)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "FSDP": fsdp,
    "FSDP of each": lambda model: fsdp(model, each=True),
    "fully_shard": fully_sharded,
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("before", [True, False])
def test_wrappers(net: nn.Sequential, images: Tensor, name: str, before: bool) -> None:
    if not before:
        rse.inject_noise_(net)
    model = WRAPPERS[name](net)
    if before:
        rse.inject_noise_(model)
    assert layers_that_draw(model, images) == len(rse.noise_layers(model)) == 2
    assert rules(model, images) == {}
    rse.remove_noise_(model)
    assert layers_that_draw(model, images) == 0
    assert not any(module.__dict__.get("selfensemble_noise") for module in model.modules())


def test_data_parallel_on_several_devices_is_refused(
    net: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes a replica for each device and runs them in threads, where no call is known; here on a CPU."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [tensors for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    resizing = ResizePadNetwork(net, ResizePadConfig(smallest=7, largest=8))
    rse.inject_noise_(net)
    for model in (net, resizing):
        for context in (rse.noise_draw(1), rse.noise_draw(sampling="shared"), rse.noise_disabled(net)):
            with pytest.raises(ValueError, match=r"own.*DistributedDataParallel, or give it one"), context:
                module.replicate(model, [0, 1])
        assert len(module.replicate(model, [0, 1])) == 2  # a loop that trains wants noise, and no more
    rse.remove_noise_(net)
    with pytest.raises(ValueError, match="its own threads"), rse.noise_draw(1):
        module.replicate(resizing, [0, 1])
    with rse.noise_draw(1):
        assert len(module.replicate(net, [0, 1])) == 2


@pytest.mark.parametrize("other", [nn.Conv2d(8, 6, 3), nn.Sequential(nn.Conv2d(8, 6, 3)), nn.MaxPool2d(3)])
def test_modules_that_were_replaced_are_missed(net: nn.Sequential, images: Tensor, other: nn.Module) -> None:
    if isinstance(other, nn.MaxPool2d):
        net[5] = nn.Linear(8, 5)
    rse.inject_noise_(net)
    twin = copy.deepcopy(net)
    net[2] = other.eval()
    (issue,) = [issue for issue in rse.validate(net, images) if issue.rule == "lost-noise"]
    assert (issue.where, issue.severity) == ("2", "error")
    assert layers_that_draw(net, images) == 1
    net[0] = nn.Conv2d(3, 8, 3, padding=1)
    for model in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert rules(model, images)["lost-noise"] == ["0", "2"]
    if not isinstance(other, nn.MaxPool2d):
        assert rules(twin, images) == {}
    # Taken out on purpose, of a part or of the whole, nothing is missed.
    rse.remove_noise_(twin[0])
    assert "lost-noise" not in rules(twin, images)
    rse.inject_noise_(rse.remove_noise_(net))
    assert "lost-noise" not in rules(net, images)
