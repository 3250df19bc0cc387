"""Old names and their successors: code that still uses one is refused in a sentence that says the new name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PUBLIC = {"WrongUse": "UsageError", "RunFailed": "RunError"}  # of `clframe` and `clframe.errors`
OF_PLUGINS = {"settings": "serves"}  # attributes of a plugin's class
OF_RUNS = {  # attributes of `clframe.Run`
    "where": "progress_label",
    "of": "rows_from",
    "show": "log_images",
    "old_classes": "previous_classes",
    "n_seen": "n_seen_classes",
    "labelled_columns": "labeled_columns",
}
OF_VALUES = {"colour": "color", "grey": "gray"}  # words that an option may be set to
OF_MODES = ("split-folder", "split-table", "huggingface")  # scenarios whose option `mode` had them
MODULES = {
    "clframe.adapter": "clframe.avalanche.adapter",
    "clframe.arrays": "clframe.data.build",
    "clframe.benchmark": "clframe.avalanche.benchmark",
    "clframe.checkpoint": "clframe.runs.checkpoint",
    "clframe.compaction": "clframe.toolkit.compaction",
    "clframe.distill": "clframe.toolkit.distill",
    "clframe.dreamer": "clframe.toolkit.dreamer",
    "clframe.duplicates": "clframe.data.duplicates",
    "clframe.export": "clframe.deploy.export",
    "clframe.extension": "clframe.runs.extension",
    "clframe.folder": "clframe.runs.folder",
    "clframe.gates": "clframe.toolkit.channel_gates",
    "clframe.generators": "clframe.toolkit.generators",
    "clframe.images": "clframe.data.files",
    "clframe.importance": "clframe.toolkit.importance",
    "clframe.inversion": "clframe.toolkit.inversion",
    "clframe.listing": "clframe.data.listing",
    "clframe.look": "clframe.data.decode",
    "clframe.masks": "clframe.toolkit.weight_masks",
    "clframe.memory": "clframe.toolkit.memory",
    "clframe.per_sample": "clframe.toolkit.per_sample",
    "clframe.pictures": "clframe.data.pictures",
    "clframe.reading": "clframe.system.reading",
    "clframe.record": "clframe.runs.record",
    "clframe.results": "clframe.runs.results",
    "clframe.single": "clframe.checks",
    "clframe.splits": "clframe.data.split_file",
    "clframe.state": "clframe.runs.state",
    "clframe.streams": "clframe.data.streams",
    "clframe.sums": "clframe.runs.sums",
    "clframe.switches": "clframe.system.switches",
    "clframe.task_inference": "clframe.toolkit.task_inference",
    "clframe.texts": "clframe.system.texts",
    "clframe.trained": "clframe.deploy.trained",
    "clframe.values": "clframe.data.values",
    "clframe.writing": "clframe.system.writing",
}


def now_called(old: str, new: str) -> str:
    """Return the sentence that refuses the name `old`, which is `new` now."""
    return f"`{old}` is now called `{new}`."


def update_mode(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options`, of an image format or of a scenario in a file of format 1, with the word of today for `mode`.

    A scenario has its ``name`` among the options; those of other packages are returned as they are.
    """
    of_image_files = str(options.get("name", OF_MODES[0])).partition(":")[0] in OF_MODES
    old = str(options.get("mode"))
    return {**options, "mode": OF_VALUES[old]} if of_image_files and old in OF_VALUES else dict(options)


def update_config(config: Any) -> Any:
    """Return what ``config.yaml`` of a run folder holds, with the words of today in its scenario."""
    scenario = config.get("scenario") if isinstance(config, dict) else None
    return {**config, "scenario": update_mode(scenario)} if isinstance(scenario, dict) else config
