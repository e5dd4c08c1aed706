"""TF32 on CUDA: within a network's forward and backward, and nowhere else."""

from contextlib import contextmanager

import pytest
import torch
from support import small_stage
from torch import nn
from torch.nn.modules import module

from pipelines.training import precision
from pipelines.training.loop import train_stage

WHOLE = "highest"


@pytest.mark.parametrize(("device", "within"), [("cpu", WHOLE), ("cuda", "high")])
def test_products_are_coarser_on_cuda_alone_and_whole_again_after_a_failure(device, within):
    def multiply():
        with precision.products(torch.device(device)):
            assert torch.get_float32_matmul_precision() == within
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        multiply()
    assert torch.get_float32_matmul_precision() == WHOLE


def test_a_network_learns_within_it_and_is_judged_outside(tmp_path, monkeypatch):
    inside, seen = [False], {"forward": set(), "backward": set(), "judged": set()}

    @contextmanager
    def products(device):
        inside[0] = True
        yield
        inside[0] = False

    def note(when):
        def hook(layer, *_):
            if isinstance(layer, nn.Linear) and layer.training:
                seen[when].add(inside[0])

        return hook

    def evaluate(model, step):
        seen["judged"].add(inside[0])
        return {}

    monkeypatch.setattr(precision, "products", products)
    run = small_stage.recipe(tmp_path, micro_batch=4, steps=2)
    hooks = [
        module.register_module_forward_pre_hook(note("forward")),
        module.register_module_full_backward_hook(note("backward")),
    ]
    try:
        made = small_stage.inputs(run)
        train_stage(run, run.stage("stage2"), made, tmp_path / "stage2", evaluate=evaluate)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == {"forward": {True}, "backward": {True}, "judged": {False}}
