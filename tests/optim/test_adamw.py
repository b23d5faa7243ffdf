import copy

import torch

from aquatint.optim.adamw import AdamW

from .test_create import model, train

SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def test_it_has_the_bits_and_the_state_of_torchs_own():
    ours, theirs = model(), model()
    optimizer, reference = AdamW(ours.parameters(), **SETTINGS), torch.optim.AdamW(theirs.parameters(), **SETTINGS, fused=True)
    train(ours, optimizer, range(5))
    train(theirs, reference, range(5))
    for param, twin in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(param, twin)
        assert optimizer.state[param].keys() == reference.state[twin].keys()
        assert all(torch.equal(value, reference.state[twin][key]) for key, value in optimizer.state[param].items())
    assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]


def test_each_goes_on_where_the_other_was():
    ours, theirs = model(), model()
    optimizer, reference = AdamW(ours.parameters(), **SETTINGS), torch.optim.AdamW(theirs.parameters(), **SETTINGS, fused=True)
    train(ours, optimizer, range(3))
    theirs.load_state_dict(ours.state_dict())
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(ours, optimizer, range(3, 6))
    train(theirs, reference, range(3, 6))
    assert all(torch.equal(param, twin) for param, twin in zip(ours.parameters(), theirs.parameters(), strict=True))
