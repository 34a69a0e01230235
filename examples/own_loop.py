"""Train with a loop of your own over the stream: python examples/own_loop.py SET [--epochs 3].

On several processes: accelerate launch --config_file launch/cpu2.yaml examples/own_loop.py SET. The global batch is the
same on any number of processes, and so is the loss of each step.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from isicdist import BatchPlan, DiceReduction, DiceSummary, ImprovedUNet, Stream
from shards import ShardSet, Split


def train_epoch(
    network: nn.Module, optimizer: torch.optim.Optimizer, stream: Stream, accelerator: Accelerator
) -> float:
    """Train one epoch; returns the mean loss of this rank's steps."""
    losses: list[float] = []
    for step in stream.steps():
        loss_of_step = torch.zeros((), device=accelerator.device)
        for batch in step:  # gradient accumulation over this rank's micro batches
            logits = network(batch.images / 255)  # (B, 1, H, W)
            pixels = F.binary_cross_entropy_with_logits(logits, batch.masks.float(), reduction="none")
            # Slots without a sample count 0, and the mean is over the samples of all ranks.
            loss = (pixels.mean(dim=(1, 2, 3)) * batch.valid).sum() / batch.step_samples
            accelerator.backward(loss * accelerator.num_processes)  # DDP averages over the ranks; here they are summed
            loss_of_step += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.as_tensor(accelerator.reduce(loss_of_step, "sum")).item())
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate(network: nn.Module, split: Split, accelerator: Accelerator) -> DiceSummary:
    """Score a split, each image once, on all processes."""
    reduction = DiceReduction(expected=len(split))
    world, rank = accelerator.num_processes, accelerator.process_index
    plan = BatchPlan(global_size=8 * world, micro_size=8, world_size=world)
    with Stream(split, plan, rank, device=accelerator.device) as stream:
        for batch in stream.sequential_pass():
            probs: Tensor = network(batch.images / 255).sigmoid()  # (B, 1, H, W)
            reduction.update(probs, batch.masks, batch.ids, batch.valid)
    return reduction.reduce(accelerator)


def main(arguments: list[str] | None = None) -> None:
    """Train on the split `train`, score `val` after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", help="a shard set that `isic-shards build` made")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args(arguments)

    accelerator = Accelerator()
    shard_set = ShardSet.open(options.set)
    torch.manual_seed(0)
    network = ImprovedUNet(base_channels=4, dropout=0.0)  # any network that maps (B, 3, H, W) to (B, 1, H, W)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    network, optimizer = accelerator.prepare(network, optimizer)  # not the stream: its samples are sliced already

    # Accumulation follows: 8 = 4 samples at once × processes × accumulation steps.
    plan = BatchPlan(global_size=8, micro_size=4, world_size=accelerator.num_processes)
    train, val = shard_set.split("train"), shard_set.split("val")
    with Stream(train, plan, accelerator.process_index, seed=0, device=accelerator.device) as stream:
        for epoch in range(options.epochs):
            loss = train_epoch(network, optimizer, stream, accelerator)
            summary = evaluate(network, val, accelerator)
            accelerator.print(
                f"epoch {epoch}: loss {loss:.4f}, mean Dice {summary.mean_dice:.4f} of {summary.n} images"
            )
    # The network before the process group: with gloo, DDP may hang when it is the last to let go of it (torch 2.13).
    network, optimizer = accelerator.free_memory(network, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    main()
