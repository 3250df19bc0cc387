"""The contract: what every plugin must hold to. A new plugin is tested here by being installed."""

from __future__ import annotations

import inspect
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clframe
from clframe import Plugin, change_domains, checkpoint, hookimpl, registry, state
from clframe.engine import Engine
from clframe.errors import Interrupted, WrongUse
from clframe.hooks import HOOKS
from clframe.options import options_of

NAMES = [name for name in registry.names("plugin") if not registry.plugin_class(name).variants]
# options that make a plugin fit the tiny scenario, where its defaults do not, or take long
SMALL: dict[str, dict[str, Any]] = {
    "always-be-dreaming": {"iterations": 10, "batch_size": 8, "noise": 10, "width": 8},
    "channel-gating": {"classifier_iterations": 10, "size": 12},
    "deep-inversion": {"per_class": 4, "iterations": 10},
    "der": {"size": 6},
    "er": {"size": 6},
    "generative-replay": {"hidden": [16], "z": 4},
    "icarl": {"size": 24},
}
MODELS: dict[str, str] = {"finetune-fc": "mlp-100"}  # of those that `cnn-small` does not suit
TRAIN = {"epochs": 2, "batch_size": 8, "optimizer": "adam", "lr": 0.01}
# methods that act on what was learnt before leave the first experience as fine-tuning does
LIKE_FINETUNING_AT_FIRST = {
    "a-ltm",
    "always-be-dreaming",
    "deep-inversion",
    "duplicate",
    "ewc",
    "feature-extraction",
    "finetune-fc",
    "generative-replay",
    "lfl",
    "lwf",
    "lwm",
    "mas",
    "piggyback",
    "si",
    "tensorboard",
    "warm-up",
}
GROWING: set[str] = set()  # methods whose state must grow with the experiences


class Idle(Plugin):
    """Does nothing, in every hook, and so owns none."""

    name = "idle"

    def owns(self, hook: str) -> bool:
        return False


for _hook in HOOKS:
    exec(f"def {_hook}(self, run): pass\nsetattr(Idle, '{_hook}', hookimpl({_hook}))")


class Watching(Plugin):
    """Keeps what others leave behind, and whether their penalties have gradients."""

    name = "watching"
    observer = True

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    @hookimpl
    def after_experience(self, run, experience):
        self.model = run.model
        if experience.index == 0:
            self.first = {name: value.clone() for name, value in run.model.state_dict().items()}

    @hookimpl
    def after_eval(self, run, experience):
        self.weights = {name: value.clone() for name, value in run.model.state_dict().items()}


def built(name: str) -> Plugin:
    return registry.build_plugin(name, SMALL.get(name, {}))


def setting(name: str) -> str:
    return registry.plugin_class(name).settings[0]


def learn(
    scenario: Any, *plugins: Plugin, model: str | None = None, logits: str | None = None, **run: Any
) -> clframe.Results:
    backbone = model or next((MODELS[p.name] for p in plugins if p.name in MODELS), "cnn-small")
    return clframe.run(scenario, backbone, plugins, train=TRAIN | {"logits": logits}, run={"tensorboard": False, **run})


@pytest.fixture
def stream(tiny):
    return lambda name: tiny(experiences=2, shape=(1, 8, 8), setting=setting(name))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_built_from_documented_options_and_its_repr_rebuilds_it(name: str):
    cls = registry.plugin_class(name)
    plugin = cls()
    assert cls.name == name
    assert eval(repr(plugin), {cls.__name__: cls}).options == plugin.options
    assert all(option.doc for option in options_of(cls))
    assert cls.__doc__
    assert cls.observer or cls.citation
    assert set(cls.predictor_state) <= set(cls.state)
    assert all(hasattr(plugin, attribute) or attribute in inspect.getsource(cls) for attribute in cls.state)
    with pytest.raises(WrongUse, match=f"`{name}.nonsense` is not an option"):
        cls(nonsense=1)


