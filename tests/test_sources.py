from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from clframe.errors import DataError
from clframe.scenarios import sources

IDX = sources.IDX_FILES


def parts(shape=(28, 28), classes=10, train=20, test=10):
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(256, size=(train, *shape), dtype=np.uint8),
        "y_train": (np.arange(train) % classes).astype(np.uint8),
        "x_test": rng.integers(256, size=(test, *shape), dtype=np.uint8),
        "y_test": (np.arange(test) % classes).astype(np.uint8),
    }


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder, data, packed=False):
    folder.mkdir(parents=True)
    for name, key in zip(IDX, sources.PARTS, strict=True):
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(data[key])))
        else:
            (folder / name).write_bytes(idx(data[key]))


def write_cifar(folder, data, source, monkeypatch):
    """torchvision's layout, its checksums replaced by those of these few images."""
    from torchvision import datasets

    folder.mkdir(parents=True)
    dataset = getattr(datasets, source.title)
    label = "labels" if source.title == "CIFAR10" else "fine_labels"
    rows = {key: data[f"x_{key}"].transpose(0, 3, 1, 2).reshape(-1, 3072) for key in ("train", "test")}

    def write(name, content):
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    def listed(names, part):
        pieces = zip(
            names, np.array_split(rows[part], len(names)), np.array_split(data[f"y_{part}"], len(names)), strict=True
        )
        return [[name, write(name, {"data": x, label: y.tolist()})] for name, x, y in pieces]

    monkeypatch.setattr(dataset, "train_list", listed([name for name, _ in dataset.train_list], "train"))
    monkeypatch.setattr(dataset, "test_list", listed([name for name, _ in dataset.test_list], "test"))
    meta = dict(dataset.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: list(source.class_names)})
    monkeypatch.setattr(dataset, "meta", meta)


def assert_holds(arrays, data, channels_last):
    for key in ("x_train", "x_test"):
        expected = data[key].transpose(0, 3, 1, 2) if channels_last else data[key][:, None]
        assert arrays.part(key[2:])[0].is_contiguous()
        np.testing.assert_array_equal(arrays.part(key[2:])[0].numpy(), expected)
        np.testing.assert_array_equal(arrays.part(key[2:])[1].numpy(), data["y" + key[1:]])


@pytest.fixture
def offline(monkeypatch):
    from torchvision.datasets import utils

    def fail(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(utils.urllib.request, "urlopen", fail)


def refusal(name, root):
    """The one sentence of the `DataError`."""
    with pytest.raises(DataError) as caught:
        sources.load(name, root)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert caught.value.code == 3
    return sentence


# What is found, and where


def test_npz_of_keras_is_read(tmp_path):
    data = parts()
    np.savez_compressed(tmp_path / "mnist.npz", **data)
    arrays = sources.load("mnist", tmp_path)
    assert_holds(arrays, data, channels_last=False)
    assert arrays.class_names == tuple("0123456789")
    assert arrays.x_train.shape == (20, 1, 28, 28)


def test_npz_may_have_a_channel_axis_and_labels_in_a_column(tmp_path):
    data = parts()
    columns = {key: array[..., None] for key, array in data.items()}
    np.savez(tmp_path / "fmnist.npz", **columns)
    arrays = sources.load("fmnist", tmp_path)
    assert_holds(arrays, data, channels_last=False)
    assert arrays.class_names[-1] == "Ankle boot"


def test_npz_of_colour_images_becomes_channels_first(tmp_path):
    data = parts((32, 32, 3), classes=100, train=100, test=100)
    np.savez(tmp_path / "cifar100.npz", **data)
    arrays = sources.load("cifar100", tmp_path)
    assert_holds(arrays, data, channels_last=True)
    assert len(arrays.class_names) == 100
    assert list(arrays.class_names) == sorted(arrays.class_names)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST/raw"), ("fmnist", "FashionMNIST/raw")])
def test_idx_files_of_torchvisions_layout_are_read(tmp_path, name, folder, packed):
    data = parts()
    write_idx(tmp_path / folder, data, packed)
    before = sorted(tmp_path.rglob("*"))
    assert_holds(sources.load(name, tmp_path), data, channels_last=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_idx_files_are_those_that_torchvision_reads(tmp_path):
    from torchvision.datasets import MNIST

    data = parts()
    write_idx(tmp_path / "MNIST" / "raw", data)
    ours = sources.load("mnist", tmp_path)
    theirs = MNIST(tmp_path, train=False)
    assert (theirs.data == ours.x_test[:, 0]).all()
    assert (theirs.targets == ours.y_test).all()


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_in_torchvisions_layout_is_read(tmp_path, name, classes, monkeypatch):
    data = parts((32, 32, 3), classes, train=25, test=10)
    write_cifar(tmp_path / sources.SOURCES[name].folder, data, sources.SOURCES[name], monkeypatch)
    assert_holds(sources.load(name, tmp_path), data, channels_last=True)


def test_npz_comes_before_torchvisions_layout(tmp_path):
    first, second = parts(), parts(train=30)
    write_idx(tmp_path / "MNIST" / "raw", second)
    assert len(sources.load("mnist", tmp_path).y_train) == 30
    np.savez(tmp_path / "mnist.npz", **first)
    assert len(sources.load("mnist", tmp_path).y_train) == 20


def test_found_tells_where_each_data_set_is(tmp_path):
    assert sources.find_all(tmp_path / "nowhere") == [
        (name, None) for name in ("mnist", "fmnist", "cifar10", "cifar100")
    ]
    (tmp_path / "mnist.npz").touch()
    write_idx(tmp_path / "FashionMNIST" / "raw", parts(), packed=True)
    (tmp_path / "cifar-100-python").mkdir()
    assert dict(sources.find_all(tmp_path)) == {
        "mnist": tmp_path / "mnist.npz",
        "fmnist": tmp_path / "FashionMNIST" / "raw",
        "cifar10": None,
        "cifar100": None,
    }


# Damaged files


def test_npz_that_is_cut_off(tmp_path):
    np.savez(tmp_path / "mnist.npz", **parts())
    whole = (tmp_path / "mnist.npz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello", pickle.dumps([1])):
        (tmp_path / "mnist.npz").write_bytes(content)
        sentence = refusal("mnist", tmp_path)
        assert sentence.startswith(f"{tmp_path / 'mnist.npz'} cannot be read")
        assert "cut off" in sentence
        assert "whole copy" in sentence


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_one_flipped_bit(tmp_path, save):
    save(tmp_path / "mnist.npz", **parts())
    content = bytearray((tmp_path / "mnist.npz").read_bytes())
    content[8000] ^= 16
    (tmp_path / "mnist.npz").write_bytes(content)
    assert "damaged" in refusal("mnist", tmp_path)


def test_npz_that_holds_a_pickle_is_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "trapped",))

    data = parts()
    data["y_train"] = np.array([Trap()] * 20, dtype=object)
    np.savez(tmp_path / "mnist.npz", **data)
    assert "cannot be read" in refusal("mnist", tmp_path)
    assert not (tmp_path / "trapped").exists()


