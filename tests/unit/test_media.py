"""MP4 files and picture grids: they are written, decode to what was written, and have the size that is promised."""

import numpy as np
import pytest
import torch

from rcm_megatron.data.media import draw_grid, frame_strip, grid_size, to_frames, write_mp4, write_png
from tests.videos import read_mp4


def moving_square(frames=5, size=16):
    """A bright square that moves to the right by two pixels a frame, in [-1, 1], [1, T, H, W]."""
    video = torch.full((1, frames, size, size), -1.0)
    for t in range(frames):
        video[0, t, 4:8, 2 * t : 2 * t + 4] = 1.0
    return video


def test_small_grey_videos_are_enlarged_to_rgb():
    video = moving_square()
    frames = to_frames(video)
    assert frames.shape == (5, 128, 128, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames[:, ::8, ::8, 1], np.where(video[0].numpy() > 0, 255, 0))
    assert np.array_equal(to_frames(video, scale=1)[..., 0], frames[:, 7::8, 7::8, 2])


def test_pixels_outside_the_range_are_clamped_and_large_videos_kept():
    frames = to_frames(torch.stack([torch.full((2, 140, 150), value) for value in (-3.0, 0.0, 3.0)]))
    assert frames.shape == (2, 140, 150, 3)
    assert frames[0, 0, 0].tolist() == [0, 128, 255]


def test_latents_are_refused():
    with pytest.raises(ValueError, match="got 16 channels"):
        to_frames(torch.zeros(16, 2, 8, 8))


@pytest.mark.parametrize("loops", [1, 3])
def test_mp4_decodes_to_what_was_written(tmp_path, loops):
    frames = to_frames(moving_square())
    path = write_mp4(tmp_path / "new" / "square.mp4", frames, fps=4, loops=loops)
    decoded = read_mp4(path)
    assert decoded.shape == (5 * loops, 128, 128, 3)
    error = np.abs(decoded.astype(int) - np.concatenate([frames] * loops).astype(int)).mean()
    assert error < 4, f"mean difference of {error:.1f} grey levels"


def test_odd_sides_lose_their_last_pixel(tmp_path):
    frames = to_frames(torch.zeros(3, 2, 131, 140))
    assert read_mp4(write_mp4(tmp_path / "odd.mp4", frames, fps=8)).shape == (2, 130, 140, 3)


def test_grid_png_has_its_size_and_its_pixels(tmp_path):
    image = pytest.importorskip("PIL.Image")
    strip = frame_strip(to_frames(moving_square(), scale=2), gap=1)
    assert strip.shape == (32, 5 * 32 + 4, 3)
    cells = [[strip, 255 - strip], [strip, strip], [strip, strip]]
    picture = draw_grid(cells, row_labels=["a", "b", "c"], captions=["one", "two"], title="title", label_width=60)
    height, width = grid_size(3, 2, *strip.shape[:2], label_width=60)
    assert picture.shape == (height, width, 3)
    top = height - 3 * (32 + 8)
    for row in range(3):
        for column in range(2):
            y, x = top + row * 40, 60 + column * (164 + 8)
            assert np.array_equal(picture[y : y + 32, x : x + 164], cells[row][column]), f"cell {row}, {column}"
    assert (picture[:top] < 255).any() and (picture[top:, :60] < 255).any(), "no title, captions or labels"
    path = write_png(tmp_path / "grid.png", picture)
    assert image.open(path).size == (width, height)
