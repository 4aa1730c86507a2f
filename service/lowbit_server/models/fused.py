"""The decoder of the Llama family: few calls a layer, so that kernels set the pace.

A step of a small model is bound by what happens between its products. Queries, keys and
values are one product here, and so are gate and up; new keys go straight into the engine's
KV cache. Where all products have kernels, all layers of a step are one call (ADR 0014).
`models.transformers` computes the same with the library's modules.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit_server.kernels.decoder import Decoder, DecoderLayer
from lowbit_server.kernels.products import have_tiles
from lowbit_server.models.attention import Attention
from lowbit_server.models.checkpoint import EMBEDDING
from lowbit_server.models.decoder import InterruptedPassError, LayerShape, ModelSpec
from lowbit_server.models.linears import linear
from lowbit_server.models.measure import live_bytes
from lowbit_server.models.products import WIDE_TOKENS, ProductLinear

if TYPE_CHECKING:
    from lowbit_server.models.architecture import Architecture
    from lowbit_server.models.checkpoint import Checkpoint
    from lowbit_server.models.decoder import Batch

_HEAD = "lm_head"


def normalized(inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return the RMS norm over the last dimension (Zhang and Sennrich 2019), then weighted.

    It is rounded before it is weighted, as in the implementation that models are made with.
    """
    return functional.rms_norm(inputs, inputs.shape[-1:], None, epsilon).mul_(weight)


class FusedLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Architecture, checkpoint: Checkpoint, number: int) -> None:
        """Read layer `number`; raises ValueError for tensors that are missing or do not fit."""
        super().__init__()
        self._number = number
        self._window, self._rotary = shape.windows[number], shape.rotary[number]
        self._epsilon, self._size = shape.norm_epsilon, shape.head_size
        self._turned = shape.heads + shape.kv_heads
        name = f"model.layers.{number}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        hidden, inner = shape.hidden, shape.intermediate
        queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        self._norm = nn.Buffer(checkpoint.tensor(f"{name}.input_layernorm.weight", hidden))
        self._mlp_norm = nn.Buffer(
            checkpoint.tensor(f"{name}.post_attention_layernorm.weight", hidden)
        )
        self._head_norms = self._read_head_norms(shape, checkpoint, attention)
        inputs = {f"{attention}.q_proj": queries}
        inputs |= {f"{attention}.{part}_proj": keys for part in "kv"}
        self._qkv = checkpoint.linear(inputs, hidden)
        self._output = checkpoint.linear({f"{attention}.o_proj": hidden}, queries)
        gates = {f"{mlp}.{part}_proj": inner for part in ("gate", "up")}
        self._gate_up = checkpoint.linear(gates, hidden)
        self._down = checkpoint.linear({f"{mlp}.down_proj": hidden}, inner)
        # As a module has them, buffers and modules take a slow look-up at every use.
        self._products = tuple(
            one.forward for one in (self._qkv, self._output, self._gate_up, self._down)
        )
        self._norms = (self._norm, self._head_norms, self._mlp_norm)

    def forward(self, hidden: Tensor, attention: Attention, cache: tuple[Tensor, Tensor]) -> None:
        """Add what the layer finds to hidden states (tokens, hidden), in place."""
        qkv, output, gate_up, down = self._products
        norm, head_norms, mlp_norm = self._norms
        heads = qkv(normalized(hidden, norm, self._epsilon)).view(hidden.shape[0], -1, self._size)
        turned, value = heads[:, : self._turned], heads[:, self._turned :]
        if head_norms is not None:
            turned = normalized(turned, head_norms, self._epsilon)
        found = attention.attend(turned, value, cache, window=self._window, rotary=self._rotary)
        hidden += output(found)
        gate, up = gate_up(normalized(hidden, mlp_norm, self._epsilon)).chunk(2, dim=-1)
        hidden += down(functional.silu(gate).mul_(up))

    def compiled(self) -> DecoderLayer | None:
        """Return what the compiled decoder needs, None when it has no kernel for a product."""
        products = [
            one.product
            for one in (self._qkv, self._output, self._gate_up, self._down)
            if isinstance(one, ProductLinear) and one.order is None
        ]
        if len(products) < len(self._products):
            return None
        qkv, output, gate_up, down = products
        return DecoderLayer(
            products=(qkv, output, gate_up, down),
            norms=(self._norm, self._mlp_norm),
            head_norms=self._head_norms,
            window=self._window,
            rotary=self._rotary,
        )

    @staticmethod
    def _read_head_norms(
        shape: Architecture, checkpoint: Checkpoint, attention: str
    ) -> nn.Buffer | None:
        """Return the weights of the norms of queries and keys, (their heads, head size)."""
        query = checkpoint.optional(f"{attention}.q_norm.weight", shape.head_size)
        if query is None:
            return None
        key = checkpoint.tensor(f"{attention}.k_norm.weight", shape.head_size)
        return nn.Buffer(torch.cat([query.expand(shape.heads, -1), key.expand(shape.kv_heads, -1)]))


