"""Image classification: scikit-learn's digits, and TensorFlow Datasets without TensorFlow."""

from typing import Any

import numpy as np

from efficient.data.pipeline import Example, source, spec_of
from efficient.errors import UserError, optional

# Of the digits of each class, in the order of the data set, every fifth is held out.
_HELD_OUT_EVERY = 5


class ArraySource:
    """Examples that are the rows of arrays in memory."""

    def __init__(self, arrays: dict[str, np.ndarray], facts: dict):
        self._arrays = arrays
        self.facts = facts
        self.spec = spec_of(self[0])

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, index: int) -> Example:
        return {key: np.asarray(array[index]) for key, array in self._arrays.items()}


@source("digits")
def digits(split: str) -> ArraySource:
    """The 1797 handwritten digits of scikit-learn (UCI optdigits, test part).

    Examples: image float32 [8, 8, 1] in [0, 1]; label int32 [].
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    rank = np.zeros(len(data.target), np.int64)
    for label in range(10):
        of_label = data.target == label
        rank[of_label] = np.arange(of_label.sum())
    held_out = rank % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    rows = held_out if split == "eval" else ~held_out
    arrays = {
        "image": (data.images[rows, :, :, None] / 16).astype(np.float32),
        "label": data.target[rows].astype(np.int32),
    }
    return ArraySource(arrays, {"num_classes": 10, "image_size": 8, "channels": 1})


@source("tfds")
def tfds(
    split: str,
    *,
    dataset: str,
    data_dir: str | None = None,
    train_split: str = "train",
    eval_split: str = "test",
    image_size: int | None = None,
    resize: str = "bilinear",
) -> "TfdsImages":
    """A data set of TensorFlow Datasets, read at random from ArrayRecord files.

    TensorFlow is needed neither here nor, for most data sets, to prepare the files:
    `tfds.builder(dataset, data_dir=..., file_format="array_record").download_and_prepare()`.
    Nothing is downloaded here.

    Examples: image float32 [S, S, C] in [0, 1] ([H, W, C] without `image_size`); label int32 [].

    Args:
      split: 'train' or 'eval'.
      dataset: name, as 'mnist' or 'imagenet2012:5.1.0'; it has the features image and label.
      data_dir: where it was prepared; None is the library's own default folder.
      train_split: the library's name or slice for 'train', as 'train[:90%]'.
      eval_split: the same for 'eval'.
      image_size: S. Images are cropped to their central square, then resized. None leaves them
        as they are, which needs all to have one shape.
      resize: 'bilinear' (antialiased) or 'nearest'.
    """
    if resize not in ("bilinear", "nearest"):
        raise UserError(f"tfds: data.resize must be 'bilinear' or 'nearest', not {resize!r}")
    if image_size is not None and image_size < 1:
        raise UserError(f"tfds: data.image_size must be at least 1, not {image_size}")
    examples = _open(dataset, train_split if split == "train" else eval_split, data_dir)
    return TfdsImages(examples, image_size, resize, dataset)


def _open(dataset: str, split: str, data_dir: str | None):
    tensorflow_datasets = optional("tensorflow_datasets", "data")
    try:
        return tensorflow_datasets.data_source(
            dataset, split=split, data_dir=data_dir, download=False
        )
    # The library raises many types for what is one mistake here, some with a page of text.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = "" if data_dir is None else f", data_dir={data_dir!r}"
        raise UserError(
            f"cannot open split {split!r} of the data set {dataset!r}: {reason} "
            f"To prepare it: tfds.builder({dataset!r}{where}, "
            'file_format="array_record").download_and_prepare()'
        ) from error


class TfdsImages:
    """Image and label of the examples of a TFDS data source."""

    def __init__(self, examples: Any, image_size: int | None, resize: str, dataset: str):
        features = examples.dataset_info.features
        if not {"image", "label"} <= set(features) or not hasattr(features["label"], "num_classes"):
            raise UserError(
                f"data set {dataset!r} has the features {sorted(features)}; "
                "an image and a class label are needed"
            )
        height, width, channels = features["image"].shape
        if image_size is None and None in (height, width):
            raise UserError(
                f"images of {dataset!r} have the shape {features['image'].shape}: "
                "set data.image_size to crop and resize them to one shape"
            )
        self._examples = examples
        self._image_size = image_size
        self._resize = resize
        self.facts = {
            "num_classes": features["label"].num_classes,
            "image_size": image_size or (height if height == width else (height, width)),
            "channels": channels,
        }
        self.spec = spec_of(self[0])

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        example = self._examples[index]
        image = example["image"]
        if self._image_size is not None:
            image = _square(image, self._image_size, self._resize)
        return {
            "image": image.astype(np.float32) / 255,
            "label": np.array(example["label"], np.int32),
        }


def _square(image: np.ndarray, size: int, resize: str) -> np.ndarray:
    """The central square of a uint8 image [H, W, C], resized to [size, size, C]."""
    Image = optional("PIL.Image", "data")
    height, width, channels = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    method = Image.Resampling.BILINEAR if resize == "bilinear" else Image.Resampling.NEAREST
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    return np.asarray(picture.resize((size, size), method)).reshape(size, size, channels)
