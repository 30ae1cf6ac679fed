"""Run by torchrun: training steps of a model whose batch is shared out to ranks, beside those of one process.

``torchrun --nproc-per-node 2 -m tests.compile.data_parallel`` prints, on rank 0, a JSON object: by name, the losses of
three steps, whether a sharded model continues a text as a whole one does, and whether it was saved whole.
"""

from __future__ import annotations

import copy
import json
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gdn_ops.models import HybridLM
from tests.models.models import make, tokens

STEPS, ROWS, T = 3, 4, 40


def losses(model, ids, ranks: int = 1) -> list[float]:
    """Of a few steps, each the mean over all ranks."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(STEPS):
        loss = model(ids, labels=ids, return_logits=False).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        found.append(mean.item() / ranks)
    return found


BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"  # what the CPU compiles is tested elsewhere


def sharded(model, low: bool = False, layers: bool = False):
    """By FSDP2, a layer at a time; with ``low`` it computes in bf16, with ``layers`` each layer is compiled."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy()
    for layer in model.layers:
        if layers:
            layer.compile(fullgraph=True, backend=BACKEND)
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def is_saved(parts, whole) -> bool:
    """Whether what rank 0 saves of a model in parts is the whole one, and parts alone are refused."""
    state = get_model_state_dict(parts, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank():
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            parts.save_pretrained(folder)
            return False
        except ValueError as error:
            if not str(error).startswith("state_dict: expected whole weights, got a part of embedding.weight (gather"):
                raise
        parts.save_pretrained(folder, state)
        read = HybridLM.from_pretrained(folder).state_dict()
    return all(torch.equal(read[name], x.cpu()) for name, x in whole.state_dict().items())


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{rank}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    model, ids = make("GMS", torch.float32, num_hidden_layers=3, initializer_range=0.05).to(device), tokens(ROWS, T)
    ids = ids.to(device)
    own = ids.chunk(ranks)[rank]

    def replicated(model):
        return DistributedDataParallel(model, device_ids=[rank] if cuda else None)

    results = {"one process": losses(copy.deepcopy(model), ids)}
    for name, share in {
        "DDP": replicated,
        "DDP, compiled": lambda model: torch.compile(replicated(model), backend=BACKEND),
        "FSDP2": sharded,
        "FSDP2, compiled": lambda model: torch.compile(sharded(model), backend=BACKEND),
        "FSDP2, layers compiled": lambda model: sharded(model, layers=True),
        "FSDP2, bf16, compiled": lambda model: torch.compile(sharded(model, low=True), backend=BACKEND),
    }.items():
        torch._dynamo.reset()
        results[name] = losses(share(copy.deepcopy(model)), own, ranks)
    parts = sharded(copy.deepcopy(model))
    same_text = torch.equal(parts.generate(ids, 5), model.generate(ids, 5))
    saved = is_saved(parts, model)
    if rank == 0:
        print(json.dumps({**results, "same text": same_text, "saved": saved}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
