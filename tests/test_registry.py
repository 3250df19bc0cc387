import re
import sys

import pytest

from clframe import Plugin, RunError, UsageError, compose, contract, hookimpl, registry
from clframe.config import resolve
from clframe.hooks import HOOKS
from clframe.settings import Component, RunSettings
from clframe.testing import refused


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package of one module, with its metadata, on the path."""
    modules = []

    def put(package, source, **groups):
        module = package.replace("-", "_")
        folder = tmp_path / package
        info = folder / f"{module}-1.2.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\nSummary: About {package}\n"
        )
        lines = [f"[clframe.{group}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for group, e in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(folder)
        modules.append(module)
        return info

    yield put
    for module in modules:
        sys.modules.pop(module, None)


PLUGIN = """
from clframe import Plugin, hookimpl

class Noise(Plugin):
    '''Adds noise
    to gradients.

    More of it.
    '''

    def __init__(self, scale: float = 0.1) -> None:
        self.scale = scale

    @hookimpl
    def after_backward(self, run):
        pass

def build(*, limit: int = 3):
    return limit

number = 5
instance = Noise()
"""


def refusal(call, *arguments):
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    return "\n".join(caught.value.problems)


# names


def test_built_ins_come_by_entry_points():
    assert {"ewc", "joint", "tensorboard"} <= set(registry.names("plugin"))
    assert {"split-digits", "permuted-digits", "split-cifar"} <= set(registry.names("scenario"))
    assert {"mlp", "resnet32", "torchvision"} <= set(registry.names("model"))


@pytest.mark.parametrize(
    ("kind", "name", "pattern"),
    [
        ("plugin", "join", r"plugin `join`\. .*`joint`\?"),
        ("scenario", "split-digit", r"scenario `split-digit`\. .*`split-digits`\?"),
        ("model", "resnet-32", r"model `resnet-32`\. .*`resnet32`\?"),
        ("model", "mlp:wide", "`mlp` .*`:wide`"),
        ("model", "torchvision", "`torchvision` .*`torchvision:VARIANT`"),
        *(("plugin", name, f"plugin .*`{name}`.*`--set {name}.x=") for name in ("train", "scenario", "model", "run")),
    ],
)
def test_a_wrong_name_is_refused(kind, name, pattern):
    call = registry.plugin_class if kind == "plugin" else lambda name: registry.builder(kind, name)
    assert re.search(pattern, refusal(call, name))


def test_a_name_like_nothing_lists_the_choices():
    assert "Choices: cnn-small, mlp, mlp-100, " in refusal(registry.builder, "model", "zzzzzz")


def test_a_plugin_file_without_entry_point_asks_to_reinstall(tmp_path, monkeypatch):
    import clframe.plugins

    (tmp_path / "brand_new.py").write_text("")
    monkeypatch.setattr(clframe.plugins, "__path__", [str(tmp_path)])
    told = refusal(registry.plugin_class, "brand-new")
    assert re.search(r"`brand-new`\. .*brand_new\.py .*`pip install -e \.`", told)


# third parties


def test_a_third_party_is_listed_without_being_imported_and_built_by_name(install):
    install("acme-noise", PLUGIN, plugins={"noise": "acme_noise:Noise"}, scenarios={"acme": "acme_noise:build"})
    offer = next(o for o in registry.offers("plugin") if o.name == "noise")
    assert (offer.package, offer.version, offer.description) == ("acme-noise", "1.2", "Adds noise to gradients.")
    assert next(o for o in registry.offers("scenario") if o.name == "acme").description == "About acme-noise"
    assert "acme_noise" not in sys.modules
    plugin = registry.build_plugin("noise", {"scale": 0.5})
    assert (plugin.name, vars(plugin)["scale"], plugin.options) == ("noise", 0.5, {"scale": 0.5})
    assert refusal(registry.build_plugin, "noise", {"scal": 1}).startswith(
        "`noise.scal` is not an option of the plugin `noise`"
    )


def test_a_package_that_cannot_be_imported_is_named_and_breaks_nobody_else(install):
    install("broken", "'''Docs'''\nimport nonsense_module\nclass P: '''A plugin.'''", plugins={"bad": "broken:P"})
    install("exits", "raise SystemExit(3)", plugins={"bye": "exits:P"})
    install("unparsable", "class P(:", plugins={"odd": "unparsable:P"})
    install("garbled", "", plugins={"x": "garbled:P"}).joinpath("entry_points.txt").write_text("[a\nno equals")
    install("gone", "", plugins={"moved": "elsewhere.deep:P"})
    described = {offer.name: offer.description for offer in registry.offers("plugin")}
    assert described["bad"] == "A plugin."
    assert described["odd"] == "About unparsable"
    assert described["moved"] == "About gone"
    assert "ewc" in described
    assert registry.plugin_class("joint").name == "joint"
    assert refusal(registry.plugin_class, "bad") == (
        "The plugin `bad` of package `broken` cannot be imported (ModuleNotFoundError: No module named "
        "'nonsense_module'); repair or uninstall `broken`."
    )
    assert "package `exits` cannot be imported (SystemExit: 3)" in refusal(registry.plugin_class, "bye")
    assert "(SyntaxError: " in refusal(registry.plugin_class, "odd")


def test_two_packages_with_one_name_are_both_named(install):
    install("first-pkg", PLUGIN, plugins={"noise": "first_pkg:Noise"})
    install("second-pkg", PLUGIN, plugins={"noise": "second_pkg:Noise"})
    assert refusal(registry.plugin_class, "noise") == (
        "The plugin `noise` is offered by the packages `first-pkg` and `second-pkg`; uninstall one of them."
    )
    assert registry.plugin_class("joint").name == "joint"


def test_a_package_that_offers_a_name_twice_is_named_with_both(install):
    """Its metadata may, though a pyproject.toml may not; a second copy of the package is not a second offer."""
    info = install("acme", PLUGIN, plugins={"noise": "acme:Noise"})
    with (info / "entry_points.txt").open("a") as file:
        file.write("noise = acme:Other\n")
    assert refusal(registry.plugin_class, "noise") == (
        "The package `acme` offers the plugin `noise` twice, as `acme:Noise` and `acme:Other`; repair it."
    )


def test_a_package_that_takes_the_name_of_a_built_in_is_named(install):
    install("acme", PLUGIN, plugins={"ewc": "acme:Noise"})
    assert re.search("`ewc` .*`acme` and `clframe`", refusal(registry.plugin_class, "ewc"))


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("@hookimpl\n    def after_stepp(self): ...", "`after_stepp` of plugin `odd` .*`after_step`"),
        ("def after_step(self): ...", "`after_step` of plugin `odd` .*`@hookimpl`"),
        ("hook_api = 7", "`odd` .*version 7 .*version 1"),
    ],
)
def test_an_installed_class_that_misnames_a_hook_is_refused_before_it_is_built(install, method, pattern):
    source = "from clframe import Plugin, hookimpl\nclass Odd(Plugin):\n    def __init__(self): 1 / 0\n    "
    install("acme", source + method, plugins={"odd": "acme:Odd"})
    assert re.search(pattern, refusal(registry.build_plugin, "odd", {}))


def test_an_entry_point_to_nothing_or_to_a_module_is_refused(install):
    install("acme", PLUGIN, plugins={"gone": "acme:Gone", "whole": "acme"})
    assert refusal(registry.plugin_class, "gone").startswith(
        "The plugin `gone` of package `acme` cannot be imported (AttributeError: "
    )
    assert "derives from `clframe.Plugin`: correct its entry point" in refusal(registry.plugin_class, "whole")


@pytest.mark.parametrize("what", ["number", "instance", "build"])
def test_what_is_no_plugin_class_is_refused(install, what):
    install("acme", PLUGIN, plugins={"thing": f"acme:{what}"})
    sentence = refusal(registry.plugin_class, "thing")
    assert sentence.startswith("The plugin `thing` of package `acme` is ")
    assert "derives from `clframe.Plugin`: correct its entry point" in sentence


def test_a_class_with_another_name_than_its_entry_point_is_refused(install):
    source = "from clframe import Plugin\nclass A(Plugin):\n    name = 'a'\n"
    install("acme", source, plugins={"b": "acme:A"})
    assert re.search("`b` .*`a` in its class", refusal(registry.plugin_class, "b"))


def test_a_third_party_that_raises_is_blamed(install):
    source = "def build(x: int = 1):\n    return 1 / 0\ndef other():\n    return 5\nthing = 5"
    install("acme", source, scenarios={"bad": "acme:build", "odd": "acme:other", "thing": "acme:thing"})
    with pytest.raises(RunError, match="scenario `bad` of package `acme` failed: ZeroDivisionError"):
        registry.build_scenario(Component("bad"), RunSettings())
    assert "built 5, not a `Scenario`" in refusal(registry.build_scenario, Component("odd"), RunSettings())
    assert "is 5, which cannot be called" in refusal(registry.builder, "scenario", "thing")


# building


def test_data_root_and_seed_are_filled_from_the_run(install, tmp_path):
    source = """
