"""What scenarios of custom image files share: the list of files, its division, its checks, and the images."""

from __future__ import annotations

import hashlib
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import Field

from clframe.data.build import Arrays
from clframe.data.decode import LARGEST_FILE, Crop, ImageFormat, Mode
from clframe.data.duplicates import Duplicates, resolve_duplicates
from clframe.data.files import EmbeddedFile, ImageFiles, LazyImages, RawImages, bytes_of, count_cores
from clframe.data.scenario import Part
from clframe.data.streams import least_classes
from clframe.data.transform import Transform
from clframe.errors import DataError
from clframe.options import Count, CountOrZero, OptionGroup
from clframe.scenarios.streams import Stream, random_state
from clframe.system.reading import Unreadable, quote_path, read_bytes
from clframe.system.texts import by_name

Key = TypeVar("Key", bound="str | tuple[str, ...]")

# for photographs: mean and standard deviation of ImageNet's channels, and of their gray values
NORMS: dict[Mode, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "color": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "gray": ((0.449,), (0.226,)),
}
BLOCK = 512
SHOWN = 10  # names that a sentence lists at most
# a small network, and enough passes for the few hundred images that a folder may hold
DEFAULTS: dict[str, Any] = {
    "backbone": "cnn-small",
    "train": {"optimizer": "adam", "lr": 1e-3, "batch_size": 32, "epochs": 10},
}
TestShare = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class FileStream(Stream):
    """A stream of experiences of image files, with the share of them that is drawn to test with.

    Options:
        test: share of each class that is drawn, from the seed, as test images where the data does not say which are.
    """

    test: TestShare = 0.2


@dataclass(frozen=True)
class ImageOptions(OptionGroup):
    """How image files become images of one size, and which of them are left out.

    Options:
        size: height and width of the images in pixels; images of any size are brought to it.
        crop: `center` cuts off what is left of the longer side, `stretch` resizes both sides apart, `pad` keeps the
            whole image on black.
        resize: the shorter side in pixels before `center` cuts; null: `size`.
        mode: `color` (3 channels) or `gray` (1); images of other modes are converted.
        skip_broken: leave out images that cannot be read, instead of listing them and stopping.
        duplicates: files that are training and test images: `refuse`, `drop` them from training, or `keep` them.
    """

    size: Count = 64
    crop: Crop = "center"
    resize: Count | None = None
    mode: Mode = "color"
    skip_broken: bool = False
    duplicates: Duplicates = "refuse"

    def format(self) -> ImageFormat:
        """Return the format of the images. Raises `UsageError` if the options do not belong together."""
        return ImageFormat(self.size, self.crop, self.resize, self.mode)


