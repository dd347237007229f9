"""Noise where modules run as graphs: it acts, or is refused, or is missed aloud."""

import copy
import importlib
import itertools
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao import quantization
from torch.fx.experimental.proxy_tensor import make_fx

import selfensemble as rse
from selfensemble.fast.optimize import optimize
from selfensemble.noise import operators
from selfensemble.noise.graphs import AfterImport
from selfensemble.noise.injection import make_static_, set_levels_
from selfensemble.noise.learned import learn_noise_

from .acting import Forward, compiled, convolutions, layers_that_draw, rules

# Of torch's own compiler, exporter, scripting and quantisation.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


def around(model: nn.Module) -> Forward:
    return lambda inputs: model(inputs) + 1


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def part_in_place(model: nn.Module) -> nn.Module:
    model.get_submodule("2").compile(backend="eager")
    return model


def part_wrapped(model: nn.Module) -> nn.Module:
    model.add_module("2", compiled(model.get_submodule("2")))
    return model


COMPILED: dict[str, Callable[[nn.Module], Any]] = {
    "wrapped": compiled,
    "function around it": lambda model: compiled(around(model)),
    "whole graph": lambda model: compiled(model, fullgraph=True),
    "in place": in_place,
    "a part in place": part_in_place,
    "a part wrapped": part_wrapped,
}


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("warm", [True, False])
def test_noise_enters_and_leaves_compiled_networks(
    net: nn.Sequential, images: Tensor, how: str, warm: bool
) -> None:
    """Whatever ran before: the graphs that were recorded then know nothing of hooks that come or go."""
    forward = COMPILED[how](net)
    if warm:
        assert layers_that_draw(forward, images) == 0
    rse.inject_noise_(net, example_inputs=images)
    assert layers_that_draw(forward, images) == convolutions(net) == len(rse.noise_layers(net)) == 2
    with rse.noise_disabled(net):
        assert layers_that_draw(forward, images) == 0
    rse.remove_noise_(net)
    assert layers_that_draw(forward, images) == 0
    rse.inject_noise_(net)
    assert layers_that_draw(forward, images) == 2
    make_static_(net)
    assert layers_that_draw(forward, images) == 0
    assert not any("gaussian_noise" in name for name, _ in net.named_modules())


def test_a_compiled_network_is_taken_as_it_is(net: nn.Sequential, images: Tensor) -> None:
    """`OptimizedModule` itself into `inject_noise_` and `SelfEnsemble`, warm."""
    wrapper = compiled(net)
    layers_that_draw(wrapper, images)
    rse.inject_noise_(wrapper, rse.NoiseConfig(0.3, 0.2), example_inputs=images)
    assert layers_that_draw(wrapper, images) == layers_that_draw(net, images) == 2
    assert [layer.std for layer in rse.noise_layers(wrapper).values()] == [0.3, 0.2]
    assert rules(wrapper, images) == {}
    rse.remove_noise_(wrapper)
    layers_that_draw(wrapper, images)
    ensemble = rse.SelfEnsemble(wrapper)
    assert layers_that_draw(ensemble.draw_logits, images) == 2
    assert (ensemble.predict(images).spread > 0).all()


@pytest.mark.parametrize("how", COMPILED)
def test_a_network_and_its_noisy_copy_have_graphs_of_their_own(
    net: nn.Sequential, images: Tensor, how: str
) -> None:
    """Both have the same code, by which torch keeps graphs."""
    noisy = rse.inject_noise_(copy.deepcopy(net))
    static, defended = COMPILED[how](net), COMPILED[how](noisy)
    for _ in range(2):
        assert layers_that_draw(static, images) == 0
        assert layers_that_draw(defended, images) == 2


