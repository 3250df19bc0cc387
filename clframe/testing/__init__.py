"""The contract of plugins, scenarios and backbones, as checks for `clframe plugins check` and for a package's tests.

    from clframe import testing

    SUBJECT = testing.plugin("my-method", {"strength": 10.0})

    @pytest.mark.parametrize("check", SUBJECT.checks, ids=str)
    def test_contract(check):
        check(SUBJECT)

The checks need no test framework: they train small networks on a synthetic scenario, on one thread of the CPU, and
write to temporary folders only. A check that does not hold raises `Broken`, whose text is one sentence.

For tests of your own there are the same small scenarios (`tiny`, `tiny_arrays`) and short runs on them (`learn`), small
backbones with the parts that people use (`NETWORKS`), observers that keep what happens in a run (`Recorder`) and the
answers of the network to earlier tasks (`Answers`), a way to stop a run at any place and resume it (`stop_at`,
`stop_and_resume`), and the words that a refusal must have (`refused`).
"""

from clframe.testing import backbone_checks, plugin_checks, scenario_checks  # fills `CHECKS`
from clframe.testing.fixtures import (
    FILES,
    MODEL,
    SETTINGS,
    SHAPE,
    TRAIN,
    Answers,
    Broken,
    Idle,
    Pauses,
    Recorder,
    Step,
    differing,
    learn,
    message_listener,
    one_thread,
    refused,
    same_after_a_stop,
    state_copy,
    stop_and_resume,
    stop_at,
    tiny,
    tiny_arrays,
)
from clframe.testing.networks import NETWORKS, Small, seeded, unusual, usual
from clframe.testing.subjects import (
    BACKBONE_SHAPE,
    CHECKS,
    Check,
    NotRun,
    Outcome,
    Subject,
    backbone,
    outcomes,
    plugin,
    scenario,
    serves,
)

__all__ = [
    "BACKBONE_SHAPE",
    "CHECKS",
    "FILES",
    "MODEL",
    "NETWORKS",
    "SETTINGS",
    "SHAPE",
    "TRAIN",
    "Answers",
    "Broken",
    "Check",
    "Idle",
    "NotRun",
    "Outcome",
    "Pauses",
    "Recorder",
    "Small",
    "Step",
    "Subject",
    "backbone",
    "backbone_checks",
    "differing",
    "learn",
    "message_listener",
    "one_thread",
    "outcomes",
    "plugin",
    "plugin_checks",
    "refused",
    "same_after_a_stop",
    "scenario",
    "scenario_checks",
    "seeded",
    "serves",
    "state_copy",
    "stop_and_resume",
    "stop_at",
    "tiny",
    "tiny_arrays",
    "unusual",
    "usual",
]