import torch
from clframe import Arrays, split_classes
calls = []
def build(data_root, *, seed: int | None = None, size: int = 2):
    calls.append((str(data_root), seed, size))
    x, y = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 3])
    return split_classes("acme", Arrays("a", x, y, x, y, tuple("abcd")), experiences=2)
"""
    install("acme", source, scenarios={"acme": "acme:build"})
    run = RunSettings(seed=7, data_root=str(tmp_path))
    assert len(registry.build_scenario(Component("acme", {"size": 3}), run)) == 2
    registry.build_scenario(Component("acme", {"seed": 5}), run)
    assert sys.modules["acme"].calls == [(str(tmp_path), 7, 3), (str(tmp_path), 5, 2)]


def test_a_backbone_is_built_for_the_images():
    built = registry.build_backbone(Component("mlp", {"hidden": [6, 5]}), [1, 2, 2])
    assert (built.width, sum(p.numel() for p in built.parameters())) == (5, 4 * 6 + 6 + 6 * 5 + 5)
    told = refusal(registry.build_backbone, Component("mlp", {"hiden": [1]}), [1, 2, 2])
    assert re.search(r"`model\.hiden` .*`mlp`.*`hidden`", told)


def test_a_plugin_gets_its_options_by_the_names_of_its_constructor_and_its_variant(install):
    source = """
