"""Cross-entropy of a linear layer's outputs, without all of those outputs at once.

Logits ``[N, vocabulary]`` and their gradient are the largest tensors of a training step: at 32768 tokens and a
vocabulary of 32000 they take 4 GiB each in fp32, as much as the weights of a model of 1B. So rows are taken a chunk at
a time. A chunk's logits give its loss and, at once, the gradients of its rows and its part of the weight's, and are
gone before the next chunk's exist; the backward pass has only to multiply by the gradient of the loss. No product is
computed twice.

The chunks are a loop over a fixed number, whatever N is, so that a compiler unrolls it once for every length (of two
rows a chunk and more) and fuses the softmax into its passes over a chunk. torch's own ``linear_cross_entropy`` with
``LinearCrossEntropyOptions`` follows the same plan; torch 2.11 has none, and 2.13's is an operator that a compiler does
not see into and compiles anew for every N. Inductor's ``auto_chunker`` leaves symbolic sizes alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from gdn_ops.validation import has_values, is_autocast

IGNORED = -100
MOST_CHUNKS = 16


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunks: int | None = None) -> Tensor:
    """Mean of ``cross_entropy(x @ weight.T, targets)`` over the targets that are not -100; 0 if all are.

    Differentiable once, with respect to ``x`` and ``weight``. The products are in the input's dtype (in autocast's,
    under autocast), the softmax and the loss in fp32. Under the transforms of ``torch.func`` it has all outputs at once
    and derivatives of any order.

    Args:
        x: ``[..., D]``, float.
        weight: ``[V, D]``, of the same dtype (any other float under autocast).
        targets: ``[...]`` int64, each in ``[0, V)`` or -100, which is not scored.
        chunks: parts that the rows are cut into. Default: the largest power of two up to ``V / (2 D)``, at most 16, so
            that a chunk's logits are a few times as large as ``x``.

    Raises:
        ValueError, TypeError: naming the argument.

    Example::

        >>> x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
        >>> loss = linear_cross_entropy(x, weight, torch.randint(40, (2, 5)))
        >>> loss.backward()
        >>> x.grad.shape, weight.grad.shape
        (torch.Size([2, 5, 8]), torch.Size([40, 8]))
    """
    _check(x, weight, targets, chunks)
    if chunks is None:
        chunks = min(MOST_CHUNKS, 1 << (max(1, weight.shape[0] // (2 * weight.shape[1])).bit_length() - 1))
    rows, row_targets = x.flatten(0, -2) if x.dim() > 1 else x[None], targets.flatten()
    if guard_or_false(rows.shape[0] < chunks):  # of a compiler's ranges, none may have parts of no rows
        chunks = 1
    if torch._C._are_functorch_transforms_active():
        total = F.cross_entropy(F.linear(rows, weight).float(), row_targets, ignore_index=IGNORED, reduction="sum")
    elif torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        total = _LinearCrossEntropy.apply(rows, weight, row_targets, chunks, x.requires_grad, weight.requires_grad)
    else:
        total, *_ = _sums(rows, weight, row_targets, chunks)
    return total / (row_targets != IGNORED).sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses; gradients, those that are asked for, are computed in the forward pass and scaled in the
    backward pass."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunks, by_x, by_weight):
        total, dx, dweight, part = _sums(x, weight, targets, chunks, by_x, by_weight)
        ctx.save_for_backward(dx, dweight, part)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            # No graph says what dx and dweight owe to x and weight, so a second derivative would lack it.
            raise RuntimeError("linear_cross_entropy: expected to be differentiated once, got create_graph=True")
        dx, dweight, part = ctx.saved_tensors
        if dx is not None:
            dx = dx.to(ctx.x_dtype) * grad
        if dweight is not None and part is None:
            dweight = dweight.to(ctx.weight_dtype) * grad
        elif dweight is not None:
            dweight = (dweight.float() * (grad / part)).to(ctx.weight_dtype)
        return dx, dweight, None, None, None, None


def _sums(
    x, weight, targets, chunks, by_x=False, by_weight=False
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The sum of the losses of ``x [N, D]``, and its gradients by ``x`` and by ``weight`` where they are asked for.

    The gradient of the logits is not divided by the number of targets before it is rounded: at many tokens fp16 would
    lose it. The weight's gradient is summed by products that add to what is there (``addmm_``): sums that a compiler
    may put off would keep every chunk's part until the end. In fp16, whose largest number a sum of many tokens may
    pass, it is that of ``part`` of the loss, the last result, which is None for other dtypes.
    """
    dtype = x.dtype
    if is_autocast(x) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    x, weight = x.to(dtype), weight.to(dtype)
    vocabulary = torch.arange(weight.shape[0], device=x.device)
    part = _part_for_fp16(x) if by_weight and dtype == torch.float16 else None
    size, total, dx, dweight = x.shape[0] // chunks, torch.zeros((), device=x.device, dtype=torch.float32), [], None
    for i in range(chunks):
        here = slice(i * size, None if i == chunks - 1 else (i + 1) * size)
        x_nd, target = x[here], targets[here, None]
        scored = target != IGNORED
        target = target.masked_fill(~scored, 0)
        logits_nv = (x_nd @ weight.T).float()
        normalizer = logits_nv.logsumexp(-1, keepdim=True)
        total = total + (normalizer - logits_nv.gather(-1, target)).masked_fill(~scored, 0).sum()
        if by_x or by_weight:
            dlogits_nv = (logits_nv - normalizer).exp() - (vocabulary == target).float()
            dlogits_nv = dlogits_nv.masked_fill(~scored, 0)
            dlogits_nv = (dlogits_nv if part is None else dlogits_nv * part).to(dtype)
        if by_x:
            dx.append(dlogits_nv @ weight)
        if by_weight:
            dweight = dlogits_nv.T @ x_nd if dweight is None else dweight.addmm_(dlogits_nv.T, x_nd)
    dx = torch.cat(dx) if by_x else None
    return total, dx if part is None or dx is None else dx / part, dweight, part