class FusedModel(nn.Module):
    """A `DecoderModel` of the Llama family."""

    def __init__(self, shape: Architecture, checkpoint: Checkpoint, context_tokens: int) -> None:
        """Read all weights.

        Raises ValueError for tensors that are missing, do not fit or have no place.
        """
        super().__init__()
        self._shape, self._epsilon = shape, shape.norm_epsilon
        self._embedding = nn.Buffer(checkpoint.tensor(EMBEDDING, shape.vocab_size, shape.hidden))
        layers = [FusedLayer(shape, checkpoint, number) for number in range(shape.layers)]
        self._layers = nn.ModuleList(layers)
        self._norm = nn.Buffer(checkpoint.tensor("model.norm.weight", shape.hidden))
        if shape.tied:
            checkpoint.left.discard(f"{_HEAD}.weight")
            self._head: nn.Module = linear([self._embedding], None, self._embedding.dtype)
        else:
            self._head = checkpoint.linear({_HEAD: shape.vocab_size}, shape.hidden)
        checkpoint.check_finished()
        compiled = [found for one in layers if (found := one.compiled()) is not None]
        can = len(compiled) == shape.layers and self._embedding.dtype is torch.bfloat16
        heads = shape.heads + shape.kv_heads, shape.head_size
        self._compiled = Decoder(compiled, heads, self._epsilon) if can else None
        self.spec = ModelSpec(
            layers=(LayerShape(shape.kv_heads, shape.head_size, shape.head_size),) * shape.layers,
            dtype=self._embedding.dtype,
            device=self._embedding.device,
            context_tokens=min(context_tokens, shape.context_tokens),
            vocab_size=shape.vocab_size,
            mixes=self._compiled is not None and have_tiles(),
        )

    @property
    def live_bytes(self) -> int:
        """Bytes of all weights."""
        return live_bytes(self)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Return all logits that are wanted, (tokens, vocabulary), as computed."""
        spec, spans = self.spec, batch.spans
        ids = torch.tensor([token for one in spans for token in one.tokens], device=spec.device)
        hidden = functional.embedding(ids, self._embedding)
        attention = Attention(spans, self._shape, spec.dtype)
        self._add_layers(hidden, attention, batch)
        wanted = [
            end - left
            for one, end in zip(spans, accumulate(len(one.tokens) for one in spans), strict=True)
            for left in range(one.wanted, 0, -1)
        ]
        if not wanted:
            return hidden.new_empty(0, spec.vocab_size)
        if len(wanted) < len(hidden):
            hidden = hidden[wanted]
        logits: Tensor = self._head.forward(normalized(hidden, self._norm, self._epsilon))
        return logits

    def _add_layers(self, hidden: Tensor, attention: Attention, batch: Batch) -> None:
        compiled = self._compiled
        can = have_tiles() or len(hidden) < WIDE_TOKENS
        if compiled is not None and attention.kernel is not None and can:
            pools = batch.keys, batch.values
            if not compiled.add(hidden, attention.kernel, *pools, batch.interrupt):
                raise InterruptedPassError
            return
        for layer, *cache in zip(self._layers, batch.keys, batch.values, strict=True):
            layer.forward(hidden, attention, cache)
