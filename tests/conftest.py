"""What several test files use."""
import os
import sys
from contextlib import contextmanager

import pytest
import torch
import torchvision
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # where the scripts are
import cifar  # noqa: E402

SWEPT = {name for panels in cifar.SWEEPS.values() for own in panels.values() for name in own}   # for a figure


@contextmanager
def says(*parts):
    """Expect the program to stop with a message of at most two lines that has all these parts."""
    with pytest.raises(SystemExit) as end:
        yield
    text = str(end.value)
    assert len(text.splitlines()) <= 2 and all(part in text for part in parts), text


class Features(nn.Module):
    """Channel means, twice: as the features, or in a tuple, or as an image of them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, images):
        mean = images.float().mean((2, 3)) / 255
        features = torch.cat([mean, mean.square()], 1)
        return {"plain": features, "tuple": (features, mean), "image": features[:, :, None, None],
                "nan": (features - 1).log(), "dict": {"features": features}}[self.kind]


def inception_weights():
    """Random weights for FID's network, in the keys of pytorch-fid's file, that leave no layer dead."""
    torch.manual_seed(0)
    network = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1), layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias, 0, 0.1)
    return network.state_dict()


def export(path, kind="tuple", dynamic=True):
    """Write a small feature network where --features finds it; returns the path as text."""
    example = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("batch", min=2)},) if dynamic else None
    program = torch.export.export(Features(kind), (example,), dynamic_shapes=shapes)
    torch.export.save(program, str(path))
    return str(path)
