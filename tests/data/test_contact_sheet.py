import numpy as np

from aquatint.data import contact_sheet as module
from aquatint.data.contact_sheet import contact_sheet


def test_a_contact_sheet_shows_every_picture_whole_and_labels_below_it():
    images = [np.full((60, 90, 3), (40 * index, 0, 0), np.uint8) for index in range(1, 6)]
    sheet = contact_sheet(images, [f"a red fox number {index} in the deep snow" for index in range(5)], columns=3)
    for image in images:
        assert (sheet == image[0, 0]).all(axis=-1).sum() == 60 * 90
    label = sheet[16 + 60 : 16 + 60 + 16, 16 : 16 + 90]
    assert label.min() < 60
    assert (sheet[-1] == 255).all()
    assert sheet.shape[1] == 3 * (90 + 16) + 16


def test_a_contact_sheet_takes_pictures_of_different_sizes_and_very_long_labels():
    images = [np.zeros((64, 32, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)]
    sheet = contact_sheet(images, ["w" * 5000, ""], columns=2)
    assert sheet.shape[1] == 2 * (64 + 16) + 16
    assert sheet.shape[0] < 400


def test_labels_are_wrapped_between_words_to_the_width():
    font = module.ImageFont.load_default(size=12)
    lines = module._wrap("the quick brown fox jumps over the lazy dog", font, 100)
    assert " ".join(lines) == "the quick brown fox jumps over the lazy dog"
    assert len(lines) > 1
    assert max(font.getlength(line) for line in lines) <= 100
