"""The two processes of test_torch_training: a layer under DDP and FSDP, each of them training on half of the batch, and one whose
heads are shared out between them.

python torch_distributed.py STORE RESULT; writes the parameters after two steps of each to RESULT.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

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


def attention_of_heads(mesh):
    """fg.attention of tensors that are distributed by heads: an error that says how, and that way."""
    torch.manual_seed(2)
    q, k = (distribute_tensor(torch.randn(2, heads, 5, 8), mesh, [Shard(1)]) for heads in (4, 2))
    try:
        fg.attention(q, k, k)
    except NotImplementedError as error:
        message = str(error)
    attend = local_map(fg.attention, out_placements=[Shard(1)], in_placements=([Shard(1)],) * 3)
    return message, attend(q, k, k).full_tensor(), fg.attention(q.full_tensor(), *[k.full_tensor()] * 2)


def main(rank, store, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half = batch()[2 * rank : 2 * rank + 2]
    replicated, sharded, split = model(), model(), model()
    train(torch.nn.parallel.DistributedDataParallel(replicated), half)
    mesh = dist.init_device_mesh("cpu", (2,))
    fully_shard(sharded, mesh=mesh)
    train(sharded, half)
    by_rows = {name: ColwiseParallel() for name in ("W_q", "W_k", "W_v")}
    parallelize_module(split[0], mesh, {**by_rows, "W_o": RowwiseParallel()})
    train(split, batch())
    trained = {
        "ddp": [x.detach() for x in replicated.parameters()],
        "fsdp": [x.full_tensor().detach() for x in sharded.parameters()],
        "tensor": [getattr(x, "full_tensor", lambda x=x: x)().detach() for x in split.parameters()],
    }
    heads = attention_of_heads(mesh)
    if rank == 0:
        torch.save((trained, heads), result)
    dist.destroy_process_group()


if __name__ == "__main__":
    child = os.fork()       # before torch has threads, and after its import, which takes seconds
    main(int(child == 0), sys.argv[1], sys.argv[2])
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
