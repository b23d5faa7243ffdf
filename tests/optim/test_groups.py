import pytest

from aquatint.optim.groups import GroupSettings, first_fit, fits


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("down_blocks.1", ["down_blocks.1.resnets.0.conv1.weight"]),
        ("down_blocks.*", ["down_blocks.1.resnets.0.conv1.weight", "down_blocks.10.attn2.to_q.weight"]),
        ("down_blocks.1*", ["down_blocks.1.resnets.0.conv1.weight", "down_blocks.10.attn2.to_q.weight"]),
        ("*.attn2", ["down_blocks.10.attn2.to_q.weight"]),
        ("*.attn2.*", ["down_blocks.10.attn2.to_q.weight"]),
        ("*.weight", ["down_blocks.1.resnets.0.conv1.weight", "down_blocks.10.attn2.to_q.weight"]),
        ("conv_in", ["conv_in.bias"]),
        ("conv_in.bias", ["conv_in.bias"]),
        ("conv", []),
        ("attn2", []),
        ("CONV_IN", []),
    ],
)
def test_a_pattern_names_tensors_or_what_they_are_in(pattern, expected):
    names = ["conv_in.bias", "down_blocks.1.resnets.0.conv1.weight", "down_blocks.10.attn2.to_q.weight"]
    assert [name for name in names if fits(name, pattern)] == expected


def test_the_first_group_that_fits_counts():
    names = ["a.x", "a.y", "b.x", "c.z"]
    assert first_fit(names, [["a.x", "b"], ["a", "*.x"]]) == {"a.x": 0, "a.y": 1, "b.x": 0}
    assert first_fit(names, []) == {}


def test_a_factor_of_nothing_is_frozen():
    assert GroupSettings(0.0, 0.1).is_frozen
    assert not GroupSettings(1e-3, 0.0).is_frozen
