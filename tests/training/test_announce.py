from dataclasses import replace
from types import SimpleNamespace

import pytest

from aquatint.models.sdxl.load import open_base
from aquatint.training.announce import captions_text, mix_lines, objective_lines
from aquatint.training.objectives import choose_objective, choose_process
from tests.runs import small_config
from tests.training.manifests import Row, layout_of, some


@pytest.fixture
def config(tmp_path):
    (tmp_path / "pictures").mkdir()

    def build(*sources, **sections):
        data = {"sources": [{"path": f"/{index}", **source} for index, source in enumerate(sources or ({},))]}
        return small_config(tmp_path, tmp_path / "base.safetensors", data=data, validation={"every": None}, **sections)

    return build


def test_one_source_is_all_there_is(config):
    assert list(mix_lines(layout_of(config(), some(8)))) == []
    assert list(mix_lines(layout_of(config({}, {"role": "validation"}), [*some(8), Row(90, source=1)]))) == []


def test_of_several_sources_each_says_what_it_gives(config):
    sources = ({"repeats": 3}, {"share": 0.2, "role": "regularization"}, {"path": "s3://user:secret@bucket/a", "repeats": 0.5})
    rows = some(4) + some(10, 100, source=1) + some(8, 200, source=2)
    assert list(mix_lines(layout_of(config(*sources), rows))) == [
        "/0: 4 pictures, 60.0% of the samples",
        "/1: 10 pictures, 20.0% of the samples, for regularization",
        "s3://bucket/a: 8 pictures, 20.0% of the samples",
    ]


@pytest.mark.parametrize("text", ["cached", "online"])
def test_captions_are_told_as_they_are_rendered(config, text):
    rows = [Row(index, captions=(f"a, {index}",)) for index in range(6)]
    told = captions_text(layout_of(config({"trigger": "ohwx"}, captions={"style": "tags", "text": text}), rows))
    assert told.startswith("6 captions of ")
    assert '"ohwx, a, 0"' in told


def test_of_many_captions_a_part_is_told(config, monkeypatch):
    from aquatint.training import announce

    monkeypatch.setattr(announce, "MAX_COUNTED_CAPTIONS", 4)
    layout = layout_of(config(), some(10))
    assert captions_text(layout).startswith("4 captions of ")
    assert captions_text(replace(layout)) == captions_text(layout)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({}, ["v_prediction, with zero terminal SNR, loss weight 0.00425 to 1"]),
        (
            {"diffusion": {"weighting": "min_snr"}},
            [
                "v_prediction, with zero terminal SNR, loss weight 0.05 to 0.832",
                "min_snr would give pure noise, the last timestep, the weight 0: it gets 0.05",
            ],
        ),
        (
            {"diffusion": {"weighting": "learned", "loss": "huber"}, "timesteps": {"density": "cosmap"}},
            ["v_prediction, with zero terminal SNR, huber loss, loss weight learned from the loss itself", "timesteps: density cosmap"],
        ),
        (
            {"model": {"prediction": "flow", "zero_terminal_snr": False}},
            ["rectified flow (noise less picture), loss weight 1 everywhere"],
        ),
        (
            {"model": {"prediction": "epsilon", "zero_terminal_snr": False}, "noise": {"offset": 0.05}},
            ["epsilon (the noise), without zero terminal SNR, loss weight 1 everywhere", "noise: offset 0.05"],
        ),
    ],
)
def test_what_is_learned_is_said_with_what_is_special_about_it(tmp_path, tiny_base, sections, words):
    settings = small_config(tmp_path, tiny_base, **sections)
    base = open_base(tiny_base)
    parts = SimpleNamespace(objective=choose_objective(settings, base))
    assert list(objective_lines(settings, choose_process(settings, base), parts)) == words
