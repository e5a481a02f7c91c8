"""Narrower feed-forward parts of a DistilBERT: the neurons that give the least are left out.

What a neuron gives is its mean absolute activation times the length of its output weights, measured on texts of the
task. The mean activation of those left out goes into the bias, so that the next layer sees the same mean.
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForTokenClassification

from data.errors import expect
from retrieval.parser import new_model


@torch.no_grad()
def pruned(model: DistilBertForTokenClassification, batches: Iterable[tuple[Tensor, Tensor]], keep: int
           ) -> DistilBertForTokenClassification:
    """A new model with `keep` neurons in each feed-forward part, in evaluation mode.

    batches: ids and attention mask of texts, each (B, T).
    """
    config = model.config
    expect(0 < keep <= config.hidden_dim, "keep", f"in [1, {config.hidden_dim}]", keep)
    small = new_model(DistilBertConfig(**{**config.to_dict(), "hidden_dim": keep}), seed=0).to(model.device)
    parts = model.distilbert.transformer.layer
    size, mean = _activations(model, [layer.ffn.lin2 for layer in parts], batches)
    state = dict(model.state_dict())
    for i, layer in enumerate(parts):
        gives = size[i] * layer.ffn.lin2.weight.norm(dim=0)
        kept = gives.topk(keep).indices.sort().values
        where = f"distilbert.transformer.layer.{i}.ffn."
        lost = mean[i].clone()
        lost[kept] = 0
        state[f"{where}lin1.weight"] = layer.ffn.lin1.weight[kept]
        state[f"{where}lin1.bias"] = layer.ffn.lin1.bias[kept]
        state[f"{where}lin2.weight"] = layer.ffn.lin2.weight[:, kept]
        state[f"{where}lin2.bias"] = layer.ffn.lin2.bias + layer.ffn.lin2.weight @ lost
    small.load_state_dict(state)
    return small


def _activations(model: nn.Module, layers: list[nn.Module], batches: Iterable[tuple[Tensor, Tensor]]
                 ) -> tuple[list[Tensor], list[Tensor]]:
    """Mean absolute and mean input of each layer over all tokens that are not padding."""
    seen: list[list[Tensor]] = [[] for _ in layers]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0]))
             for layer, kept in zip(layers, seen, strict=True)]
    sums = [[0.0, 0.0] for _ in layers]
    count = 0
    training = model.training
    model.eval()
    try:
        for ids, attention in batches:
            model(input_ids=ids, attention_mask=attention)
            real = attention.bool()
            count += int(real.sum())
            for total, kept in zip(sums, seen, strict=True):
                values = kept.pop()[real]
                total[0] = total[0] + values.abs().sum(0)
                total[1] = total[1] + values.sum(0)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [total[0] / count for total in sums], [total[1] / count for total in sums]
