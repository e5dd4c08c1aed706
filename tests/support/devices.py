"""Where a test of device code runs: on the CPU always, on a CUDA device where there is one."""

import pytest
import torch

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])
devices = pytest.mark.parametrize("device", ["cpu", CUDA])
