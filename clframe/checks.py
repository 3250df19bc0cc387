"""Checks of a run before it trains, and of the labels and loss terms of its steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from clframe import compose
from clframe.context import Run
from clframe.data.batch import Batch, ImageData
from clframe.data.scenario import Scenario
from clframe.data.streams import find_returning_class
from clframe.errors import UsageError

TOO_FEW = "more than 1 value per channel"  # what torch says where batch normalization meets one value
_FEWER = "give each experience two classes at least, such as by fewer `scenario.experiences`"


def check_run(run: Run, scenario: Scenario) -> None:
    """Refuse, before training, a run that could not learn as it is asked to.

    Raises:
        UsageError: with one sentence for each reason.
    """
    run._describe(scenario, len(scenario) - 1)  # all of it
    problems = [
        f"The plugin `{plugin.name}` cannot serve the setting `{scenario.setting}` of `{scenario.name}`; it serves "
        + " and ".join(f"`{setting}`" for setting in plugin.serves)
        + ": choose with `--setting`."
        for plugin in run.plugins
        if scenario.setting not in plugin.serves
    ]
    if run.config.train.logits == "own" and scenario.setting == "domain":
        problems.append(
            "`train.logits=own` needs tasks with classes of their own, and the domain setting has none: choose `seen`, "
            "or leave it out."
        )
    problems += _logits_problems(run)
    problems += stream_problems(run)
    problems += single_image_problems(run, scenario)
    problems += [problem for plugin in run.plugins for problem in plugin.problems(run)]
    if problems:
        raise UsageError(*problems)
    run._describe(scenario, 0)


def _logits_problems(run: Run) -> list[str]:
    """Return one sentence for each plugin whose loss is made for other logits than those of the run."""
    chosen = run.config.train.logits
    wanted = {p: logits for p in run.plugins if (logits := p.wanted_logits(run)) and logits != run.logits}
    other = next((p.name for p in run.plugins if p.wanted_logits(run) == run.logits), "")
    if chosen:
        asked = f"`train.logits` is {chosen}: leave that out, or choose another form."
    else:
        asked = f"`{other}` for `{run.logits}`: choose other forms, or run them apart."
    return [
        f"`{plugin.name}`{f' (form `{plugin.form}`)' if plugin.form else ''} is made for `train.logits={logits}`, but "
        f"{asked}"
        for plugin, logits in wanted.items()
    ]


def stream_problems(run: Run) -> list[str]:
    """Return one sentence for each reason why the run could not learn the classes of its stream.

    Checks the whole stream; called before training and before an extension. A class has one column in the head: two
    tasks that both have it would both train that column, so a plugin that isolates tasks cannot keep the first
    one's answers. A loss among the classes of one experience is always 0 where that experience has one class.
    """
    return [*_shared_class_problems(run), *_replay_problems(run), *_default_loss_problems(run)]


def _shared_class_problems(run: Run) -> list[str]:
    shared = find_returning_class(run.scenario.classes)
    if shared is None or run.scenario.setting == "domain":  # which isolating plugins do not serve
        return []
    earlier, later, label = shared
    return [
        f"`{plugin.name}` keeps the answers of each task as they are, and experiences {earlier + 1} and {later + 1} of "
        f"`{run.scenario.name}` share the class `{run.scenario.class_names[label]}`, so both would train its output: "
        "give each experience classes of its own, or choose another method."
        for plugin in run.plugins
        if plugin.isolates
    ]


def _replay_problems(run: Run) -> list[str]:
    """Return the sentence that refuses replayed classes whose logits take no part in the loss: it would be infinite."""
    classes = run.scenario.classes
    coming = range(max(1, n_learned(run)), len(classes))
    left_out = any(set().union(*classes[:i]).difference(classes[i]) for i in coming)
    if run.logits != "current" or not left_out:
        return []
    methods = [
        plugin for plugin in run.plugins if not plugin.observer
    ]  # an oracle beside a method is refused elsewhere
    return [
        f"`{plugin.name}` brings old classes back, which `train.logits=current` leaves out of the loss: choose `seen` "
        "or `all`."
        for plugin in run.plugins
        if (plugin.replays or (plugin.keeps_experiences and methods == [plugin]))
        and plugin.wanted_logits(run) in (None, "current")
    ]


def _default_loss_problems(run: Run) -> list[str]:
    """Return the sentence of `single_class_problems`, unless a plugin replaces the default loss."""
    owners = compose.owners(run.plugins, "base_loss")
    if any(plugin.wanted_logits(run) is None for plugin in owners):
        return []
    return single_class_problems(run)


def single_class_problems(run: Run) -> list[str]:
    """Return the sentence that refuses experiences of one class under a loss among their own classes.

    One class among one choice has the probability 1: its cross-entropy is 0, with a gradient of 0, at every step.
    """
    scenario = run.scenario
    to_come = range(n_learned(run), len(scenario.classes))
    single = [i for i in to_come if len(scenario.classes[i]) == 1]
    if run.logits not in ("own", "current") or not single:
        return []
    if any(plugin.keeps_experiences for plugin in run.plugins) and len(single) < len(to_come):
        return []  # their images are learned with those of the others
    wanting = [plugin for plugin in run.plugins if plugin.wanted_logits(run) == run.logits]
    serving = [plugin.one_class for plugin in wanting] or ["train.logits=seen"]
    others = f", or choose `{serving[0]}`" if serving[0] else ""
    name = scenario.class_names[scenario.classes[single[0]][0]]
    more = f" (and {len(single) - 1} more)" if len(single) > 1 else ""
    alone = len({label for i in to_come for label in scenario.classes[i]}) == 1
    advice = "add two classes at least" if alone else _FEWER
    return [
        f"Experience {single[0] + 1} of `{scenario.name}`{more} has one class, `{name}`, and with "
        f"`train.logits={run.logits}` the loss among the classes of one experience is then always 0: {advice}{others}."
    ]


def n_learned(run: Run) -> int:
    """Return the number of experiences that the extended run has learned; 0 for a run that extends none."""
    known = run.scenario.known
    return known[-2] if len(known) > 1 else 0


def single_image_problems(run: Run, stream: Scenario) -> list[str]:
    """Return one sentence for each reason why batches of one image would reach a network that cannot train on one.

    `clframe.training.Sampler` lets a last image join the batch before: what is left is a `train.batch_size` of 1, and
    an experience of one image that no plugin adds others to.
    """
    if learns_from_one(run):
        return []
    why = []
    to_come = range(n_learned(run), len(stream))
    if 1 in {run.config.train.of(i).batch_size for i in to_come}:
        why.append("`train.batch_size` is 1: choose 2 or more")
    adding = any(plugin.replays or plugin.keeps_experiences for plugin in run.plugins)
    alone = [i for i in to_come if not (adding and i) and len(stream[i].train) == 1]
    if alone:
        why.append(f"experience {alone[0] + 1} of `{stream.name}` has one training image: give it more")
    model = run.config.model.name
    return [
        f"`{model}` has batch normalization, which cannot learn from one value for each channel, and {reason}, or "
        "choose a model without it."
        for reason in why
    ]


def learns_from_one(run: Run) -> bool:
    """Return whether a copy of the backbone can take one image in training mode; the network stays as it is."""
    net = run.model.backbone
    if not any(isinstance(module, _BatchNorm) for module in net.modules()):
        return True
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []), torch.no_grad():
        try:
            copy.deepcopy(net).train().features(torch.zeros(1, *run.scenario.input_shape, device=run.device))
        except Exception as error:  # other errors are told of where they come
            return TOO_FEW not in str(error)
    return True


def check_labels(run: Run, data: ImageData | Batch, what: str) -> None:
    """Refuse rows whose label the head lacks, or the chosen logits mask: their loss would be infinite."""
    mask = run.mask(data.task)
    n_classes = run.model.n_classes
    inside = (data.y >= 0) & (data.y < n_classes)
    if not inside.all():
        raise UsageError(
            f"Label {int(data.y[~inside][0])} in {what} of {run.progress_label} is not a class of the head, "
            f"which has 0 to {n_classes - 1}: correct the labels, or the classes that the scenario declares."
        )
    if mask is not None:
        inside = mask[data.y] if mask.dim() == 1 else mask.gather(1, data.y[:, None]).squeeze(1)
    if not inside.all():
        label = int(data.y[~inside][0])
        raise UsageError(
            f"Label {label} in {what} of {run.progress_label} is masked by "
            f"`train.logits={run.logits}`: choose `seen` or `all`."
        )


def check_terms(run: Run, terms: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
    """Refuse an answer to ``penalty`` that is not a dict of new names to scalars: it would replace another term."""
    if not isinstance(named, dict):
        raise UsageError(
            f"A `penalty` hook gave a {type(named).__name__} in {run.progress_label}; "
            "it must give a dict of names to scalars, or None."
        )
    for name, term in named.items():
        if name in terms:
            raise UsageError(f"There are two loss terms `{name}` in {run.progress_label}; name one by its plugin.")
        if term.dim():
            raise UsageError(f"The loss term `{name}` has the shape {list(term.shape)}; it must be a scalar.")
