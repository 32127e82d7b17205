"""scikit-learn's handwritten digits: 1,797 greyscale images of 8x8 pixels, offline and in a second."""

import numpy as np
import PIL.Image

from fedtalora_flwr.data.source import NO_ROWS, Source, Split


def create() -> Source:
    """Read the digits; scikit-learn gives no test split, so that `test_fraction` of each is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    ink = digits.images  # (1797, 8, 8), whole numbers in [0, 16]
    pixels = np.rint(ink * (255 / 16)).astype(np.uint8)
    return Source(
        name="digits",
        modality="image",
        class_names=tuple(str(name) for name in digits.target_names),
        train=Split(
            labels=digits.target.astype(np.int64),
            read=lambda rows: [PIL.Image.fromarray(pixels[row]) for row in rows],
        ),
        test=NO_ROWS,
    )
