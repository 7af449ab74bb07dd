"""How the gloo_*.json.gz files of this folder were made: a tiny model, two ranks, two profiled steps, CPU only.

    torchrun --standalone --nproc_per_node=2 capture_gloo.py OUT ddp    # then fsdp

Then everything but operators and annotations was dropped (flows, metadata, host name, temporary paths).
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile, record_function, schedule


class Block(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main(out: str, strategy: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Embedding(100, 256), Block(), Block(), nn.Linear(256, 100))
    if strategy == "ddp":
        model = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in (m for m in model if isinstance(m, Block)):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step() -> None:
        with record_function("data"):
            tokens = torch.randint(0, 100, (4, 64))
        with record_function("forward"):
            loss = nn.functional.cross_entropy(model(tokens).view(-1, 100), tokens.view(-1))
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(2):
        step()
    dist.barrier()
    with profile(
        activities=[ProfilerActivity.CPU],
        record_shapes=True,
        schedule=schedule(wait=0, warmup=1, active=2),
        on_trace_ready=lambda p: p.export_chrome_trace(f"{out}_rank{dist.get_rank()}.json.gz"),
    ) as profiler:
        for _ in range(3):
            step()
            profiler.step()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