def test_something_is_done_when_a_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the compiler is told to mind hooks without importing it; if it is imported, it has been told."""
    (tmp_path / "imported_later.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    called: list[int] = []
    finder: Any = AfterImport("imported_later", lambda module: called.append(module.value))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert importlib.import_module("imported_later").value == 1
    importlib.import_module("imported_later")
    importlib.reload(importlib.import_module("imported_later"))
    assert called == [1]
    assert finder not in sys.meta_path
    assert importlib.import_module("torch._dynamo.config").skip_nnmodule_hook_guards is False


def test_the_first_convolution_of_a_warm_network_is_found() -> None:
    class OutOfOrder(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self[0](self[1](inputs))
            return outputs

    net, images = OutOfOrder(nn.Conv2d(4, 5, 1), nn.Conv2d(3, 4, 1)).eval(), torch.rand(2, 3, 4, 4)
    wrapper = compiled(net)
    layers_that_draw(wrapper, images)
    rse.inject_noise_(wrapper, example_inputs=images)
    assert [rse.noise_layers(net)[name].std for name in "01"] == [0.1, 0.2]


def test_levels_change_in_warm_graphs_any_number_of_times(net: nn.Sequential, images: Tensor) -> None:
    """A graph that is whole may not be recorded anew more than 8 times, which is an error of torch's."""
    rse.inject_noise_(net)
    forward = compiled(net, fullgraph=True)
    for level in range(9):
        set_levels_(net, rse.NoiseConfig(0.1 * level, 0.1 * level))
        assert layers_that_draw(forward, images) == (2 if level else 0)
    learn_noise_(net, "layer")
    assert layers_that_draw(forward, images) == 2
    clean = net[0](images)
    with rse.noise_draw(1):
        assert torch.equal(forward(images), forward(images)) is False
        assert clean.shape == net[0](images).shape


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("how", ["wrapped", "in place", "a part in place", "a part wrapped"])
def test_copies_of_compiled_networks(
    net: nn.Sequential, images: Tensor, how: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    rse.inject_noise_(net)
    model = COMPILED[how](net)
    assert layers_that_draw(model, images) == 2
    twin = copied(model)
    assert layers_that_draw(twin, images) == len(rse.noise_layers(twin)) == 2
    assert rules(twin, images) == {}
    rse.remove_noise_(twin)
    assert (layers_that_draw(twin, images), layers_that_draw(model, images)) == (0, 2)
    plain = copied(twin)
    layers_that_draw(plain, images)
    rse.inject_noise_(plain)
    assert (layers_that_draw(plain, images), layers_that_draw(twin, images)) == (2, 0)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_compiled_ensembles_are_optimised_and_certified(
    net: nn.Sequential, images: Tensor, precision: Any
) -> None:
    """Both put hooks on modules, which a graph would ignore, or keep after they are gone."""
    eager = rse.SelfEnsemble(copy.deepcopy(net)).eval()
    ensemble = rse.SelfEnsemble(part_wrapped(net)).eval()
    ensemble.model = compiled(ensemble.model)
    expected = eager.predict_proba(images, seed=1)
    torch.testing.assert_close(ensemble.predict_proba(images, seed=1), expected)
    fast, plain = (optimize(each, images, precision) for each in (ensemble, eager))
    torch.testing.assert_close(fast.predict_proba(images, seed=1), plain.predict_proba(images, seed=1))
    assert layers_that_draw(fast.draw_logits, images) == 2
    rse.certify(ensemble, images[:1], n0=4, n=8)
    torch.testing.assert_close(ensemble.predict_proba(images, seed=1), expected)


def scripted(model: nn.Module, _: Tensor) -> nn.Module:
    return torch.jit.script(model)


def traced(model: nn.Module, inputs: Tensor) -> nn.Module:
    module: nn.Module = torch.jit.trace(model, inputs, check_trace=False)
    return module


def frozen(model: nn.Module, inputs: Tensor) -> nn.Module:
    module: Any = traced(model, inputs)
    result: nn.Module = torch.jit.freeze(module)
    return result


def exported(model: nn.Module, inputs: Tensor) -> nn.Module:
    return torch.export.export(model, (inputs,)).module()


def decomposed(model: nn.Module, inputs: Tensor) -> nn.Module:
    module: nn.Module = torch.export.export(model, (inputs,)).run_decompositions().module()
    return module


def unflattened(model: nn.Module, inputs: Tensor) -> nn.Module:
    return torch.export.unflatten(torch.export.export(model, (inputs,)))


def proxied(model: nn.Module, inputs: Tensor) -> nn.Module:
    return make_fx(model)(inputs)


def quantised(model: nn.Module, inputs: Tensor) -> nn.Module:
    wrapped: Any = quantization.QuantWrapper(model)
    wrapped.qconfig = quantization.get_default_qconfig("fbgemm")
    prepared = quantization.prepare(wrapped)
    prepared(inputs)
    return quantization.convert(prepared)  # type: ignore[no-any-return]


CLOSED: dict[str, tuple[str, Callable[[nn.Module, Tensor], nn.Module]]] = {
    "scripted": ("torchscript", scripted),
    "traced": ("torchscript", traced),
    "frozen": ("torchscript", frozen),
    "exported": ("exported", exported),
    "decomposed": ("exported", decomposed),
    "unflattened": ("exported", unflattened),
    "make_fx": ("exported", proxied),
    "quantised": ("quantized", quantised),
}


@pytest.mark.parametrize("how", CLOSED)
def test_what_hooks_cannot_reach_is_refused(net: nn.Sequential, images: Tensor, how: str) -> None:
    """The whole network, and a part of it beside convolutions that could have noise."""
    kind, close = CLOSED[how]
    stem, rest = net[:2], net[2:].eval()
    closed = close(rest, stem(images).detach())
    mixed = nn.Sequential(stem, closed)
    for model, name in ((closed, ""), (mixed, "1")):
        with pytest.raises(ValueError, match="original network"):
            rse.inject_noise_(model)
        with pytest.raises(ValueError, match="original network"):
            rse.SelfEnsemble(model)
        assert rse.noise_layers(model) == {}
        assert not any(module._forward_pre_hooks for module in stem.modules())
        inputs = images if name else stem(images).detach()
        assert all(where.startswith(name) for where in rules(model, inputs)[kind])
    with pytest.raises(ValueError, match="original network"):
        rse.inject_noise_(mixed, filter_fn=lambda module, fqn: isinstance(module, nn.Linear))
    if kind == "exported" and how != "unflattened":  # in front of the whole part noise can act
        chosen = rse.inject_noise_(nn.Sequential(stem, closed), filter_fn=lambda module, fqn: fqn == "1")
        assert layers_that_draw(chosen, images) == 1
        rse.remove_noise_(chosen)
    # Left out by its name, as a part of any network may be.
    rse.inject_noise_(mixed, filter_fn=lambda module, fqn: fqn == "0.0")
    assert layers_that_draw(mixed, images) == 1


def test_closed_parts_without_such_layers_are_no_matter(net: nn.Sequential, images: Tensor) -> None:
    net[1] = torch.jit.script(nn.ReLU())
    dynamic = quantization.quantize_dynamic(net, {nn.Linear})
    rse.inject_noise_(dynamic)
    assert layers_that_draw(dynamic, images) == 2
    assert rules(dynamic, images) == {}
    with pytest.raises(ValueError, match="5 is a quantised"):
        rse.inject_noise_(rse.remove_noise_(dynamic), filter_fn=lambda each, fqn: isinstance(each, nn.Linear))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["traced", "frozen", "exported", "decomposed", "unflattened", "make_fx"])
