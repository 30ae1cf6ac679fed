"""One step of training: gradients, clipped, and AdamW's update.

A GPU is done with a step of a model this small before the host has launched it: hundreds of kernels, 15 ms a step on
an H200's host. So on CUDA the first steps run as they are, which compiles everything, and the next one is captured:
one CUDA graph has the forward pass, the backward pass, the clipping and the update, and a step is a batch copied into
it and one launch. What changes from step to step, batch and rate, is in tensors that the graph reads where they are.
The next batch (2 ms at most on one core) is made while the graph runs.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn_ops.models import HybridLM
from perf.claims.tasks import IGNORED, Batch

EAGER_STEPS = 3


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


@contextmanager
def own_stream(device: str) -> Iterator[None]:
    """A stream beside the default one, which cannot be captured. All steps are on it, those before the capture too, so
    that no gradient is made on one stream and added up on another."""
    if device != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _loss_of(model: HybridLM) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        logits = model(ids).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)

    return loss_of


def _compiled(function: Callable) -> Callable:
    import torch._inductor.config as inductor

    # Processes side by side share the cores; torch's threads have been set to a share already.
    inductor.compile_threads = torch.get_num_threads()
    # Every run's function has the same code, and Dynamo keeps a few compilations of a code at most.
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


class Step:
    """``shape [B, T]`` is that of all batches; a shorter one is padded behind with tokens that are not scored, which a
    causal model's loss does not see. ``graphs`` False: no CUDA graph, every step is launched kernel by kernel."""

    def __init__(
        self, model: HybridLM, lr: float, weight_decay: float, clip: float, shape: tuple[int, int], device: str,
        graphs: bool,
    ) -> None:  # fmt: skip
        self.model, self.clip, self.device = model, clip, device
        self.ids, self.targets = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        self.rate = torch.tensor(lr, device=device)
        groups = model.parameter_groups(weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98), fused=device == "cuda")
        self.loss_of = _loss_of(model) if device == "cpu" else _compiled(_loss_of(model))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.before_capture = EAGER_STEPS if graphs and device == "cuda" else math.inf

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """Returns the loss, a tensor that the next step may write to."""
        room = self.ids.shape[1] - batch.ids.shape[1]
        # From memory that is not pinned: the copy waits for the step before, so that the host is never far ahead.
        self.ids.copy_(F.pad(batch.ids, (0, room)))
        self.targets.copy_(F.pad(batch.targets, (0, room), value=IGNORED))
        self.rate.fill_(rate)
        if self.before_capture > 0:
            self.before_capture -= 1
            return self._step()
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.loss

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            loss = self.loss_of(self.ids, self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.detach()

    def _capture(self) -> None:
        """Records a step and runs nothing. The optimizer refuses unless told so; fused, it computes the same."""
        for group in self.optimizer.param_groups:
            group["capturable"] = True
        gc.collect()  # an earlier run's graph, if it were collected in the middle, would end the capture
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self.loss = self._step()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first step."""
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate  # and not a copy of it
