"""The demo's small network on several processes, its statistics taken over all of them.

    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py --sync off     # each process by itself, for comparison

Uses GPUs with NCCL where there are enough, else CPUs with gloo. The images come with scikit-learn (digits) or
scikit-image (photographs): pip install 'tdeconv[demo]'.
"""

from __future__ import annotations

import argparse
import inspect
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tdeconv.arguments import positive_int
from tdeconv.demo.data import DataSet, load
from tdeconv.demo.errors import DemoError
from tdeconv.demo.models import Line, build
from tdeconv.demo.options import DEFAULTS
from tdeconv.demo.train import MOMENTUM, WEIGHT_DECAY, batches_of, steps_per_epoch
from tdeconv.distributed import convert_sync_deconv

# The running statistics are the same on all ranks, so DDP need not broadcast them before each step.
_FLAG = "forward_sync_buffers"  # older versions of torch: broadcast_buffers
if _FLAG not in inspect.signature(DistributedDataParallel).parameters:
    _FLAG = "broadcast_buffers"
NO_BROADCAST = {_FLAG: False}


def start() -> torch.device:
    """Join the processes that torchrun started."""
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
        return torch.device("cuda", local)
    dist.init_process_group("gloo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    return torch.device("cpu")


def share(whole: Tensor) -> Tensor:
    """This rank's part of a batch; the parts differ by one image at most."""
    return whole.tensor_split(dist.get_world_size())[dist.get_rank()]


def train_epoch(
    model: nn.Module,
    data: DataSet,
    batches: list[tuple[Tensor, Tensor]],
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
) -> float:
    """One pass over the data; the mean loss over all ranks."""
    model.train()
    total = torch.zeros((), device=device)
    for images, labels in batches:
        x, y = data.normalise(share(images)).to(device), share(labels).to(device)
        # the rank's share of the mean over the whole batch, times the ranks, because DDP averages over them
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum") / len(labels) * dist.get_world_size()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size() / len(batches)


@torch.no_grad()
def accuracy(model: nn.Module, data: DataSet, device: torch.device) -> float:
    """Share of right answers; every rank looks at its part of the test images, and evaluation communicates nothing."""
    model.eval()
    images, labels = (share(part) for part in data.test)
    right = torch.zeros((), device=device)
    for xs, ys in zip(images.split(500), labels.split(500), strict=True):
        right += (model(data.normalise(xs).to(device)).argmax(1) == ys.to(device)).sum()
    dist.all_reduce(right)
    return right.item() / len(data.test[1])


def train(args: argparse.Namespace, data: DataSet, device: torch.device) -> None:
    """Every epoch's loss and accuracy, printed by the first process."""
    torch.manual_seed(0)
    net = build("slim", Line("deconvolution"), data.channels, len(data.classes)).to(device)
    if args.sync == "on":
        convert_sync_deconv(net)
    model = torch.compile(net) if args.compile else net
    ddp = DistributedDataParallel(model, **NO_BROADCAST)
    rate = DEFAULTS[args.data].lr[1]
    optimiser = torch.optim.SGD(ddp.parameters(), rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    steps = args.epochs * steps_per_epoch(data, args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(1, args.epochs + 1):
        batches = batches_of(data, 0, epoch, args.batch_size)
        loss = train_epoch(ddp, data, batches, optimiser, schedule, device)
        right = accuracy(net, data, device)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: training loss {loss:.4f}, test accuracy {right:.2%}")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's small network on several processes.")
    parser.add_argument("--data", choices=("digits", "photographs"), default="digits")
    parser.add_argument("--epochs", type=positive_int, default=4)
    parser.add_argument(
        "--batch-size", type=positive_int, default=64, help="of all processes together (default: %(default)s)"
    )
    parser.add_argument("--sync", choices=("on", "off"), default="on", help="statistics over all processes, or not")
    parser.add_argument("--compile", action="store_true", help="compile the network")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("torchrun starts the processes: torchrun --nproc-per-node 2 examples/train_ddp.py")
    try:
        data = load(args.data)
    except DemoError as error:
        parser.error(str(error))

    train(args, data, start())  # whose network has gone before the processes' connections go
    dist.barrier()  # none may take its end of a connection away while another still uses it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
