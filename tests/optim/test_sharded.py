import json

import pytest
import torch

from aquatint.optim.sharded import Place, is_dtensor, local, place_of

from .test_create import SETTINGS


def test_a_plain_tensor_is_its_own_part():
    tensor = torch.ones(3, 5)
    assert place_of(tensor) == Place(tensor.shape, 0, 15)
    assert local(tensor) is tensor
    assert not is_dtensor(tensor)


@pytest.mark.parametrize(("rows", "parts"), [(5, 2), (5, 4), (1, 2), (8, 4), (9, 4), (6, 4), (4, 4)])
def test_a_part_is_empty_where_torch_leaves_no_chunk_for_it(rows, parts):
    chunks = torch.ones(rows, 3).chunk(parts)
    assert Place(torch.Size([rows, 3]), 0, chunks[0].numel(), parts).is_everywhere == (len(chunks) == parts)


@pytest.mark.long
def test_two_processes_make_the_steps_of_one(tmp_path):
    from .sharded_steps import PROCESSES, differences

    torch.multiprocessing.spawn(differences, (str(tmp_path),), PROCESSES)
    for rank in range(PROCESSES):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["differences"] == {}
        assert [text.split(":")[0] for text in found["refusals"]] == [name for name in SETTINGS if name != "adamw"]
