"""Quantization-aware training in two processes, which share their ranges."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxquant
from fxquant import convert_fx, prepare_qat_fx

WORLD = 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def batch(rank, step):
    return (1 + rank) * torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(10 * step + rank))


def work(rank, folder):
    """Train two steps and save what this process has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    prepared = prepare_qat_fx(Net().train(), fxquant.default_qat_qconfig_mapping(), (batch(0, 0),))
    model = DistributedDataParallel(prepared)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(2):
        optimizer.zero_grad()
        model(batch(rank, step)).square().sum().backward()
        optimizer.step()
    prepared.eval()
    torch.save((prepared.state_dict(), convert_fx(prepared)(batch(0, 9))), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_processes_share_their_ranges(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=WORLD)
    (first, y), (second, z) = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(WORLD))
    ours = [name for name in first if not name.startswith("norm.running")]  # torch's own: of the first process' batches
    assert all(torch.equal(first[name], second[name]) for name in ours)
    lows = [torch.stack([batch(rank, step).min() for rank in range(WORLD)]).mean() for step in range(2)]
    assert torch.allclose(first["x_observer.low"], lows[0] + 0.01 * (lows[1] - lows[0]))
    assert y.isfinite().all()
    assert torch.allclose(y, z, atol=0.1)
