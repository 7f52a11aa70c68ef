"""The two processes of test_torch_training: a layer under DDP and FSDP, each of them training on half of the batch.

python torch_distributed.py STORE RESULT; writes the parameters after two steps of each to RESULT.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import flashgqa.torch as fg


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        fg.FlashGQA(16, 4, 2, causal=True, rotary_dim=4, dtype=torch.float64), torch.nn.Linear(16, 16, dtype=torch.float64)
    )


def batch():
    torch.manual_seed(1)
    return torch.randn(4, 9, 16, dtype=torch.float64)


def train(module, x):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.cos(module(x)).mean().backward()
        optimizer.step()


def main(rank, store, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half = batch()[2 * rank : 2 * rank + 2]
    replicated, sharded = model(), model()
    train(torch.nn.parallel.DistributedDataParallel(replicated), half)
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (2,)))
    train(sharded, half)
    gathered = [x.full_tensor() for x in sharded.parameters()]
    if rank == 0:
        torch.save({"ddp": [x.detach() for x in replicated.parameters()], "fsdp": [x.detach() for x in gathered]}, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    child = os.fork()       # before torch has threads, and after its import, which takes seconds
    main(int(child == 0), sys.argv[1], sys.argv[2])
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