@dataclass(frozen=True)
class LoadingOptions(OptionGroup):
    """How images of files become the input of a network, where they are kept, and by how many workers they are read.

    Options:
        normalize: subtract the mean of ImageNet's images and divide by their standard deviation, per channel.
        augment: crop training images at random after padding by an eighth of their size (4 zeros of 32), and mirror
            every other one.
        memory: most bytes of images to keep in memory; of more images, each is read from its file when it is needed.
        workers: processes that read images when they are needed, or threads that read all at first; null: as cores.
    """

    normalize: bool = True
    augment: bool = True
    memory: CountOrZero = 2_000_000_000
    workers: Count | None = None

    def transform(self, look: ImageFormat) -> Transform:
        """Return the transform of images of the format `look`."""
        mean, std = NORMS[look.mode] if self.normalize else ((), ())
        return Transform(mean=mean, std=std, pad=look.size // 8 if self.augment else 0, flip=self.augment, look=look)


@dataclass(frozen=True, slots=True)  # there may be millions
class Entry:
    """An image file of a data set.

    Attributes:
        file: path of the file, or what reads it out of a larger file.
        name: name of the file within the data set, the same on every machine.
        label: name of its class.
        part: training or test; None: still to be drawn.
        group: task or domain of the image; empty where there are none.
    """

    file: str | EmbeddedFile
    name: str
    label: str
    part: Part | None = None
    group: str = ""


def normalize_name(text: str, what: str) -> str:
    """Return `text`, the name of a class of `what`, in the Unicode form NFC: systems write one name in several forms.

    Raises:
        DataError: if the name is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"A class of {what} is called {text!a}, which is not UTF-8; rename it.") from error
    return unicodedata.normalize("NFC", text)


def divide_entries(entries: Sequence[Entry], share: float, seed: int | None, what: str) -> list[Entry]:
    """Return `entries` with `share` of each class (of each group), one at least, drawn as test images from `seed`.

    Raises:
        DataError: if a class has one image only, which cannot serve both training and test.
    """
    tested: set[str] = set()
    for k, ((group, label), members) in enumerate(sorted(group_entries(entries, lambda e: (e.group, e.label)).items())):
        if len(members) < 2:
            where = f" of `{group}`" if group else ""
            raise DataError(
                f"The class `{label}`{where} in {what} has one image only; it takes two, one to learn from and one to "
                "test with."
            )
        count = min(max(1, round(share * len(members))), len(members) - 1)
        tested |= {members[i].name for i in random_state(seed, k).permutation(len(members))[:count].tolist()}
    return [replace(e, part="test" if e.name in tested else "train") for e in entries]


def limit_entries(entries: Iterable[Entry], per_class: int | None) -> list[Entry]:
    """Return the first `per_class` images of each class (of each group), for training and for test; all if None."""
    counted = Counter[tuple[str | None, str, str]]()
    kept = []
    for entry in entries:
        counted[entry.part, entry.group, entry.label] += 1
        if per_class is None or counted[entry.part, entry.group, entry.label] <= per_class:
            kept.append(entry)
    return kept


def group_entries(entries: Iterable[Entry], key: Callable[[Entry], Key]) -> dict[Key, list[Entry]]:
    """Return `entries` by their key, those of one key in their order."""
    found: dict[Key, list[Entry]] = {}
    for entry in entries:
        found.setdefault(key(entry), []).append(entry)
    return found


def read_all(
    name: str,
    entries: Sequence[Entry],
    options: ImageOptions,
    loading: LoadingOptions,
    *,
    what: str,
    rank: Callable[[str], Any] = by_name,
    notes: Sequence[str] = (),
) -> tuple[Arrays, list[Entry]]:
    """Return the images of `entries` as arrays, in memory if that takes at most ``loading.memory`` bytes, else lazily.

    Every file is read once to its last pixel: for the checksum, and to find broken files and files of equal content.
    Classes are numbered by their names, sorted by `rank`. The arrays hold the sentences `notes`, and sentences on what
    is left out here.

    Returns:
        The arrays, and the entries of their rows: those of the training images, then those of the test images.

    Raises:
        DataError: with a list of all files that cannot be read, unless ``options.skip_broken``; if training and test
            images share a file, and ``options.duplicates`` is ``refuse``.
    """
    entries = sorted(entries, key=lambda e: e.part == "test")
    look, duplicates = options.format(), options.duplicates
    keep = bytes_of(len(entries), look) <= loading.memory
    pixels = np.empty((len(entries) if keep else 0, *look.shape), dtype=np.uint8)
    workers = loading.workers or count_cores()

    def examine(i: int) -> tuple[bytes, str]:
        """Return the SHA-256 of the file of entry i, or why the file cannot be read."""
        try:
            file = entries[i].file
            content = read_bytes(file, LARGEST_FILE) if isinstance(file, str) else file.read_bytes()
            image = look.read(BytesIO(content))
        except Unreadable as error:
            return b"", error.reason
        except (OSError, DataError) as error:
            return b"", getattr(error, "strerror", None) or str(error)
        if keep:
            pixels[i] = image
        return hashlib.sha256(content).digest(), ""

    found: list[tuple[bytes, str]] = []
    with ThreadPoolExecutor(workers) as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # on small faults, such as in EXIF data, that do no harm
        for start in range(0, len(entries), BLOCK):  # a pool keeps a kilobyte for each call that is submitted
            found += pool.map(examine, range(start, min(start + BLOCK, len(entries))))
    broken = [f"{e.file} ({reason})" for e, (_, reason) in zip(entries, found, strict=True) if reason]
    if broken and not options.skip_broken:
        raise DataError(
            f"{len(broken)} of the {len(entries)} images of {what} cannot be read; repair or remove them, or leave "
            "them out with `--set scenario.skip_broken=true`:\n" + "\n".join(f"  {line}" for line in broken)
        )
    notes = list(notes)
    if broken:
        first = next((e, reason) for e, (_, reason) in zip(entries, found, strict=True) if reason)
        notes.append(
            f"{len(broken)} of the {len(entries)} images of {name} cannot be read and {is_or_are(len(broken))} left "
            f"out (`scenario.skip_broken`), such as {first[0].name} ({first[1]})."
        )
    good = [i for i, (_, reason) in enumerate(found) if not reason]
    digests = [found[i][0] for i in good]
    kept = resolve_twins(
        [entries[i] for i in good], digests, what if duplicates == "refuse" else name, duplicates, notes
    )
    good = [good[k] for k in kept]
    total = hashlib.sha256()
    for i in sorted(good, key=lambda i: entries[i].name):
        e = entries[i]
        line = "\0".join([e.name, e.label, e.part or "", e.group, found[i][0].hex(), ""])
        total.update(line.encode(errors="surrogateescape"))  # a file's name need not be UTF-8
    if len(good) < len(entries):
        entries = [entries[i] for i in good]
        pixels = pixels[good] if keep else pixels
    notes += notes_on_case(sorted({e.label for e in entries}))
    images: RawImages = (
        torch.from_numpy(pixels) if keep else LazyImages([ImageFiles([e.file for e in entries], look, workers)])
    )
    names = tuple(sorted({e.label for e in entries}, key=rank))
    number = {label: i for i, label in enumerate(names)}
    y = torch.tensor([number[e.label] for e in entries], dtype=torch.int64)
    cut = sum(e.part == "train" for e in entries)
    transform, sha256 = loading.transform(look), total.hexdigest()
    return Arrays(name, images[:cut], y[:cut], images[cut:], y[cut:], names, transform, sha256, tuple(notes)), entries


def resolve_twins(
    entries: Sequence[Entry], digests: Sequence[bytes], what: str, duplicates: Duplicates, notes: list[str]
) -> list[int]:
    """Return the positions of the `entries` that are kept: with ``drop``, no training image that is a test image, too.

    Two images are the same if their files hold the same bytes. Images that training and test share are refused, dropped
    or kept; copies within one part of one group are all kept. A sentence on either is added to `notes`. Images that are
    tested as another class than they are learned as raise no accuracy: they are not refused.

    Args:
        entries: image files, with their parts.
        digests: SHA-256 of each file.
        what: name of the data set in sentences.
        duplicates: what to do about images that are learned and tested.
        notes: list to which sentences are added.

    Raises:
        DataError: with ``refuse``, if there are such images of the same class.
    """
    where: dict[bytes, list[int]] = {}
    for i, digest in enumerate(digests):
        where.setdefault(digest, []).append(i)
    several = [twins for twins in where.values() if len(twins) > 1]
    shared = [twins for twins in several if len({entries[i].part for i in twins}) > 1]
    gone: set[int] = set()
    if shared:
        tested = [i for twins in shared for i in twins if entries[i].part == "test"]
        learnt = [i for twins in shared for i in twins if entries[i].part == "train"]
        pair = " and ".join(
            dict.fromkeys(
                entries[next(i for i in shared[0] if entries[i].part == part)].name for part in ("train", "test")
            )
        )
        n_tests = sum(e.part == "test" for e in entries)
        same = any(_helps([entries[i] for i in twins]) for twins in shared)
        notes.append(
            resolve_duplicates(
                *(duplicates, len(tested), n_tests, len(learnt), what, pair),
                option="--set scenario.duplicates=",
                same_class=same,
            )
        )
        gone = set(learnt) if duplicates == "drop" else gone
    repeated = [
        members
        for twins in several
        for members in group_entries([entries[i] for i in twins], lambda e: (e.part or "", e.group)).values()
        if len(members) > 1
    ]
    if repeated:
        torn = [members for members in repeated if len({e.label for e in members}) > 1]
        first = (torn or repeated)[0]
        named = f"such as {' and '.join(dict.fromkeys(e.name for e in first[:2]))}"
        several_labels = f", {len(torn)} of them under several classes" if torn else ""
        notes.append(
            f"{len(repeated)} of the images of {what} {is_or_are(len(repeated))} there several times within training "
            f"or within test{several_labels}, {named}."
        )
    return [i for i in range(len(entries)) if i not in gone]


def _helps(twins: Sequence[Entry]) -> bool:
    """Return whether one image, `twins`, is learned as the class that it is tested as, which raises the accuracy."""
    learned, tested = ({e.label for e in twins if e.part == part} for part in ("train", "test"))
    return bool(learned & tested)


def notes_on_case(names: Sequence[str]) -> list[str]:
    """Return a list with a sentence on classes whose names differ in upper and lower case alone; empty without any."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.casefold(), []).append(name)
    twins = [name for same in found.values() if len(same) > 1 for name in same]
    return (
        [f"{list_classes(twins)} differ in upper and lower case alone, and are classes of their own."] if twins else []
    )


def name_reduced(what: str, duplicates: Duplicates) -> str:
    """Return the name, in sentences, of the data set `what` after `read_all`, which may have left out images."""
    return f"{what}, without its broken images{' and those that are tested with' * (duplicates == 'drop')},"


def check_classes(entries: Sequence[Entry], what: str, new_in_test: str) -> None:
    """Raise `DataError` for a data set of one class, and for classes that are not both learned and tested.

    Args:
        entries: image files, with their parts.
        what: name of the data set in sentences.
        new_in_test: advice on a class that only the test images have.
    """
    parts = {part: Counter(e.label for e in entries if e.part == part) for part in ("train", "test")}
    new = sorted(parts["test"].keys() - parts["train"].keys(), key=by_name)
    if new:
        raise DataError(
            f"{list_classes(new)} in the test images of {what} {is_or_are(len(new))} not in its training "
            f"images; {new_in_test}."
        )
    if untested := sorted(parts["train"].keys() - parts["test"].keys(), key=by_name):
        raise DataError(
            f"{list_classes(untested)} in {what} {'has' if len(untested) == 1 else 'have'} no test images; add some, "
            f"or leave out the class{'es' * (len(untested) > 1)}."
        )
    if len(parts["train"]) < least_classes():
        only = f", `{next(iter(parts['train']))}`" if parts["train"] else ""
        raise DataError(f"{what} has {len(parts['train'])} class{only}; there must be two at least to tell apart.")


def is_or_are(count: int) -> str:
    """Return the verb for `count` things."""
    return "is" if count == 1 else "are"


def list_classes(names: Sequence[str]) -> str:
    """Return ``The class `a` `` or ``The classes `a`, `b` ``, in which the first `SHOWN` are named."""
    listed = ", ".join(f"`{quote_path(name)}`" for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"The class{'es' if len(names) > 1 else ''} {listed}"
