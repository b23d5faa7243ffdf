import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.optim.flat import batches, join, write_


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
    write_(tensors, torch.arange(23.0), torch.Generator())
    assert torch.equal(join(tensors), torch.arange(23.0))
    assert tensors[1].tolist() == [[3.0, 4.0], [5.0, 6.0]]


def test_a_tensor_alone_is_not_copied():
    tensor = torch.zeros(2, 3)
    assert join([tensor]) is tensor
