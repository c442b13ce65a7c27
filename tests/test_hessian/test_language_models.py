"""Hugging Face models and token-weighted losses against a dense matrix, in float64."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessian import Objective, gauss_newton_operator, hessian_operator
from tests.cases import Case, seeded
from tests.oracles import (
    differences_of_gradients,
    flat_weights,
    plain_gauss_newton,
    plain_hessian,
)

transformers = pytest.importorskip("transformers")

IGNORED = -100
TOKENS = torch.tensor([[3, 7, 1, 9, 5], [2, 8, 4, 0, 0], [6, 2, 9, 0, 0]])
MASK = (TOKENS != 0).long()
LABELS = TOKENS.masked_fill(MASK == 0, IGNORED)
LABELS[0, 2] = IGNORED


def own_loss(output, batch):
    del batch
    return output.loss


def own_formula(output, batch):
    """The same mean over tokens in float64: the library's own loss rounds to float32."""
    return F.cross_entropy(output.logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:])


def from_logits(output, batch):
    z, label = output.logits[0], batch["labels"][0]
    return torch.logsumexp(z, 0) - z[label]


def next_tokens(output, batch):
    """Sum over the next tokens that are not ignored, one by one."""
    total = output.logits.new_zeros(())
    for z, label in zip(output.logits[0, :-1], batch["labels"][0, 1:], strict=True):
        if label != IGNORED:
            total = total + torch.logsumexp(z, 0) - z[label]
    return total


def num_targets(batch):
    return (batch["labels"][:, 1:] != IGNORED).sum()


def bert():
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=5, max_position_embeddings=6, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=10, n_positions=6, n_embd=4, n_layer=1, n_head=2, n_inner=5,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@lru_cache
def case(name):
    if name == "BERT classifier":
        data = {"input_ids": TOKENS, "attention_mask": MASK, "labels": torch.tensor([2, 0, 1])}
        return Case(name, spread(bert), own_loss, data, from_logits)
    data = {"input_ids": TOKENS, "attention_mask": MASK, "labels": LABELS}
    return Case(
        name,
        spread(gpt2),
        own_loss if name == NAMES[2] else own_formula,
        data,
        next_tokens,
        options={"count": num_targets},
        divisor=float(num_targets(data)),
    )


def spread(build):
    """Weights of order one, where a fresh model of this size is nearly linear."""

    def larger():
        model = build().double()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
        return model

    return seeded(larger)


NAMES = ["BERT classifier", "GPT-2, padded, some labels ignored", "GPT-2, loss of its own"]
CUTS = (2, 1)


def assert_equal(found, expected, rtol):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_hessian_products_equal_the_dense_hessian(name):
    problem = case(name)
    w = flat_weights(problem)
    H = plain_hessian(problem, w)
    V = seeded(lambda: torch.randn(len(w), 3), 7)
    for budget in (None, 0):
        operator = hessian_operator(problem.objective(CUTS), memory_budget=budget)
        assert_equal(operator @ V, H @ V, 1e-6 if name == NAMES[2] else 1e-8)


@pytest.mark.parametrize("name", NAMES[:2])
def test_products_equal_differences_of_gradients_however_data_are_cut(name):
    problem = case(name)
    w = flat_weights(problem)
    v = F.normalize(seeded(lambda: torch.randn(len(w)), 8), dim=0)
    # The padding's vector is held constant by torch.
    for p, part in zip(problem.objective(CUTS).shapes, v.split(_lengths(problem)), strict=True):
        if p.endswith("word_embeddings.weight"):
            part.view(11, 4)[0] = 0
    expected = differences_of_gradients(problem, w, v)
    for cuts in ((3,), (2, 1), (1, 1, 1)):
        found = hessian_operator(problem.objective(cuts)) @ v
        assert_equal(found, expected, 1e-7)


def _lengths(problem):
    return [shape.numel() for shape in problem.objective(CUTS).shapes.values()]


def test_tied_head_and_embedding_of_gpt2_count_once():
    names = list(case(NAMES[1]).objective(CUTS).shapes)
    assert [name for name in names if "wte" in name or "lm_head" in name] == [
        "transformer.wte.weight"
    ]


class Logits(nn.Module):
    """The model as a function of token ids, with classes in the second place."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens).logits[:, :-1].transpose(1, 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gauss_newton_of_logits_weighs_tokens_that_are_not_ignored_alike(reduction):
    def entropy(z, y):
        kept = (y != IGNORED).to(z.dtype)
        picked = z.gather(1, y.clamp_min(0)[:, None])[:, 0]
        return ((z.logsumexp(dim=1) - picked) * kept).sum()

    targets = LABELS[:, 1:]
    divisor = float((targets != IGNORED).sum()) if reduction == "mean" else 3.0
    problem = Case(
        "GPT-2 logits",
        Logits(spread(gpt2)),
        nn.CrossEntropyLoss(reduction=reduction),
        (TOKENS, targets),
        entropy,
        divisor=divisor,
    )
    w = flat_weights(problem)
    G = plain_gauss_newton(problem, w)
    V = seeded(lambda: torch.randn(len(w), 2), 9)
    for budget in (None, 0):
        operator = gauss_newton_operator(problem.objective(CUTS), memory_budget=budget)
        assert_equal(operator @ V, G @ V, 1e-8)


def test_a_token_mean_without_a_count_is_refused_and_named():
    problem = case(NAMES[1])
    with pytest.raises(ValueError, match=r"weight every sample of a batch alike.*`count=lambda"):
        Objective(problem.model, own_loss, problem.batches(CUTS))


def test_model_outputs_have_no_gauss_newton_matrix_but_a_cure():
    problem = case(NAMES[0])
    with pytest.raises(TypeError, match=r"returns one tensor, got \w+Output.*Wrap the model"):
        gauss_newton_operator(problem.objective(CUTS)) @ flat_weights(problem)
