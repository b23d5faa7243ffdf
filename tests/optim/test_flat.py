import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.optim import flat
from aquatint.optim.flat import batches, join, pieces, row_pieces, spread_


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=12))
def test_batches_keep_order_kind_and_size(sizes_and_kinds):
    tensors = [torch.empty(size, dtype=torch.float32 if kind else torch.bfloat16) for size, kind in sizes_and_kinds]
    made = list(batches(tensors, lambda tensor: tensor.dtype, 10))
    assert [id(tensor) for batch in made for tensor in batch] == [id(tensor) for tensor in tensors]
    for batch in made:
        assert len({tensor.dtype for tensor in batch}) == 1
        assert len(batch) == 1 or sum(tensor.numel() for tensor in batch) <= 10


def test_small_neighbours_share_a_batch():
    sizes = [[tensor.numel() for tensor in batch] for batch in batches([torch.empty(n) for n in (3, 4, 5, 20, 1, 1)], torch.is_tensor, 10)]
    assert sizes == [[3, 4], [5], [20], [1, 1]]


def test_what_was_joined_is_written_back_to_its_places():
    tensors = [torch.zeros(3), torch.zeros(2, 2), torch.zeros(1, 4, 2, 2).to(memory_format=torch.channels_last)]
    joined = join(tensors)
    assert joined.shape == (3 + 4 + 16,)
    spread_(torch.arange(23.0), tensors)
    assert torch.equal(join(tensors), torch.arange(23.0))
    assert tensors[1].tolist() == [[3.0, 4.0], [5.0, 6.0]]


def test_a_tensor_alone_is_not_copied():
    tensor = torch.zeros(2, 3)
    vector = join([tensor])
    vector[4] = 1.0
    spread_(vector, [tensor])
    assert tensor[1, 1] == 1.0


def test_a_tensor_in_another_memory_format_is_written_back():
    tensor = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    spread_(join([tensor]) + 1, [tensor])
    assert (tensor == 1).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 100))
def test_pieces_cover_everything_once(rows, columns, size):
    tensor = torch.zeros(rows, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "CPU_PIECE", size)
        for piece in pieces(tensor.flatten()):
            tensor.view(-1)[piece] += 1
        for piece in row_pieces(tensor):
            tensor[piece] += 1
    assert (tensor == 2).all()
