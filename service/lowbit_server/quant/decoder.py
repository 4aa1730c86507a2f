"""Runs decoder layers of the Llama family one at a time, in parts, on calibration samples.

A calibrated method needs each linear layer's inputs, and the next layer's inputs from the
quantized weights. Run in parts, a layer needs one pass for that and not one per linear.
The parts are the modules of transformers, so that biases, norms of queries and keys,
scaled rotary embeddings and sliding windows are what the model was made with.

Imports torch and transformers: for job processes only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit_server.quant.attention import BLOCKED, causal_mask

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

# Calibration runs in bfloat16 whatever the weights are stored in: its products keep
# float32's range, take a fraction of its time, and what they feed is a mean over samples.
ACTIVATIONS = torch.bfloat16

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
LINEARS = (*QKV, OUTPUT, *GATE_UP, DOWN)
EMBEDDING = "model.embed_tokens.weight"


class Decoder:
    """The layers of one model; they hold no memory until their turn comes."""

    def __init__(self, folder: Path, device: str, sequence_tokens: int) -> None:
        """Build the architecture of a folder's config for samples of a length."""
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=BLOCKED)
        self._layers = model.model.layers
        self._device = device
        self.value_heads: int = config.num_key_value_heads
        self.head_size: int = model.model.layers[0].self_attn.head_dim
        # The one part with values of its own, which meta tensors lack.
        rotary = type(model.model.rotary_emb)(config).to(device)
        positions = torch.arange(sequence_tokens, device=device)[None]
        example = torch.empty(0, dtype=ACTIVATIONS, device=device)
        self._rotation: tuple[Tensor, Tensor] = rotary(example, positions)
        windows = [_window(config, layer.self_attn) for layer in self._layers]
        masks = {
            window: causal_mask(sequence_tokens, window, ACTIVATIONS, device)
            for window in set(windows)
        }
        self._masks = [masks[window] for window in windows]

    def layer(self, number: int, tensors: Mapping[str, Tensor]) -> Layer:
        """Return a layer with its tensors, named as inside it, such as "mlp.up_proj.weight"."""
        module = self._layers[number]
        self._layers[number] = nn.Identity()  # so that its memory goes with the caller's
        weights = {name: tensor.to(self._device, ACTIVATIONS) for name, tensor in tensors.items()}
        module.load_state_dict(weights, assign=True)
        return Layer(module, self._rotation, self._masks[number])


class Layer:
    """One decoder layer. Hidden states are (samples, tokens, hidden), bfloat16."""

    def __init__(self, module: nn.Module, rotation: tuple[Tensor, Tensor], mask: Tensor) -> None:
        """Take the module's last linear layers out, so that its parts end before them."""
        self._module: Any = module
        self._linears = {name: module.get_submodule(name) for name in LINEARS}
        for name in (OUTPUT, DOWN):
            module.set_submodule(name, nn.Identity())
        self._rotation = rotation
        self._mask = mask

    def attention_input(self, hidden: Tensor) -> Tensor:
        """Return the input of the query, key and value layers."""
        normed: Tensor = self._module.input_layernorm(hidden)
        return normed

    def attention(self, normed: Tensor) -> Tensor:
        """Return the input of the output layer, (samples, tokens, heads * head size)."""
        attended: Tensor = self._module.self_attn(
            hidden_states=normed, position_embeddings=self._rotation, attention_mask=self._mask
        )[0]
        return attended

    def mlp_input(self, hidden: Tensor) -> Tensor:
        """Return the input of the gate and up layers."""
        normed: Tensor = self._module.post_attention_layernorm(hidden)
        return normed

    def mlp(self, normed: Tensor) -> Tensor:
        """Return the input of the down layer, (samples, tokens, intermediate)."""
        gated: Tensor = self._module.mlp(normed)
        return gated

    def project(self, name: str, inputs: Tensor) -> Tensor:
        """Return the output of one linear layer."""
        projected: Tensor = self._linears[name](inputs)
        return projected

    def replace(self, name: str, weight: Tensor) -> None:
        """Go on with another weight (out, in), such as the quantized one."""
        self._linears[name].weight.data = weight


def _window(config: object, attention: nn.Module) -> int | None:
    """Return how many tokens back a layer sees itself included, or None for all.

    Mistral's config speaks for all layers, the others' layers for themselves.
    """
    window: int | None = getattr(
        attention, "sliding_window", getattr(config, "sliding_window", None)
    )
    return window
