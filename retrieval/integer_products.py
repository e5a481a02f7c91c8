"""A token classifier for fast reading on a CPU: DistilBERT with its matrix products in 8-bit integers.

Weights are rounded once, each row of outputs with its own scale; inputs at every call, each row with its own scale.
The sums are exact integers, so a row's product does not depend on the rows beside it. Needs a processor with VNNI
instructions; without them torch would take a slow path.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DistilBertForTokenClassification
from transformers.modeling_outputs import TokenClassifierOutput

from data.errors import expect

_LARGEST = 127  # of a signed byte, the same to both sides
_DEEPEST = 2**31 // _LARGEST**2  # inputs whose products are sure to fit into 32 bits


def supported() -> bool:
    """True if this processor multiplies bytes faster than floats, and this torch (2.6 or later) says so."""
    known = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(known())


class IntegerLinear(nn.Module):
    """Linear layers of the same input, side by side, with weights of one byte. It has no gradients."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        depth = layers[0].in_features
        expect(depth <= _DEEPEST, "in_features", f"at most {_DEEPEST}", depth)
        weight, scale = _rounded(torch.cat([layer.weight.detach() for layer in layers]))
        self.register_buffer("weight", weight.t())  # (in, out), read along its columns
        self.register_buffer("scale", scale[:, 0].contiguous())
        self.register_buffer("bias", torch.cat([layer.bias.detach() for layer in layers]))

    def forward(self, rows: Tensor) -> Tensor:
        """rows: (R, in) float32. Returns (R, out)."""
        whole, scale = _rounded(rows)
        total = torch._int_mm(whole, self.weight) * scale  # the product itself is exact
        return torch.addcmul(self.bias, total, self.scale, out=total)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as bytes in [-127, 127] and the value of one unit of each row: (R, D) int8 and (R, 1)."""
    scale = rows.abs().amax(1, keepdim=True).clamp_(min=1e-20) / _LARGEST
    return (rows * scale.reciprocal()).round_().to(torch.int8), scale


class _Block(nn.Module):
    """One layer of the transformer: attention and feed-forward part, each added to its input and normalised."""

    def __init__(self, layer: nn.Module, heads: int) -> None:
        super().__init__()
        attention, ffn = layer.attention, layer.ffn
        self.heads = heads
        self.split = IntegerLinear(attention.q_lin, attention.k_lin, attention.v_lin)
        self.join, self.norm = IntegerLinear(attention.out_lin), layer.sa_layer_norm
        self.widen, self.bend, self.narrow = IntegerLinear(ffn.lin1), ffn.activation, IntegerLinear(ffn.lin2)
        self.last_norm = layer.output_layer_norm

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (B, T, D); mask: (B, 1, 1, T) bool, False for padding."""
        batch, tokens, width = x.shape
        rows = x.view(-1, width)
        q, k, v = self.split(rows).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
        seen = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(-1, width)
        rows = self.norm(self.join(seen).add_(rows))
        return self.last_norm(self.narrow(self.bend(self.widen(rows))).add_(rows)).view_as(x)


class IntegerTagger(nn.Module):
    """The same answers as `model` but for rounding. For inference; embeddings, norms and the head stay in floats."""

    def __init__(self, model: DistilBertForTokenClassification) -> None:
        super().__init__()
        self.config, self.device = model.config, model.device
        self.embeddings, self.classifier = model.distilbert.embeddings, model.classifier
        self.blocks = nn.ModuleList(_Block(layer, model.config.n_heads) for layer in model.distilbert.transformer.layer)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TokenClassifierOutput:
        """Ids and mask (B, T); logits (B, T, K)."""
        x, mask = self.embeddings(input_ids), attention_mask.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return TokenClassifierOutput(logits=self.classifier(x))