@pytest.mark.parametrize("name", NAMES)
def test_its_hooks_are_marked_and_take_what_the_contract_gives(name: str):
    plugin = built(name)
    registry.manager([plugin])  # refuses unmarked, misspelt and wrongly declared hooks
    for hook in registry.hooks_of(type(plugin)):
        parameters = inspect.signature(getattr(plugin, hook)).parameters.values()
        assert all(p.default is p.empty for p in parameters)
        assert getattr(type(plugin), hook).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_resumes_to_the_same_bits(name: str, stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original, calls, stop = Engine.pause, [0], [0]

    def pause(engine: Engine) -> None:
        calls[0] += 1
        if calls[0] == stop[0]:
            engine.signal = signal.SIGTERM
        original(engine)

    monkeypatch.setattr(Engine, "pause", pause)
    whole = learn(stream(name), built(name), output=str(tmp_path / "whole"))
    pauses = calls[0]
    for k in {1, pauses // 4, pauses // 2, pauses - 2, pauses}:
        folder = tmp_path / str(k)
        calls[0], stop[0] = 0, k
        with pytest.raises(Interrupted):
            learn(stream(name), built(name), output=str(folder))
        stop[0] = 0
        resumed = clframe.resume(folder, scenario=stream(name), plugins=[built(name)])
        assert resumed.data == whole.data
        for file in ("results.json", "model.safetensors", "predictions.safetensors"):
            assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    loaded = clframe.load(tmp_path / "whole", plugins=[built(name)])
    test = stream(name)[1].test
    task = 1 if setting(name) == "task" else None
    reading = "task" if setting(name) == "task" else "class"
    correct = (loaded(test.x, task).argmax(1) == test.y).sum().item()
    assert correct / len(test) == whole.accuracy[reading][1][1]


@pytest.mark.parametrize("name", NAMES)
def test_a_plugin_that_does_nothing_changes_nothing_beside_it(name: str, stream, monkeypatch: pytest.MonkeyPatch):
    alone, beside = Watching(), Watching()
    learn(stream(name), built(name), alone)
    # the oracle, and what isolates tasks, refuse any method beside them
    monkeypatch.setattr(Idle, "observer", name == "joint" or registry.plugin_class(name).isolates)
    learn(stream(name), Idle(), built(name), beside)
    assert alone.weights.keys() == beside.weights.keys()
    assert all(torch.equal(value, beside.weights[key]) for key, value in alone.weights.items())


@pytest.mark.parametrize("name", NAMES)
def test_its_penalties_pull(name: str, stream):
    """Each penalty, once it is there, has a gradient that is not zero (attention losses were published without one)."""
    if "penalty" not in registry.hooks_of(registry.plugin_class(name)):
        return
    norms: dict[str, float] = {}

    class Probing(Plugin):
        name = "probing"
        observer = True

        @hookimpl
        def after_step(self, run, batch):
            given = {"run": run, "batch": batch, "outputs": run.model(batch.x, batch.task)}
            wanted = inspect.signature(plugin.penalty).parameters
            for term, value in (plugin.penalty(**{n: given[n] for n in wanted}) or {}).items():
                parameters = [p for p in run.model.parameters() if p.requires_grad]
                gradients = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
                norm = sum(float(g.norm()) for g in gradients if g is not None)
                norms[term] = max(norms.get(term, 0.0), norm)

    plugin = built(name)
    learn(stream(name), plugin, Probing())
    assert norms
    assert all(norm > 0 for norm in norms.values())
    assert all(term.split("/")[0] == name for term in norms)


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_no_hooks_and_no_changed_modes(name: str, stream):
    watching = Watching()
    learn(stream(name), built(name), watching)
    for module in watching.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert all(module.training for module in watching.model.modules())
    assert all(p.requires_grad for p in watching.model.parameters())


@pytest.mark.parametrize("name", sorted(LIKE_FINETUNING_AT_FIRST & set(NAMES)))
def test_the_first_experience_is_learnt_as_without_it(name: str, stream, context):
    """A method that is made for other logits is compared with fine-tuning under these."""
    plugin, with_it, without = built(name), Watching(), Watching()
    learn(stream(name), plugin, with_it)
    wanted = plugin.wanted_logits(context(setting(name), plugin))
    learn(stream(name), without, model=MODELS.get(name, "cnn-small"), logits=wanted)
    assert with_it.first.keys() == without.first.keys()
    assert all(torch.equal(value, without.first[key]) for key, value in with_it.first.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_keeps_no_images_leaves_none_in_its_checkpoints(
    name: str, stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scenario = stream(name)
    images = [image for experience in scenario for image in experience.train.x]
    normalized = [scenario.transform.normalize(image[None]) for image in images]
    needles = [t.numpy().tobytes() for t in (*images, *normalized)]
    written: list[bytes] = []
    original = checkpoint.write

    def write(folder: Path, packed: Any, tensors: dict[str, Tensor]) -> Path:
        path = original(folder, packed, tensors)
        written.extend(file.read_bytes() for file in path.iterdir())
        return path

    monkeypatch.setattr(checkpoint, "write", write)
    learn(scenario, built(name), output=str(tmp_path / "run"), checkpoint_every=0.0)
    written += [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(written) > 30
    if not registry.plugin_class(name).keeps_images:
        assert not any(needle in data for data in written for needle in needles)


@pytest.mark.parametrize("name", NAMES)
def test_its_state_does_not_grow_unless_it_must(name: str, tiny_arrays):
    """Domains, where the network does not grow either, from the second experience to the fourth."""
    cls = registry.plugin_class(name)
    sizes: list[tuple[int, int]] = []

    class Weighing(Plugin):
        name = "weighing"
        observer = True

        @hookimpl
        def after_eval(self, run, experience):
            tensors: dict[str, Tensor] = {}
            packed = checkpoint.pack(state.of_plugin(plugin, plugin.state), tensors)
            sizes.append((sum(t.nbytes for t in tensors.values()), leaves(packed)))

    kind = "domain" if "domain" in cls.settings else setting(name)
    arrays = tiny_arrays(shape=(1, 8, 8), per_class=2)
    scenario = change_domains("tiny", arrays, lambda i, x: x.roll(i, -1), experiences=4, setting=kind)
    plugin, weighing = built(name), Weighing()
    learn(scenario, plugin, weighing)
    assert len(sizes) == 4
    if name in GROWING:
        assert sizes[1] != sizes[3]
    elif kind == "domain" or not cls.state:
        assert sizes[1] == sizes[2] == sizes[3]


def leaves(packed: Any) -> int:
    """How many values a packed tree holds."""
    if isinstance(packed, dict):
        packed = list(packed.values())
    return sum(map(leaves, packed)) if isinstance(packed, list | tuple) else 1


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_that_it_does_not_serve_is_refused(name: str, tiny):
    cls = registry.plugin_class(name)
    for other in {"class", "task", "domain"} - set(cls.settings):
        with pytest.raises(WrongUse, match=f"`{name}` cannot serve the setting `{other}`"):
            learn(tiny(setting=other, shape=(1, 8, 8)), built(name))


def test_the_contract_catches_a_plugin_that_keeps_images_in_secret(stream, tmp_path: Path):
    class Secret(Plugin):
        name = "secret"
        state = ("memory",)

        def __init__(self) -> None:
            self.memory: Tensor | None = None

        @hookimpl
        def after_experience(self, run, experience):
            self.memory = experience.train.x[:1]

    scenario = stream("ewc")
    learn(scenario, Secret(), output=str(tmp_path / "run"))
    needle = scenario[1].train.x[0].numpy().tobytes()
    assert any(needle in file.read_bytes() for file in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))


def test_a_plugin_that_serves_tasks_only_is_refused_elsewhere(tiny):
    class TaskOnly(Plugin):
        name = "task-only"
        settings = ("task",)

    with pytest.raises(WrongUse, match="`task-only` cannot serve the setting `class` of `tiny`; it serves `task`"):
        clframe.run(tiny(), plugins=[TaskOnly()])
