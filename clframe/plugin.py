"""The base class of all plugins: options, declared state, and what a plugin needs of the run it joins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from clframe.options import public_name, validated

if TYPE_CHECKING:
    from clframe.context import Run


class _Validated(type):
    """A metaclass that validates options before ``__init__``, raising `clframe.errors.UsageError`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError(f"{cls.__name__} takes its options by name only")
        return cls.from_validated(validated(cls, kwargs, getattr(cls, "name", "") or cls.__name__))

    def from_validated(cls, values: dict[str, Any]) -> Any:
        """Build a plugin from options, by parameter name, that `clframe.options.validated` gave."""
        plugin = super().__call__(**values)
        plugin.options = values
        return plugin


class Plugin(metaclass=_Validated):
    """A method, or an observer, that takes part in a run through hooks (`clframe.hooks`).

    The constructor is the schema of its options: typed parameters with defaults, documented under ``Options:`` in the
    class's docstring. They are validated before ``__init__`` sees them, also when a plugin is built in Python.

    Class attributes that a plugin declares:

    - ``name``: how the command line, loss terms and errors call it.
    - ``hook_api``: the version of the hooks (`clframe.hooks.HOOK_API`) that it was written for; None: any. Another one
      than this clframe's is refused.
    - ``state``: names of the attributes that a checkpoint must hold: tensors, plain containers of them, modules and
      optimizers. The structure (a module, an optimizer) is built in ``before_run`` or ``grow``, the values are loaded
      afterwards; a teacher made by `clframe.model.snapshot` is rebuilt from its state.
    - ``predictor_state``: those of them that the plugin's ``predictor`` needs, so that a finished run can be loaded.
    - ``former_state``: former names of attributes in ``state``, as keys, that older checkpoints may hold, with today's.
    - ``serves``: the evaluation settings that the plugin can serve: class-, task-, domain-incremental.
    - ``suited_train``: training settings (``train.*``) that suit it. A run uses them in place of the scenario's where
      the user set nothing else; where plugins differ, the first named decides.
    - ``conflicts``: names of plugins that it cannot run beside.
    - ``needs_task_gradient``: the engine goes backward through the base loss first, see ``after_backward``.
    - ``isolates``: it decides what of the network each task may use and change, so that nothing learned changes: no
      other plugin may change what is learned beside it.
    - ``replays``: it brings images of earlier classes back, kept or made, by ``extra_data`` or ``extra_batch``.
    - ``keeps_images``: it stores training images; a method that does not say so must not.
    - ``memory_options``: its options that say how many images it keeps, of which a budget of bytes (``clframe compare
      --budget``) sets the first, where the user gives none of them.
    - ``keeps_experiences``: it is an oracle that trains on earlier experiences again.
    - ``grows``: its state must grow with the experiences; that of a method that does not say so must not.
    - ``variants``: it is named ``name:VARIANT``, with one of these, and `of_variant` gives the class.
    - ``resumes``: a run with it can be saved and resumed.
    - ``joins``: whether it can join a finished run that learned without it (`clframe.extend`): ``network``, it needs
      the old network only; ``images``, images of old classes, too (``run.old_images``); empty, it cannot. Its
      ``after_experience`` is then called once before training, with the last old experience, which has those images.
    - ``known_problems``: sentences on what is known to be broken in what it stands on; `clframe doctor` tells them.
    - ``observer``: it changes nothing that is learned; results do not depend on it.
    - ``one_class``: of a plugin with `wanted_logits`, the option (``name.option=value``) with which it can learn an
      experience of one class, whose loss among its own classes is always 0; empty: there is none.
    - ``citation``: the paper.
    - ``family``: the family of methods that the documentation lists it in, such as ``regularization``.

    Beside ``Options:``, the docstring of a class may have the sections ``When to use:``, ``Keeps:`` (memory that the
    method holds between experiences) and ``Hooks:`` (the hooks that it implements), which the documentation and
    ``clframe plugins show`` read.

    An instance may set ``form``: which form of the method it is, where there are several; the results name it.
    """

    name: ClassVar[str] = ""
    hook_api: ClassVar[int | None] = None
    state: ClassVar[tuple[str, ...]] = ()
    predictor_state: ClassVar[tuple[str, ...]] = ()
    former_state: ClassVar[Mapping[str, str]] = {}
    serves: ClassVar[tuple[str, ...]] = ("class", "task", "domain")
    suited_train: ClassVar[Mapping[str, Any]] = {}
    conflicts: ClassVar[tuple[str, ...]] = ()
    needs_task_gradient: ClassVar[bool] = False
    isolates: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    keeps_images: ClassVar[bool] = False
    memory_options: ClassVar[tuple[str, ...]] = ()
    keeps_experiences: bool = False  # an instance may say so, where an option decides
    grows: ClassVar[bool] = False
    observer: ClassVar[bool] = False
    variants: ClassVar[tuple[str, ...]] = ()
    resumes: ClassVar[bool] = True
    joins: ClassVar[Literal["", "network", "images"]] = ""
    known_problems: ClassVar[tuple[str, ...]] = ()
    one_class: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    family: ClassVar[str] = ""

    options: dict[str, Any]  # as validated, by parameter name
    has_run = False  # whether it holds the state of a run
    form: str | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"

    @classmethod
    def of_variant(cls, variant: str) -> type[Plugin]:
        """Return the class of ``name:variant``, for a plugin with ``variants``. Raises `clframe.errors.UsageError`."""
        return cls

    def public_options(self) -> dict[str, Any]:
        """Return the options by the names that YAML and ``--set`` use."""
        return {public_name(name): value for name, value in self.options.items()}

    def owns(self, hook: str) -> bool:
        """Return False if, with its options, this plugin leaves the single-owner `hook` to others."""
        return True

    def wanted_logits(self, run: Run) -> str | None:
        """Return the ``train.logits`` that the plugin's loss is made for in this run; None: any.

        Of the run, scenario and plugins are known. They are in force where the user chose none. A run in which it and
        the user, or another plugin, want different ones is refused.
        """
        return None

    def hints(self, run: Run) -> Iterable[str]:
        """Return sentences on what may keep this run from learning.

        They are told once a run, at the first experience that has any, and again if a loss diverges.
        """
        return ()

    def problems(self, run: Run) -> Iterable[str]:
        """Return one sentence for each reason why this plugin cannot serve the run; called before training.

        `run.scenario` describes the whole scenario and `run.model` stands as built, before its head grows.
        """
        return ()