def test_npz_whose_header_claims_more_than_memory_holds(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 55,)})
    with zipfile.ZipFile(tmp_path / "mnist.npz", "w") as file:
        for key in sources.PARTS:
            file.writestr(f"{key}.npy", header.getvalue())
    assert "cannot be read" in refusal("mnist", tmp_path)


def test_npz_with_other_keys(tmp_path):
    data = parts()
    np.savez(tmp_path / "mnist.npz", x_train=data["x_train"], labels=data["y_train"])
    sentence = refusal("mnist", tmp_path)
    assert sentence == (
        f"{tmp_path / 'mnist.npz'} lacks the arrays y_train, x_test, y_test (it has x_train, labels); "
        "save x_train, y_train, x_test, y_test in it."
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"x_train": np.zeros((20, 28, 27), np.uint8)},
            "`x_train` .* is uint8 [20, 28, 27]; MNIST is uint8 [N, 28, 28, 1]",
        ),
        ({"x_test": np.zeros((10, 32, 32, 3), np.uint8)}, "`x_test` .* is uint8 [10, 32, 32, 3]"),
        ({"x_test": np.zeros((10, 28, 28))}, "`x_test` .* is float64 [10, 28, 28]"),
        ({"x_train": np.zeros((20, 784), np.uint8)}, "`x_train` .* is uint8 [20, 784]"),
        ({"y_train": np.zeros((20, 10), np.uint8)}, "`y_train` .* is uint8 [20, 10]; labels are integers"),
        ({"y_test": np.zeros(10)}, "`y_test` .* is float64 [10]; labels are integers"),
        (
            {"y_train": np.full(20, 10)},
            "does not hold MNIST: The training labels .* from 10 to 10; .* 10 classes .* 0 to 9",
        ),
        ({"y_test": np.full(10, -1)}, "does not hold MNIST: The test labels .* from -1 to -1"),
        ({"y_train": np.zeros(19, np.uint8)}, "20 training images and 19 labels"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8), "y_test": np.zeros(0, np.uint8)}, "no test images"),
    ],
)
def test_npz_with_other_contents(tmp_path, change, words):
    np.savez(tmp_path / "mnist.npz", **(parts() | change))
    sentence = refusal("mnist", tmp_path)
    assert str(tmp_path / "mnist.npz") in sentence
    rest = sentence
    for piece in words.split(" .* "):
        assert piece in rest
        rest = rest[rest.index(piece) :]


