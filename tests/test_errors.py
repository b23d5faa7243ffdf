import pytest
import torch

from aquatint.errors import UsageError, full_memory


@pytest.mark.parametrize(
    ("error", "which"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "GPU"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "GPU"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), "GPU"),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), "GPU"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "GPU"),
        (MemoryError(), "main"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), "main"),
        (RuntimeError("shapes differ"), None),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (UsageError("a batch of 2 does not fit", hint="set this"), None),
    ],
)
def test_an_error_that_says_which_memory_is_full_is_known(error, which):
    assert full_memory(error) == which