from clframe import Plugin
class Soft(Plugin):
    def __init__(self, variant: str, lambda_: float = 1.0, data_root: str = "") -> None:
        self.given = variant, lambda_, data_root
"""
    install("acme", source, plugins={"soft": "acme:Soft"})
    assert vars(registry.build_plugin("soft:er", {"lambda": 5, "data_root": "x"}))["given"] == ("er", 5.0, "x")
    assert resolve(plugins=["soft:er"]).plugins["soft:er"].options == {"lambda": 1.0, "data_root": ""}
    assert refusal(registry.build_plugin, "soft", {}) == "The plugin `soft` needs a variant: write `soft:VARIANT`."


def test_a_variant_reaches_the_builder(install):
    source = (
        "import torch\ndef build(input_shape, variant, *, n: int = 1):\n    return torch.nn.Linear(n, int(variant))"
    )
    install("acme", source, backbones={"acme": "acme:build"})
    built = registry.build_backbone(Component("acme:7", {"n": 3}), [1])
    assert (built.in_features, built.out_features) == (3, 7)


# the manager


class Base(Plugin):
    name = "base"


class First(Base):
    name = "first"

    @hookimpl
    def penalty(self, run):
        return {"first": 1}

    @hookimpl
    def base_loss(self, batch):
        return 1


class Second(Base):
    name = "second"

    @hookimpl
    def penalty(self):
        return {"second": 2}


class Owner(Base):
    name = "owner"

    @hookimpl
    def base_loss(self):
        return 2

    @hookimpl
    def predictor(self):
        return None


class Wrapped(Base):
    name = "wrapped"

    @hookimpl(wrapper=True)
    def base_loss(self):
        return (yield)


class Renamed(Base):
    name = "renamed"

    @hookimpl(specname="predictor")
    def answer(self, run):
        return None


class Hates(Base):
    name = "hates"
    conflicts = ("first", "absent")


class Nameless(Plugin):
    pass


def test_the_first_named_is_called_first():
    one, two = First(), Second()
    assert compose.manager([one, two]).hook.penalty(run=None, batch=None, outputs=None) == [
        {"first": 1},
        {"second": 2},
    ]
    made = compose.manager([two, one])
    assert made.hook.penalty(run=None, batch=None, outputs=None) == [{"second": 2}, {"first": 1}]
    assert made.get_plugin("first") is one
    assert compose.manager([]).get_plugins() == set()


def test_two_owners_are_refused_and_both_named():
    assert re.search("`base_loss` .*`first` and `owner`", refusal(compose.manager, [First(), Second(), Owner()]))
    assert "`predictor` is answered by `owner` and `renamed`" in refusal(compose.manager, [Owner(), Renamed()])
    compose.manager([First(), Wrapped()])


def test_hooks_that_nobody_answers_are_answered_with_nothing():
    made = compose.manager([Owner()])
    hook = compose.callers(made)
    given = {"run": None, "batch": None, "outputs": None}
    assert hook.base_loss is made.hook.base_loss
    assert hook.predictor is made.hook.predictor
    assert list(hook.penalty(**given)) == made.hook.penalty(**given) == []
    assert compose.callers(compose.manager([])).base_loss(**given) is None
    assert vars(hook).keys() == set(HOOKS)


def test_declared_conflicts_and_repeats_are_refused_together():
    twice, beside = refusal(compose.manager, [Hates(), First(), First()]).splitlines()
    assert re.search("`first` .*twice", twice)
    assert re.search("`hates` .*beside `first`", beside)
    compose.manager([Hates(), Second()])


class Isolating(Base):
    name = "isolating"
    isolates = True

    @hookimpl
    def grow(self):
        pass

    @hookimpl
    def predictor(self):
        return None


class Apart(Isolating):
    name = "apart"


class Watching(Base):
    name = "watching"
    observer = True

    @hookimpl
    def after_step(self):
        pass


class Phased(Base):
    name = "phased"

    @hookimpl
    def phases(self):
        return []


def test_beside_what_isolates_tasks_nothing_that_acts_on_what_is_learnt_may_run():
    for plugins in ([Isolating(), Second()], [Second(), Isolating()]):
        assert re.search("^`second` .*beside `isolating`", refusal(compose.manager, plugins))
    compose.manager([Second(), First()])


@pytest.mark.parametrize("hook", compose.ACTING)
def test_each_hook_that_acts_on_what_is_learnt_counts(hook):
    acting = type("Acting", (Base,), {"name": "acting", hook: hookimpl(lambda self: None)})
    assert "`acting` has nothing to do beside `isolating`" in refusal(compose.manager, [acting(), Isolating()])


def test_two_that_isolate_tasks_are_refused_in_one_sentence():
    """Not in one for each, nor in another for the hook that both answer."""
    for plugins in ([Isolating(), Apart()], [Apart(), Isolating()]):
        with refused("`apart` and `isolating`"):
            compose.manager(plugins)


def test_observers_and_phases_may_run_beside_what_isolates_tasks():
    """So the warm-up of a new head may."""
    plugins = [Isolating(), Watching(), Phased(), registry.build_plugin("warm-up", {})]
    assert compose.manager(plugins).get_plugins() == set(plugins)


def test_the_methods_that_isolate_tasks_say_so():
    isolating = {n for n in registry.names("plugin") if registry.plugin_class(n).isolates}
    assert isolating == {"channel-gating", "duplicate", "hat", "packnet", "piggyback"}
    for name in isolating - {"channel-gating"}:
        assert registry.plugin_class(name).serves == ("task",)


def test_what_is_no_plugin_instance_is_refused():
    with refused("`First` is a class", "`First()`"):
        compose.manager([First])
    with refused("5 is not a plugin", "`clframe.Plugin`"):
        compose.manager([5])


def test_a_plugin_without_a_name_is_called_as_its_class():
    assert compose.manager([Nameless()]).get_plugin("Nameless").name == "Nameless"


def unmarked(self, run): ...


@hookimpl
def marked(self): ...


@hookimpl
def with_strange_argument(self, run, batchh): ...


@hookimpl
def with_default(self, run, batch=None): ...


@hookimpl
def with_rest(self, **rest): ...


@hookimpl(hookwrapper=True)
def old_wrapper(self):
    yield


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"penalty": unmarked}, ("`penalty` of plugin `odd`", "`@hookimpl`")),
        ({"penalti": marked}, ("`penalti` of plugin `odd`", "`penalty`?")),
        ({"penalty": with_strange_argument}, ("`batchh`", "the hook `penalty`", "`batch`?")),
        ({"penalty": with_default}, ("`penalty` of plugin `odd`", "`batch`", "default")),
        ({"penalty": with_rest}, ("`rest`", "the hook `penalty`")),
        ({"penalty": old_wrapper}, ("`penalty` of plugin `odd`", "`@hookimpl(wrapper=True)`")),
        ({"state": ("anchor")}, ("`state` of plugin `odd`", "a text", "tuple of names")),
        ({"name": "train"}, ("plugin", "`train`")),
    ],
)
def test_a_mistake_in_a_class_is_refused(attributes, words):
    with refused(*words):
        compose.manager([type("Odd", (Plugin,), {"name": "odd", **attributes})()])


def test_hooks_of_a_class_are_in_the_order_of_calling():
    assert contract.hooks_of(Owner) == ["base_loss", "predictor"]
    assert contract.hooks_of(Renamed) == ["predictor"]
