"""What users put into a model: replaced, hooked, quantised and parametrised layers, dropout of adapters."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.functional import dropout
from torch.nn.utils.parametrize import register_parametrization

from tests.models.models import make, tokens
from tests.oracle import assert_close, error


@pytest.mark.parametrize("given", ["bias", "hook", "wrapped"])
def test_the_loss_alone_is_that_of_a_replaced_head(given):
    model, ids = make(tie_word_embeddings=False), tokens(2, 9)
    head = model.lm_head
    if given == "bias":
        model.lm_head = torch.nn.Linear(32, 40, dtype=torch.float64)
    elif given == "hook":
        head.register_forward_hook(lambda module, args, y: 3 * y)
    else:
        model.lm_head = torch.nn.Sequential(head, torch.nn.Tanh())
    want, got = model(ids, labels=ids), model(ids, labels=ids, return_logits=False)
    assert torch.equal(got.loss, want.loss) and got.logits is None
    got.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_linear_layers_may_be_quantised():
    model, ids = make("GSM", torch.float32, num_hidden_layers=3).eval(), tokens(2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        low = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert error(low(ids).logits, model(ids).logits) < 0.3
    assert torch.equal(low.generate(ids, 3)[:, :9], ids)
    with pytest.raises(ValueError, match=r"hidden_states: expected shape \[B, T, 32\], got \(1, 2, 31\)"):
        low.layers[0].mixer(torch.zeros(1, 2, 31))
    for layer in low.layers:
        state = layer.mixer.init_state(2)
        assert {s.dtype for name, s in state.items() if name != "position"} == {torch.float32}


class Wrapped(torch.nn.Module):
    """What an adapter makes of an embedding."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, ids):
        return 2 * self.layer(ids)


def test_the_embedding_may_be_replaced():
    model, ids = make(tie_word_embeddings=False), tokens(2, 9)
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    want = model(ids).logits
    with torch.no_grad():
        model.embedding.weight.div_(2)
    model.embedding = Wrapped(model.embedding)
    assert_close(model(ids).logits, want, 1e-12, "logits")
    assert model.generate(ids, 3).shape == (2, 12)
    tied = make()
    tied.embedding = Wrapped(tied.embedding)
    with pytest.raises(TypeError, match="embedding: expected a layer with a weight to make logits with, got Wrapped"):
        tied(ids)


def test_hooks_of_the_model_see_every_call_of_generate():
    model, ids = make("GS", torch.float32), tokens(2, 9)

    def only_seven(module, args, output):
        return output._replace(logits=torch.full_like(output.logits, -1e9).index_fill(-1, torch.tensor(7), 0.0))

    model.register_forward_hook(only_seven)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    assert model.generate(ids, 3)[:, 9:].unique().tolist() == [7]
    assert model.generate(ids, 3, attention_mask=mask)[:, 9:].unique().tolist() == [7]


class Counted(torch.nn.Module):
    """A parametrisation that counts how often its weight is made."""

    count = 0

    def forward(self, weight):
        self.count += 1
        return weight * 1


@pytest.mark.parametrize("pattern", ["G", "M", "S"])
def test_a_parametrised_weight_is_made_once_a_use(pattern):
    """Spectral norms and observers go on at every look."""
    model, ids = make(pattern, tie_word_embeddings=False), tokens(2, 9)
    mixer = model.layers[0].mixer
    places = [(model.embedding, "weight"), (mixer.input_proj, "weight"), (mixer.o_proj, "weight")]
    places += [] if pattern == "S" else [(mixer, "conv_weight")]
    want, counts = model(ids).logits, []
    for module, name in places:
        counts.append(Counted())
        register_parametrization(module, name, counts[-1])
        counts[-1].count = 0
    assert_close(model(ids).logits, want, 1e-12, "logits")
    assert [x.count for x in counts] == [1] * len(places)
    decayed, _ = model.parameter_groups(0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert not any("conv" in names[id(p)] for p in decayed["params"])


@pytest.mark.parametrize("kind", ["elementwise", "selective", "full"])
def test_activation_checkpointing_draws_the_same_twice(kind):
    """Dropout, as adapters bring it."""
    model, ids = make("GS"), tokens(2, 20)
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda module, args, y: dropout(y, 0.5))

    def gradients(kind):
        model.activation_checkpointing = kind
        torch.manual_seed(3)
        return torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))

    for got, want in zip(gradients(kind), gradients("none")):
        assert_close(got, want, 1e-12, kind)
