"""Programs of hybrid models other than the preset: other mixers, one mixer only, a window of several blocks.

Packages of a whole hybrid model, on CPU and on CUDA, are in ``test_aoti.py`` and ``test_gpu.py``.
"""

from __future__ import annotations

import pytest
import torch
from gdn_ops.export import export_program
from gdn_ops.export.parity import compare
from gdn_ops.export.program import flatten_state

from tests.models.models import make, tokens

VARIANTS = {
    "gdn": {
        "pattern": "G", "num_v_heads": 4, "allow_neg_eigval": True, "conv_size": 3, "tie_word_embeddings": False,
    },
    "swa": {"pattern": "S", "window": 200, "num_key_value_heads": 1},
    "mamba2": {"pattern": "M", "intermediate_size": None},
    "deltanet, attention": {"pattern": "DA"},
    "h2": {"pattern": "MGS", "num_hidden_layers": 3},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_programs_at_other_sizes(variant):
    """Prefill after prefill and a step after each: sizes of one token, of whole blocks and past the ring's end."""
    model = make(dtype=torch.float32, **VARIANTS[variant])
    programs = {name: program.module() for name, program in export_program(model).items()}
    for B in (1, 3):
        state, eager_state = flatten_state(model.init_state(B)), model.init_state(B)
        for T in (1, 128, 150, 5):
            ids = tokens(B, T, seed=T)
            logits, state = programs["prefill"](ids, state)
            eager, eager_state = model.prefill(ids, eager_state)
            names = ["logits", *flatten_state(eager_state)]
            errors = compare((logits, state), (eager, flatten_state(eager_state)), names)
            assert max(errors.values()) < 1e-5, (B, T, errors)
            logits, state = programs["step"](ids[:, 0], state)
            eager, eager_state = model.step(ids[:, 0], eager_state)
            errors = compare((logits, state), (eager, flatten_state(eager_state)), names)
            assert max(errors.values()) < 1e-5, (B, T, errors)


def test_one_node_an_operator():
    """Two layers: two convolutions and two rules, chunkwise in the prefill and recurrent in the step."""
    programs = export_program(make("G", torch.float32))
    for name, rule in (("prefill", "chunk_gated_delta_rule"), ("step", "recurrent_gated_delta_rule")):
        targets = [str(node.target) for node in programs[name].graph.nodes if str(node.target).startswith("gdn.")]
        assert targets == ["gdn.causal_conv1d.default", f"gdn.{rule}.default"] * 2
