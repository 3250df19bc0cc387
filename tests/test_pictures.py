"""Pictures: what `Run.show` leaves for people to look at."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import clframe
from clframe import Plugin, hookimpl
from clframe.data.pictures import GAP, draw_grid, encode_png


def test_a_grid_holds_every_image_enlarged_in_its_place():
    images = torch.linspace(0, 1, 3).view(3, 1, 1, 1).expand(3, 1, 8, 16)
    picture = draw_grid(images)
    assert picture.dtype == torch.uint8
    assert tuple(picture.shape) == (2 * 16 + 3 * GAP, 2 * 32 + 3 * GAP, 3)  # each image twice its size
    assert (picture[GAP : GAP + 16, GAP : GAP + 32] == 0).all()
    assert (picture[GAP : GAP + 16, 2 * GAP + 32 : 2 * GAP + 64] == 128).all()
    assert (picture[2 * GAP + 16 :, GAP:] == 255).all()  # the third is white, and so is the empty place
    assert (picture[:GAP] == 255).all()


def test_colours_stay_and_values_beyond_the_range_are_cut():
    image = torch.tensor([2.0, 0.5, -1.0]).view(1, 3, 1, 1).expand(1, 3, 40, 40)
    picture = draw_grid(image)
    assert picture[GAP, GAP].tolist() == [255, 128, 0]
    assert tuple(picture.shape) == (40 + 2 * GAP, 40 + 2 * GAP, 3)
    assert (np.asarray(Image.open(BytesIO(encode_png(picture.numpy())))) == picture.numpy()).all()


def test_a_run_keeps_what_a_plugin_shows(tiny, tmp_path: Path):
    class Showing(Plugin):
        name = "showing"
        observer = True

        @hookimpl
        def after_experience(self, run, experience):
            run.log_images("showing/first", experience.train.x[:4])

    scenario = tiny(shape=(1, 8, 8))
    clframe.run(scenario, "mlp-100", [Showing()], run={"output": str(tmp_path / "run"), "tensorboard": True})
    files = sorted(p.name for p in (tmp_path / "run" / "pictures").iterdir())
    assert files == ["showing-first-1.png", "showing-first-2.png", "showing-first-3.png"]
    shown = np.asarray(Image.open(tmp_path / "run" / "pictures" / files[1]))
    assert (shown == draw_grid(scenario[1].train.x[:4] / 255).numpy()).all()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    written = events.Images("showing/first")
    assert [event.step for event in written] == [1, 2, 3]
    assert (np.asarray(Image.open(BytesIO(written[1].encoded_image_string))) == shown).all()