def _part_for_fp16(x: Tensor) -> Tensor:
    """The largest power of two up to 1 by which no sum over the tokens of ``x [N, D]``, each times a number of 1 at
    most, comes to more than 2^15."""
    most = x.float().abs().sum(0).amax()
    return torch.exp2(-(most / 2**15).log2().ceil().clamp(min=0))


def wrong_target(targets: Tensor, vocabulary: int) -> int | None:
    """The first that is neither in ``[0, vocabulary)`` nor -100; None if all are, or cannot be read."""
    if not has_values(targets):
        return None
    wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= vocabulary))]
    return int(wrong[0]) if wrong.numel() else None


def _check(x: Tensor, weight: Tensor, targets: Tensor, chunks: int | None) -> None:
    for name, y in (("x", x), ("weight", weight), ("targets", targets)):
        if not isinstance(y, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(y).__name__}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected [..., D] with D of at least 1, got {tuple(x.shape)}")
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight: expected [V, D] for x [..., D], got {tuple(weight.shape)} and {tuple(x.shape)}")
    for name, y in (("weight", weight), ("targets", targets)):
        if y.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (as x), got {y.device}")
    if not x.is_floating_point() or not weight.is_floating_point():
        raise TypeError(f"x, weight: expected floating dtypes, got {x.dtype} and {weight.dtype}")
    if x.dtype != weight.dtype and not is_autocast(x):
        raise TypeError(f"weight: expected dtype {x.dtype} (as x), got {weight.dtype}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected dtype torch.int64, got {targets.dtype}")
    if targets.dim() != x.dim() - 1 or any(a != b for a, b in zip(targets.shape, x.shape)):
        raise ValueError(f"targets: expected shape {tuple(x.shape[:-1])}, got {tuple(targets.shape)}")
    if chunks is not None and (not isinstance(chunks, int) or isinstance(chunks, bool)):
        raise TypeError(f"chunks: expected an integer, got {chunks!r}")
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks: expected at least 1, got {chunks}")
    wrong = wrong_target(targets, weight.shape[0])
    if wrong is not None:
        raise ValueError(f"targets: expected {IGNORED} or numbers in [0, {weight.shape[0]}), got {wrong}")
