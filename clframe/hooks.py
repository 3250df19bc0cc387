"""The fifteen hooks: every place where a method can act on a run, in the order in which the engine calls them.

    before_run
    for each experience:
        grow, before_experience, extra_data, phases
        for each phase, for each batch:
            extra_batch, before_step, base_loss, penalty, after_backward, after_step
        after_experience
        predictor, after_eval
    after_run

A plugin implements any of them as methods marked with ``@hookimpl``, with the argument names given here, or fewer of
them, and without default values. ``run`` is the `clframe.context.Run` under way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from clframe.context import Run
    from clframe.data.batch import Batch, ImageData
    from clframe.data.scenario import Experience
    from clframe.model import Outputs
    from clframe.training import Phase

# The version of the hooks: their names, arguments and meanings, and what `Run` and `Plugin` offer. It grows by one
# where a plugin that worked would not any more; additions leave it as it is (docs/reference/compatibility.md has
# the rule).
HOOK_API = 1

hookspec = pluggy.HookspecMarker("clframe")
hookimpl = pluggy.HookimplMarker("clframe")


class Hooks:
    """The specifications of the hooks, which `clframe.engine` calls."""

    @hookspec
    def before_run(self, run: Run) -> None:
        """Check the model and the scenario, or install forward hooks, before state is loaded.

        Raise `clframe.errors.UsageError` to refuse the run. Called at the start of each run, and again by
        `clframe.resume`, `clframe.load` and `clframe.extend`.
        """

    @hookspec
    def grow(self, run: Run, experience: Experience) -> None:
        """Add structure for `experience`, for which the head has grown: masks, gates, norms, heads.

        Also replayed on resume, load and extend, before state is loaded: read no images. Random initial values are
        allowed, as loading replaces them.

        `run.scenario` describes only the classes that were known when the experience was first learned. A plugin with
        one entry per class must enlarge its structure here, as an extension adds classes.
        """

    @hookspec
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Prepare for an experience, once and never replayed: teachers, values, frozen parameters (`Run.freeze`)."""

    @hookspec
    def extra_data(self, run: Run, experience: Experience) -> ImageData | None:
        """Return images that join the experience's own for all of its epochs, such as exemplars; None: nothing."""

    @hookspec
    def phases(self, run: Run, experience: Experience) -> list[Phase] | None:
        """Return phases before or after the one named ``train``, such as a warm-up; None: nothing.

        A phase that is itself named ``train`` stands in for the experience's own; two of those are refused.
        """

    @hookspec
    def extra_batch(self, run: Run, batch: Batch) -> Batch | None:
        """Return rows that join the batch of this step, with their weights, as in replay; None: nothing.

        Every plugin sees the original batch, not the others' rows.
        """

    @hookspec
    def before_step(self, run: Run, batch: Batch) -> None:
        """Act before the forward pass of a step, when the rows of `extra_batch` have joined `batch`.

        The batch may be edited in place: its images `x`, weights, and soft `targets`; modules of the network may be set
        for the step.
        """

    @hookspec(firstresult=True)
    def base_loss(self, run: Run, batch: Batch, outputs: Outputs) -> Tensor | None:
        """Return a scalar that replaces the weighted cross-entropy `run.loss`; None: the default loss is used.

        A run has at most one owner of this hook.
        """

    @hookspec
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return scalars to add to the loss, named ``plugin`` or ``plugin/term``; None: nothing to add."""

    @hookspec
    def after_backward(self, run: Run, batch: Batch) -> None:
        """Edit the gradients, which are computed and not clipped yet.

        A plugin with ``needs_task_gradient`` finds the gradients of the base loss alone in `run.task_gradients`.
        """

    @hookspec
    def after_step(self, run: Run, batch: Batch) -> None:
        """Act after the optimizer's step: path integrals, networks of the plugin, restoring frozen entries."""

    @hookspec
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Act after training and before evaluation: importance weights, herding, pruning, snapshots."""

    @hookspec(firstresult=True)
    def predictor(self, run: Run) -> nn.Module | None:
        """Return a module that maps (images, task or None) to scores of all classes of the head; None: the model.

        Called before each evaluation, and when a run is loaded. A run has at most one owner of this hook. See
        `clframe.evaluate.Predictor` for what it may declare.
        """

    @hookspec
    def after_eval(self, run: Run, experience: Experience) -> None:
        """Act after a row was added to `run.accuracy`, and to `run.validation` with ``train.val``: curves, logs."""

    @hookspec
    def after_run(self, run: Run) -> None:
        """Remove what only training needed, and close writers; called at the end, also after an error."""


HOOKS: tuple[str, ...] = tuple(name for name in vars(Hooks) if not name.startswith("_"))
