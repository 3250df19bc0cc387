"""Deliberate mistakes in clframe, each with the tests that fail by it: a check of the tests themselves.

    python benchmarks/mutations.py                 all of them; the exit status is 1 if one survives
    python benchmarks/mutations.py icarl-weights   those that are named
    python benchmarks/mutations.py --list          their names

Each is made in a temporary copy of the source text, on which the named tests run; the checkout stays as it is. A
mutation whose search text does not occur exactly once is refused: write it again for the code of today.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("clframe", "plugins", "scenarios", "cli", "tests", "benchmarks", "pyproject.toml")
TESTS = "tests/test_mutations.py"
# clframe is installed in place, by links to the checkout: the copy's packages are put before them
FIRST = """
import importlib.util, sys
from pathlib import Path

root = Path({root!r})
parts = [(f"clframe.{{part}}", part) for part in ("plugins", "scenarios", "cli")]
for name, folder in (("clframe", "clframe"), *parts):
    where = root / folder
    spec = importlib.util.spec_from_file_location(name, where / "__init__.py", submodule_search_locations=[str(where)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if "." in name:
        setattr(sys.modules["clframe"], folder, module)
import pytest

assert sys.modules["clframe"].__file__.startswith(str(root))
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@dataclass(frozen=True)
class Mutation:
    """A mistake.

    Attributes:
        name: what it is called here.
        what: the mistake, in a few words.
        file: in which it is made, from the root.
        search: the text that is replaced, which occurs once.
        replacement: what is put in its place.
        tests: that fail by it.
    """

    name: str
    what: str
    file: str
    search: str
    replacement: str
    tests: tuple[str, ...]


def _made(name: str, what: str, file: str, search: str, replacement: str, *tests: str) -> Mutation:
    return Mutation(name, what, file, search, replacement, tuple(t if "::" in t else f"{TESTS}::{t}" for t in tests))


MUTATIONS = (
    _made(
        "memories-augmented",
        "memories keep augmented images",
        "clframe/data/transform.py",
        "            raw=rows.x,\n",
        "            raw=x,\n",
        "test_a_memory_keeps_images_as_the_data_set_has_them",
    ),
    _made(
        "icarl-drawn-plain",
        "exemplars that iCaRL draws are not augmented",
        "plugins/icarl.py",
        "return run.batch(draw(self.exemplars, self.batch_size, rng), rng)",
        "return run.batch(draw(self.exemplars, self.batch_size, rng))",
        "test_images_of_a_memory_are_augmented_each_time",
    ),
    _made(
        "der-one-draw",
        "both terms of DER++ have the same images",
        "plugins/der.py",
        "rows = run.batch(draw(self.kept, count, rng), rng)",
        "kept = kept if draws else draw(self.kept, count, rng)\n            rows = run.batch(kept, rng)",
        "test_der_draws_for_each_of_its_terms",
    ),
    _made(
        "icarl-weights",
        "iCaRL's loss ignores the weights of rows",
        "plugins/icarl.py",
        "return batch.mean(incremental_bce(outputs.logits, batch.y, old, self.temperature, hard))",
        "return incremental_bce(outputs.logits, batch.y, old, self.temperature, hard).mean()",
        "test_icarls_loss_counts_rows_by_their_weight_and_its_teacher_is_in_evaluation_mode",
    ),
    _made(
        "icarl-teacher-mode",
        "iCaRL's teacher is in train mode",
        "plugins/icarl.py",
        "self.teacher = snapshot(run.model)",
        "self.teacher = snapshot(run.model).train()",
        "test_icarls_loss_counts_rows_by_their_weight_and_its_teacher_is_in_evaluation_mode",
        "test_a_teacher_is_a_frozen_network_in_evaluation_mode",
    ),
    _made(
        "first-dreams",
        "always the first dreams are drawn",
        "plugins/deep_inversion.py",
        "where = torch.randint(len(self.images), (self.replay or len(batch),), generator=generator)",
        "where = torch.arange(self.replay or len(batch)) % len(self.images)",
        "test_every_dream_has_a_chance",
    ),
    _made(
        "same-noise",
        "a generator of dreams has the same noise at each step",
        "clframe/toolkit/dreamer.py",
        "x = self.generator.draw(n, rng)",
        "x = self.generator.draw(n, torch.Generator().manual_seed(0))",
        "test_a_generator_makes_other_dreams_for_each_step",
    ),
    _made(
        "anneal",
        "the rate of dreams rises where it should fall",
        "clframe/toolkit/inversion.py",
        'group["lr"] = lr * (1 + math.cos(math.pi * done)) / 2',
        'group["lr"] = lr * (1 - math.cos(math.pi * done)) / 2',
        "test_annealing_begins_at_the_whole_rate_and_ends_at_none",
    ),
    _made(
        "rival-mode",
        "the rival of adaptive DeepInversion is taught in eval mode",
        "clframe/toolkit/inversion.py",
        "rival.train().requires_grad_(True)",
        "rival.eval().requires_grad_(True)",
        "test_the_rival_is_taught_in_train_mode",
    ),
    _made(
        "dreamer-mode",
        "the generator of always-be-dreaming is trained in eval mode",
        "clframe/toolkit/dreamer.py",
        "self.generator.train()",
        "self.generator.eval()",
        "test_a_generator_of_dreams_is_trained_in_train_mode",
    ),
    _made(
        "wgan-mode",
        "a WGAN is trained in eval mode",
        "clframe/toolkit/generators.py",
        "self.train()\n        for _ in range(self.critic_steps):",
        "self.eval()\n        for _ in range(self.critic_steps):",
        "test_a_wgan_is_trained_in_train_mode_and_its_generator_has_batch_norms",
    ),
    _made(
        "wgan-norms",
        "a WGAN's generator has no batch norm",
        "clframe/toolkit/generators.py",
        "self.decoder = _decoder(shape, net, hidden, z, norm=True)",
        "self.decoder = _decoder(shape, net, hidden, z, norm=False)",
        "test_a_wgan_is_trained_in_train_mode_and_its_generator_has_batch_norms",
    ),
    _made(
        "relevance",
        "`channel-gating.relevance` is ignored",
        "clframe/toolkit/channel_gates.py",
        "= rates > relevant",
        "= rates > 0",
        "test_the_share_of_images_that_makes_a_kernel_relevant_counts",
    ),
    _made(
        "four-images",
        "a task classifier learns from four images of each task",
        "clframe/toolkit/task_inference.py",
        "* counts[task]).long()",
        "* counts[task].clamp(max=4)).long()",
        "test_a_task_classifier_learns_from_all_images",
    ),
    _made(
        "packnet-clipping",
        "gradients that PackNet holds count in the clipping norm",
        "plugins/packnet.py",
        "self.held.clear_gradients()",
        "pass",
        "test_gradients_that_are_held_have_no_share_in_the_clipping_norm",
    ),
    _made(
        "gates-clipping",
        "gradients that channel gates hold count in the clipping norm",
        "plugins/channel_gating.py",
        "self.held.clear_gradients()",
        "pass",
        "test_gradients_that_are_held_have_no_share_in_the_clipping_norm",
    ),
    _made(
        "er-phases",
        "the reservoir of er is filled in other phases",
        "plugins/er.py",
        'if run.phase.name != "train" or self.memory == "balanced":',
        'if self.memory == "balanced":',
        "test_a_reservoir_is_not_filled_in_other_phases",
    ),
    _made(
        "der-phases",
        "the reservoir of der is filled in other phases",
        "plugins/der.py",
        'if run.phase.name != "train" or self.answers is None:',
        "if self.answers is None:",
        "test_a_reservoir_is_not_filled_in_other_phases",
    ),
    _made(
        "evaluation-mode",
        "evaluation is in train mode, with batch statistics of test images",
        "clframe/evaluate.py",
        "with evaluating(predictor), torch.no_grad():\n            for on, experience",
        "with torch.no_grad():\n            for on, experience",
        "test_evaluation_uses_and_keeps_running_statistics",
    ),
    _made(
        "company",
        "answers depend on the other images of an evaluation batch",
        "clframe/evaluate.py",
        "feature = functional.normalize(self.model.features(x), dim=1)",
        "feature = functional.normalize(self.model.features(x), dim=0)",
        "tests/test_every_plugin.py::test_the_contract[a finished run loads and predicts-icarl]",
    ),
    _made(
        "size",
        "a path is chosen for a whole evaluation batch",
        "clframe/toolkit/task_inference.py",
        "self.classifier.tasks)).argmax(1)\n",
        "self.classifier.tasks)).argmax(1).mode().values.expand(len(x))\n",
        "test_a_path_is_chosen_for_each_image_by_itself",
    ),
)


def mutated(mutation: Mutation) -> str:
    """Return the text of the file with the mistake; end the program if the search text is not there exactly once."""
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    count = text.count(mutation.search)
    if count != 1:
        raise SystemExit(
            f"The search text of the mutation `{mutation.name}` occurs {count} times in {mutation.file}: write it "
            "again for the code of today."
        )
    return text.replace(mutation.search, mutation.replacement)


def failing(mutation: Mutation | None, tests: tuple[str, ...], folder: Path) -> list[str]:
    """Run `tests` in a copy of the source with the mistake, or without any; return those that fail."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    if mutation:
        (folder / mutation.file).write_text(mutated(mutation), encoding="utf-8")
    start = folder / "start.py"
    start.write_text(FIRST.format(root=str(folder)), encoding="utf-8")
    failed = []
    for test in tests:
        command = [sys.executable, str(start), test]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"`{test}` could not be run:\n{done.stdout}{done.stderr}")
        failed += [test] if done.returncode else []
    return failed


def main() -> int:
    """Print a row for each mutation; return 1 if one survives, or if a test fails without any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of mutations; none: all")
    parser.add_argument("--list", action="store_true", help="print the names alone")
    arguments = parser.parse_args()
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := set(arguments.names) - set(known):
        parser.error(f"no mutation is called {sorted(unknown)[0]!r}; choices: {', '.join(known)}")
    if arguments.list:
        print(*known, sep="\n")
        return 0
    chosen = [known[name] for name in arguments.names or known]
    for mutation in chosen:
        mutated(mutation)  # all are refused before any test runs
    with tempfile.TemporaryDirectory(prefix="clframe-mutations-") as folder:
        named = tuple(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
        if broken := failing(None, named, Path(folder)):
            print(f"Without a mutation fails already: {', '.join(broken)}")
            return 1
    survived = 0
    print("| mutation | failing test |\n|---|---|", flush=True)
    for mutation in chosen:
        with tempfile.TemporaryDirectory(prefix="clframe-mutations-") as folder:
            failed = failing(mutation, mutation.tests, Path(folder))
        survived += not failed
        print(f"| {mutation.what} (`{mutation.file}`) | {', '.join(failed) or 'NONE'} |", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
