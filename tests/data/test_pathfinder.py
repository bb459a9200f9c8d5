"""Pathfinder's labels against a flood fill of the magnified image, and its distribution."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from efficient.data import make_source
from efficient.data.pathfinder import STYLES, draw, render
from efficient.errors import UserError

SCALE = 8


def _joined_by_flood_fill(style, drawing):
    """Whether dashes join the markers, once gaps of the contours' own width are closed."""
    # Discs would join what they cover: only their centres count.
    bare = drawing._replace(markers=np.full((2, 2), -99.0))
    lit = render(style, bare, SCALE) > 0.3
    radius = style.margin + 0.1
    grid = np.arange(-int(radius * SCALE) - 1, int(radius * SCALE) + 2) / SCALE
    disk = np.hypot(*np.meshgrid(grid, grid)) <= radius
    regions, _ = ndimage.label(ndimage.binary_dilation(lit, disk))
    at = [regions[tuple(np.rint((m + 0.5) * SCALE).astype(int))] for m in drawing.markers]
    assert all(at), "a marker must lie on a contour"
    return at[0] == at[1]


@pytest.mark.parametrize(("size", "distractors", "count"), [(32, 0, 12), (32, 5, 12), (128, 8, 4)])
def test_labels_agree_with_a_flood_fill(size, distractors, count):
    # Thin lines: the distances between dashes are those between their centre lines.
    style = dataclasses.replace(STYLES[size], thickness=0.25, distractors=distractors)
    rng = np.random.default_rng(size + distractors)
    labels = []
    for _ in range(count):
        drawing = draw(style, rng)
        assert _joined_by_flood_fill(style, drawing) == bool(drawing.label)
        labels.append(drawing.label)
    assert len(set(labels)) == 2 or count < 10


def test_contours_have_the_generator_s_geometry():
    style = STYLES[32]
    rng = np.random.default_rng(0)
    for _ in range(10):
        drawing = draw(style, rng)
        starts = []
        for contour in np.unique(drawing.contours):
            dashes = drawing.dashes[drawing.contours == contour]
            assert len(dashes) == (14 if contour < 2 else 4)
            np.testing.assert_allclose(np.linalg.norm(np.diff(dashes, axis=1)[:, 0], axis=-1), 2)
            gaps = np.linalg.norm(dashes[1:, 0] - dashes[:-1, 1], axis=-1)
            assert np.all(gaps <= 2 + 1e-9)
            along = np.diff(dashes, axis=1)[:, 0] / 2
            turns = (along[1:] * along[:-1]).sum(-1)
            assert np.all(turns > 0), "a turn is below 90 degrees where continuity is 1"
            starts.append(dashes[0, 0])
        assert np.linalg.norm(starts[0] - starts[1]) == pytest.approx(7)
        assert drawing.dashes.min() >= 1
        assert drawing.dashes.max() <= 30


@pytest.mark.slow
def test_labels_are_balanced_and_images_show_ink():
    source = make_source("pathfinder", "train", form="image")
    examples = [source[i] for i in range(100)]
    labels = np.array([e["label"] for e in examples])
    # Five standard deviations of 100 fair coins.
    assert abs(labels.sum() - 50) < 25
    ink = np.array([e["image"].mean() for e in examples])
    # The amount of ink must not tell the label.
    assert 0.05 < ink.min() < ink.max() < 0.3
    difference = ink[labels == 1].mean() - ink[labels == 0].mean()
    assert abs(difference) < 5 * ink.std() * np.sqrt(4 / 100)
    assert all(e["image"].max() == 1 for e in examples)


def test_sequence_is_the_image_row_by_row():
    image = make_source("pathfinder", "eval", form="image")[3]
    sequence = make_source("pathfinder", "eval")[3]
    assert sequence["tokens"].shape == (1024,)
    # Tokens are pixels rounded to 256 levels: half a level apart at most.
    np.testing.assert_allclose(
        sequence["tokens"].reshape(32, 32) / 255, image["image"][..., 0], atol=0.5 / 255 + 1e-6
    )
    assert sequence["label"] == image["label"]


def test_a_magnified_drawing_covers_the_same_area():
    drawing = draw(STYLES[64], np.random.default_rng(3))
    plain = render(STYLES[64], drawing)
    large = render(STYLES[64], drawing, 6).reshape(64, 6, 64, 6).mean((1, 3))
    assert np.abs(plain - large).mean() < 0.01
    assert np.corrcoef(plain.ravel(), large.ravel())[0, 1] > 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 48}, "must be 32, 64 or 128"),
        ({"form": "pixels"}, "'sequence' or 'image'"),
        ({"distractors": -1}, "below 0"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, message):
    with pytest.raises(UserError) as error:
        make_source("pathfinder", "train", **arguments)
    assert message in str(error.value)
