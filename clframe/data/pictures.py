"""Pictures for users: images of a run side by side, as PNG files."""

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

TILE = 32  # pixels at least along each side of an image: smaller images are enlarged
GAP = 2  # pixels between images
CAPTION = 16  # height of a line of text in pixels


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