def test_idx_files_that_are_damaged(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    write_idx(folder, parts())
    whole = (folder / IDX[0]).read_bytes()
    for content in (whole[:-1], whole[:7], b"", b"\x00\x00\x0d" + whole[3:], whole + b"x"):
        (folder / IDX[0]).write_bytes(content)
        assert refusal("mnist", tmp_path).startswith(f"{folder / IDX[0]} cannot be read")
    (folder / IDX[0]).unlink()
    sentence = refusal("mnist", tmp_path)
    assert sentence.startswith(f"{folder} lacks {IDX[0]}; ")
    packed = gzip.compress(whole)
    (folder / f"{IDX[0]}.gz").write_bytes(packed[:-20])
    assert refusal("mnist", tmp_path).startswith(f"{folder / IDX[0]}.gz cannot be read")


def test_idx_files_whose_numbers_differ(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", parts() | {"y_test": np.zeros(9, np.uint8)})
    assert "10 test images and 9 labels" in refusal("mnist", tmp_path)


def test_cifar_whose_checksum_differs_is_not_unpickled(tmp_path, monkeypatch):
    source = sources.SOURCES["cifar10"]
    folder = tmp_path / source.folder
    write_cifar(folder, parts((32, 32, 3)), source, monkeypatch)
    content = bytearray((folder / "data_batch_2").read_bytes())
    content[-100] ^= 1
    (folder / "data_batch_2").write_bytes(content)
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    sentence = refusal("cifar10", tmp_path)
    assert sentence.startswith(f"{folder} does not hold CIFAR10 as it was published: a checksum differs")
    (folder / "test_batch").unlink()
    assert refusal("cifar10", tmp_path).startswith(f"{folder} lacks test_batch")


# Downloads


@pytest.mark.parametrize("name", ["mnist", "fmnist", "cifar10", "cifar100"])
def test_without_a_network_one_sentence_says_what_to_put_where(tmp_path, offline, name):
    root = tmp_path / "data"
    sentence = refusal(name, root)
    source = sources.SOURCES[name]
    assert sentence.startswith(f"{source.title} is not in {root} and cannot be downloaded (")
    for words in (root / f"{name}.npz", root / source.folder, "--data-root", *sources.PARTS):
        assert str(words) in sentence
    for scenario in ("split-digits", "permuted-digits", "rotated-digits"):
        assert scenario in sentence
    assert not root.exists()


def served(monkeypatch, files):
    """Have torchvision's downloader write `files` (by name) instead of contacting anything."""
    from torchvision.datasets import utils

    def retrieve(url, path, **_):
        print("Downloading", url)
        Path(path).write_bytes(files[Path(path).name])

    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(utils, "_urlretrieve", retrieve)


def test_a_download_lands_in_torchvisions_layout(tmp_path, monkeypatch, capsys):
    from torchvision import datasets

    data = parts()
    files = {f"{n}.gz": gzip.compress(idx(data[k])) for n, k in zip(IDX, sources.PARTS, strict=True)}
    served(monkeypatch, files)
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in files.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    assert_holds(sources.load("mnist", tmp_path), data, channels_last=False)
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]
    assert dict(sources.find_all(tmp_path))["mnist"] == tmp_path / "MNIST" / "raw"
    assert capsys.readouterr().out == ""
    served(monkeypatch, {})
    assert_holds(sources.load("mnist", tmp_path), data, channels_last=False)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_download_with_another_checksum_is_not_kept(tmp_path, monkeypatch, name):
    served(monkeypatch, {f"{n}.gz": b"?" for n in IDX} | {"cifar-10-python.tar.gz": b"?"})
    sentence = refusal(name, tmp_path)
    assert "was downloaded, but a checksum differs" in sentence
    assert str(tmp_path / f"{name}.npz") in sentence
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    from torchvision.datasets import utils

    def retrieve(url, path, **_):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(utils, "_urlretrieve", retrieve)
    with pytest.raises(KeyboardInterrupt):
        sources.load("cifar100", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_data_root_that_cannot_be_written(tmp_path, offline, monkeypatch):
    (tmp_path / "file").touch()
    sentence = refusal("mnist", tmp_path / "file")
    assert sentence.startswith(f"MNIST cannot be downloaded to {tmp_path / 'file'} (")
    assert "--data-root" in sentence

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    assert "(Permission denied)" in refusal("mnist", tmp_path)


def test_a_full_disk_while_downloading(tmp_path, monkeypatch):
    from torchvision.datasets import utils

    def retrieve(url, path, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(utils, "_urlretrieve", retrieve)
    assert "(No space left on device): make the folder writable, free some space" in refusal("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []
