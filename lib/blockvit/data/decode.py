"""From an image's file, whatever kind of image it holds, to RGB.

As torchvision's reference does it (``ImageFolder`` with Pillow's ``convert("RGB")``), with one exception:

- grey images get three equal channels, palettes are looked up, CMYK is converted by Pillow (inverted if the file
  says so, as Adobe's do), an alpha channel is dropped without blending;
- an orientation in the EXIF data is ignored, as there: a photograph that was turned in the camera stays as it was
  stored. Published accuracies were measured so;
- images of 16 bits a channel keep their upper eight. Pillow, and so the reference, turns nearly all of a grey one
  white instead.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
from PIL import Image

# Pillow looks into the EXIF data for the resolution and warns of damage there, which says nothing about the pixels.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class UndecodableError(OSError):
    """A file that cannot be read, or that is no image, or only a part of one."""


def decode(path: str | os.PathLike[str]) -> Image.Image:
    """The image in a file, in RGB.

    Raises:
        UndecodableError: names the file and what is wrong with it.
    """
    try:
        with Image.open(path) as image:
            return _rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise anything: OSError, SyntaxError, struct.error, ...
        raise UndecodableError(f"cannot decode {path}: {error}; replace, remove or make it readable") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" and, from older versions of Pillow, "I": 16 bits in each pixel
        upper = np.clip(np.asarray(image.convert("I")), 0, 0xFFFF) >> 8
        image = Image.fromarray(upper.astype(np.uint8))
    return image.convert("RGB")
