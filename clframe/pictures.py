"""Pictures for people: images of a run side by side, as PNG."""

from __future__ import annotations

import math
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

TILE = 32  # pixels at least along each side of an image: smaller ones are enlarged
GAP = 2


def grid(images: Tensor) -> Tensor:
    """Images [N, C, h, w] from 0 to 1 as one picture [H, W, 3] uint8, row by row, about as wide as high.

    Where C is neither 1 nor 3 the first channel is shown.
    """
    import torch
    from torch.nn import functional

    count, channels, height, width = images.shape
    if channels != 3:
        images = images[:, :1].expand(-1, 3, -1, -1)
    times = max(1, math.ceil(TILE / max(height, width)))
    tiles = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    tiles = functional.pad(tiles.repeat_interleave(times, 2).repeat_interleave(times, 3), (GAP, 0, GAP, 0), value=255)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = torch.cat([tiles, tiles.new_full((rows * columns - count, *tiles.shape[1:]), 255)])
    rowwise = tiles.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)  # rows, h, columns, w, colours
    return functional.pad(rowwise.flatten(2, 3).flatten(0, 1), (0, 0, 0, GAP, 0, GAP), value=255)


def png(image: NDArray[np.uint8]) -> bytes:
    """`image` [H, W, 3] as a PNG file."""
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
