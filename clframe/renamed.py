"""Old names and their successors: code that still uses one is refused in a sentence that says the new name."""

from __future__ import annotations

PUBLIC = {"WrongUse": "UsageError", "RunFailed": "RunError"}  # of `clframe` and `clframe.errors`
OF_PLUGINS = {"settings": "serves"}  # attributes of a plugin's class
OF_RUNS = {  # attributes of `clframe.Run`
    "where": "progress_label",
    "of": "rows_from",
    "show": "log_images",
    "old_classes": "previous_classes",
    "n_seen": "n_seen_classes",
}
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
    "clframe.single": "clframe.data.single_image",
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
