"""Pictures for users: images of a run side by side, its accuracy matrix, PNG files."""

from __future__ import annotations

import math
from io import BytesIO
from typing import TYPE_CHECKING

from clframe.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from clframe.data.scenario import Scenario
    from clframe.metrics import Matrix

TILE = 32  # pixels at least along each side of an image: smaller images are enlarged
GAP = 2  # pixels between images
CAPTION = 16  # height of a line of text in pixels
MOST_ANNOTATED = 25  # experiences; the cells of a larger matrix are too small for readable figures
# red, green, blue at 0, 25, 50, 75 and 100 %, in even steps of lightness (0.97 to 0.33 in OKLab)
RAMP = ((253, 246, 212), (143, 210, 180), (31, 161, 173), (29, 100, 158), (39, 44, 108))
EMPTY = (235, 235, 235)  # not measured
DARK = 0.645  # text is black on a lighter cell, white from here on: its contrast is 4.5 or more (WCAG 2)


def draw_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Return images [N, C, h, w] from 0 to 1 as one picture [H, W, 3] uint8, row by row, about as wide as high.

    `columns` is the number of images in a row; None: chosen for a square. If C is neither 1 nor 3, the first channel is
    drawn.
    """
    import torch
    from torch.nn import functional

    count, channels, height, width = images.shape
    if channels != 3:
        images = images[:, :1].expand(-1, 3, -1, -1)
    times = max(1, math.ceil(TILE / max(height, width)))
    tiles = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    tiles = functional.pad(tiles.repeat_interleave(times, 2).repeat_interleave(times, 3), (GAP, 0, GAP, 0), value=255)
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = torch.cat([tiles, tiles.new_full((rows * columns - count, *tiles.shape[1:]), 255)])
    rowwise = tiles.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)  # rows, h, columns, w, colors
    return functional.pad(rowwise.flatten(2, 3).flatten(0, 1), (0, 0, 0, GAP, 0, GAP), value=255)


def draw_sheet(scenario: Scenario, columns: int = 12) -> NDArray[np.uint8]:
    """Draw training images of each experience of `scenario`, raw, in one picture [H, W, 3], each row with a caption.

    A row has `columns` images, divided among the classes in their order, if there are enough.

    Raises:
        UsageError: if the data of `scenario` are not images.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageDraw

    if len(scenario.input_shape) != 3:
        raise UsageError(
            f"The data of `{scenario.name}` are {list(scenario.input_shape)}, not images [channels, height, "
            "width]: there is nothing to draw, so leave out the sheet."
        )
    strips: list[NDArray[np.uint8]] = []
    for experience in scenario:
        data = experience.train
        labels = data.y.cpu()
        shares = torch.arange(len(experience.classes) + 1) * columns // len(experience.classes)
        where = [
            (labels == label).nonzero().flatten()[:count]
            for label, count in zip(experience.classes, shares.diff().tolist(), strict=True)
        ]
        shown = data.rows(torch.cat(where).to(data.device)).x.float() / scenario.transform.scale
        row = draw_grid(shown, columns).numpy()
        caption = Image.new("RGB", (row.shape[1], CAPTION), "white")
        names = ", ".join(scenario.class_names[label] for label in experience.classes)
        ImageDraw.Draw(caption).text((GAP, GAP), f"{experience.index + 1}: {names}", "black")
        strips += [np.asarray(caption), row]
    return np.concatenate(strips)


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Return `image` [H, W, 3] as the bytes of a PNG file."""
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def draw_matrix(matrix: Matrix, title: str) -> NDArray[np.uint8]:
    """Draw the accuracy matrix as an image [H, W, 3]: a row for each experience, values in %, gray if not measured."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    n = len(matrix[0])
    values = np.full((n, n), np.nan)
    values[: len(matrix)] = np.array(matrix, dtype=float)  # None becomes nan
    annotated = n <= MOST_ANNOTATED
    cell = max(72, 360 // n) if annotated else max(1, 800 // n)
    side = n * cell
    left = 100
    top = 56
    image = Image.new("RGB", (left + side + (28 if annotated else 116), top + side + 80), "white")
    canvas = ImageDraw.Draw(image)
    small = ImageFont.load_default(size=20)
    large = ImageFont.load_default(size=22)

    image.paste(Image.fromarray(shades(values).repeat(cell, axis=0).repeat(cell, axis=1)), (left, top))
    if annotated:
        for k in range(1, n):
            canvas.line((left + k * cell, top, left + k * cell, top + side), "white", width=2)
            canvas.line((left, top + k * cell, left + side, top + k * cell), "white", width=2)
        for i, j in np.argwhere(~np.isnan(values)).tolist():
            at = (left + (j + 0.5) * cell, top + (i + 0.5) * cell)
            color = "black" if values[i, j] < DARK else "white"
            canvas.text(at, f"{100 * values[i, j]:.1f}", color, small, anchor="mm")
    else:  # too small for figures: a scale beside the cells
        x = left + side + 28
        scale = shades(np.linspace(1, 0, side)[:, None])
        image.paste(Image.fromarray(scale.repeat(24, axis=1)), (x, top))
        for percent in range(0, 101, 20):
            canvas.text((x + 32, top + side * (1 - percent / 100)), str(percent), "black", small, anchor="lm")

    every = 1 if annotated else 5 * -(-n // 50)
    for k in range(every, n + 1, every):
        middle = (k - 0.5) * cell
        canvas.text((left + middle, top + side + 10), str(k), "black", small, anchor="mt")
        canvas.text((left - 10, top + middle), str(k), "black", small, anchor="rm")
    canvas.text((left, 18), f"Accuracy in %, {title}", "black", large, anchor="lt")
    canvas.text((left + side / 2, top + side + 66), "tested on experience", "black", large, anchor="ms")
    upright = Image.new("RGB", (side, 32), "white")
    ImageDraw.Draw(upright).text((side / 2, 24), "after learning experience", "black", large, anchor="ms")
    image.paste(upright.transpose(Image.Transpose.ROTATE_90), (10, top))
    return np.asarray(image)


def shades(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return colors [..., 3] of accuracies [...] from 0 to 1, the higher the darker; gray for nan."""
    import numpy as np

    at = np.linspace(0, 1, len(RAMP))
    colors = np.stack([np.interp(values, at, channel) for channel in zip(*RAMP, strict=True)], axis=-1)
    return np.where(np.isnan(values)[..., None], EMPTY, colors.round()).astype(np.uint8)
