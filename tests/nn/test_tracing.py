import torch
from torch import nn

from gdn_ops.nn.tracing import is_exporting


class Says(nn.Module):
    def forward(self, x):
        return x + 1 if is_exporting() else x


def test_only_a_program_is_exported():
    x = torch.zeros(2)
    assert Says()(x).sum() == 0
    assert torch.compile(Says(), backend="eager", fullgraph=True)(x).sum() == 0
    assert torch.export.export(Says(), (x,)).module()(x).sum() == 2
    assert torch.export.export(Says(), (x,), strict=True).module()(x).sum() == 2