def test_graphs_that_are_recorded_with_noise_draw_it_afresh(
    net: nn.Sequential, images: Tensor, how: str, dtype: torch.dtype
) -> None:
    """As an operator, whose numbers are neither constants nor of torch's global generator; and it is seen."""
    rse.inject_noise_(net.to(dtype))
    images = images.to(dtype)
    graph = CLOSED[how][1](net, images)
    assert layers_that_draw(graph, images) == 2
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        outputs.append(graph(images))
    assert not torch.equal(*outputs)
    with rse.noise_draw(1):
        expected = net(images)
    with rse.noise_draw(1):
        torch.testing.assert_close(graph(images), expected)
    assert "unlisted-noise" in rules(graph, images)


@pytest.mark.parametrize("how", ["traced", "exported", "make_fx"])
def test_graphs_of_another_process_take_no_orders_of_this_one(
    net: nn.Sequential, images: Tensor, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process numbers its calls; nothing else of another process is known here, as in a fresh one."""

    def in_a_new_process(model: nn.Module) -> nn.Module:
        monkeypatch.setattr(operators, "_calls", itertools.count())
        monkeypatch.setattr(operators, "_layer_of_call", {})
        return CLOSED[how][1](model, images)

    loaded = in_a_new_process(rse.inject_noise_(copy.deepcopy(net)))
    rse.inject_noise_(net)
    ours = in_a_new_process(net)
    with rse.noise_disabled(net):
        assert torch.equal(ours(images), ours(images))
        assert not torch.equal(loaded(images), loaded(images))


def test_scripting_noise_is_refused_by_torch(net: nn.Sequential) -> None:
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(rse.inject_noise_(net))


@pytest.mark.parametrize("before", [True, False])
def test_fx_keeps_modules_and_their_noise(net: nn.Sequential, images: Tensor, before: bool) -> None:
    graph: nn.Module = fx.symbolic_trace(net if before else rse.inject_noise_(net))
    if before:
        rse.inject_noise_(graph)
    for model in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert layers_that_draw(model, images) == len(rse.noise_layers(model)) == 2
        assert rules(model, images) == {}


def test_quantisation_aware_training(net: nn.Sequential, images: Tensor) -> None:
    """Put in after `prepare_qat` noise acts; put in before, what torch makes of it is an error."""
    settings: Any = net
    settings.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    prepared = quantization.prepare_qat(net.train()).eval()
    prepared(images)
    rse.inject_noise_(prepared)
    assert layers_that_draw(prepared, images) == convolutions(prepared) == 2
    late = quantization.prepare_qat(rse.inject_noise_(net.train())).eval()
    with pytest.raises(RuntimeError, match="remove_noise_ before"):
        late(images)
    assert {"0", "2"} <= set(rules(late, images)["lost-noise"])
    rse.inject_noise_(rse.remove_noise_(late))
    assert layers_that_draw(late, images) == 2


def test_layers_that_were_fused_after_injection_are_refused(net: nn.Sequential, images: Tensor) -> None:
    fused = quantization.fuse_modules(rse.inject_noise_(net), [["0", "1"]])
    with pytest.raises(RuntimeError, match="remove_noise_ before"):
        fused(images)
    rse.inject_noise_(rse.remove_noise_(fused))
    assert layers_that_draw(fused, images) == convolutions(fused) == 2


def test_noise_that_a_graph_ignores_is_found(
    net: nn.Sequential, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neither torch nor injection minds hooks: a setting of torch that anybody can put back."""
    forward = compiled(net)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        layers_that_draw(forward, images)
        monkeypatch.setattr("selfensemble.noise.injection.forget_graphs", lambda: None)
        ensemble = rse.SelfEnsemble(forward)
        assert ensemble.is_random
        assert layers_that_draw(ensemble.draw_logits, images) == 0
        issues = [issue for issue in rse.validate(forward, images) if issue.rule == "silent-noise"]
        assert [issue.where for issue in issues] == ["_orig_mod.0", "_orig_mod.2"]
        assert {issue.severity for issue in issues} == {"error"}
        assert layers_that_draw(forward, images) == 0  # looking changes nothing
        torch.compiler.reset()  # the cure that it names
        assert rules(forward, images) == {}
        assert layers_that_draw(forward, images) == 2


def test_noise_whose_hook_is_gone_or_gone_around_is_found(net: nn.Sequential, images: Tensor) -> None:
    rse.inject_noise_(net)
    net[2]._forward_pre_hooks.clear()
    assert layers_that_draw(net, images) == 1
    assert rules(net, images) == {"silent-noise": ["2"]}
    rse.inject_noise_(rse.remove_noise_(net))

    class Around(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            for module in self:
                inputs = module.forward(inputs)  # not by __call__
            return inputs

    model = Around(*net)
    assert rules(model, images).keys() >= {"functional-convolution", "not-called"}


def test_noise_without_effect_is_reported(net: nn.Sequential, images: Tensor) -> None:
    rse.inject_noise_(net)
    nn.init.zeros_(net[5].weight)  # type: ignore[arg-type]
    assert rules(net, images) == {"noise-without-effect": [""]}
    with rse.noise_disabled(net):
        assert rules(net, images) == {}
    with rse.noise_draw(seed=1):  # of the caller, not the network's
        nn.init.normal_(net[5].weight)  # type: ignore[arg-type]
        assert rules(net, images) == {}


def test_looking_leaves_compiled_networks_alone(net: nn.Sequential, images: Tensor) -> None:
    """`validate` compiles nothing, and no graph keeps its hooks."""
    recorded: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        recorded.append(graph)
        return graph.forward

    forward: Any = torch.compile(net, backend=backend)
    assert rules(forward, images) == {}
    assert not recorded
    rse.inject_noise_(net)
    assert layers_that_draw(forward, images) == 2
    before = len(recorded)
    assert rules(forward, images) == {}
    assert layers_that_draw(forward, images) == 2
    assert len(recorded) == before
