"""Any decoder of the transformers library, run on the engine's KV cache."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lowbit_server.models.blocks import Rows, rectangles
from lowbit_server.models.decoder import BLOCK_TOKENS, Batch, LayerShape, ModelSpec, Span
from lowbit_server.models.grouped_loading import is_grouped, load_grouped
from lowbit_server.models.linears import linear
from lowbit_server.models.measure import live_bytes
from lowbit_server.models.rows import register_masks, row_cache
from lowbit_server.models.weights import Int8Weight

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

# Rotary embeddings whose angles depend on the longest row of the batch: a request would
# change its neighbours once it is longer than this. Below it the angles are constant.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# The check's prompt: long enough to tell right from wrong positions and masks.
CHECK_TOKENS = 8
# Of the logits' norm. On SmolLM2 kernels that round differently make 0.0001 in bf16 and
# 0.08 with LLM.int8 on bitsandbytes, whose outlier columns depend on the batch; a wrong
# mask makes 3.
CHECK_TOLERANCE = 0.5


class UnsupportedModelError(ValueError):
    """The model cannot be run on rows of a KV cache."""


def place(folder: Path, device: str) -> PreTrainedModel:
    """Load a model's safetensors onto a device, in the checkpoint's own dtype.

    On a CPU, fp16 becomes float32, since products in fp16 take several times as long as
    those, and LLM.int8 gets kernels of its own (docs/adr/0007). Checkpoints in the layouts of
    GPTQ and AWQ do not need gptqmodel (`models.linears`). Never runs code from the folder and never
    asks the network. Raises OSError and ValueError for a bad folder, torch.OutOfMemoryError
    or MemoryError without room.
    """
    register_masks()
    transformers.utils.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(folder, **local)
    half = device == "cpu" and config.dtype == torch.float16
    if is_grouped(config):
        dtype = torch.float32 if half else config.dtype or torch.float16
        return load_grouped(folder, config, dtype, device).eval()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if half else "auto",
        device_map=device,
        use_safetensors=True,
        **local,
    )
    if device == "cpu" and getattr(model, "is_loaded_in_8bit", False):
        _use_int8_kernels(model)
    model.eval()
    return model


def _use_int8_kernels(model: PreTrainedModel) -> None:
    from bitsandbytes.nn import Linear8bitLt  # noqa: PLC0415  (slow, and rarely needed)

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear8bitLt):
            largest = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
            weight = Int8Weight(layer.weight.data, largest)
            biases = None if layer.bias is None else [layer.bias]
            model.set_submodule(name, linear([weight], biases, model.dtype))


class TransformersModel:
    """A `DecoderModel` on transformers' modules; also the reference of faster ones."""

    def __init__(self, model: PreTrainedModel, context_tokens: int) -> None:
        """Learn the shape of the model's state from a first forward pass and check it.

        Raises UnsupportedModelError for models with other state than keys and values,
        and for those whose batched logits differ from their plain ones.
        """
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        # The flag of models that take their masks and attention from the library.
        shared = model._supports_attention_backend  # noqa: SLF001
        if "position_ids" not in parameters or not shared:
            raise _unsupported(model, "its positions or masks cannot be set for each row")
        self._keep = "logits_to_keep" if "logits_to_keep" in parameters else ""
        tokens = [1 + index % 7 for index in range(CHECK_TOKENS)]
        expected, cache = self._plain(tokens)
        self._windows, shapes, dtype = _learn_layers(model, cache)
        config = model.config.get_text_config(decoder=True)
        self.spec = ModelSpec(
            layers=shapes,
            dtype=dtype,
            device=model.device,
            context_tokens=min(context_tokens, _context_tokens(config)),
            vocab_size=model.get_input_embeddings().num_embeddings,
        )
        self._check(tokens, expected)

    @property
    def live_bytes(self) -> int:
        """Bytes of all weights, quantization state and buffers."""
        return live_bytes(self._model)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Return all logits that are wanted, (tokens, vocabulary), as computed."""
        parts = [self._run(batch, rows) for rows in rectangles(batch.spans, self.spec.device)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, batch: Batch, rows: Rows) -> Tensor:
        """Return the logits after each row's last tokens, as many as any of them wants."""
        wanted = max(span.wanted for span in rows.spans)
        tokens = torch.tensor([span.tokens for span in rows.spans], device=rows.starts.device)
        # What keeps 0 logits keeps all.
        keep = {self._keep: max(wanted, 1)} if self._keep else {}
        logits: Tensor = self._model(
            input_ids=tokens,
            position_ids=rows.positions,
            past_key_values=row_cache(batch, rows, self._windows),
            use_cache=True,
            **keep,
        ).logits
        return logits[:, logits.shape[1] - wanted :].flatten(0, 1)

    @torch.inference_mode()
    def _plain(self, tokens: Sequence[int]) -> tuple[Tensor, DynamicCache]:
        """Run a prompt as `generate` would; logits are (tokens, vocabulary) float32."""
        cache = DynamicCache(config=self._model.config)
        ids = torch.tensor([tokens], device=self._model.device)
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return logits[0].float(), cache

    @torch.inference_mode()
    def _check(self, tokens: Sequence[int], expected: Tensor) -> None:
        """Run the prompt once more, in chunks and in rows of different lengths."""
        last, half = len(tokens) - 1, len(tokens) // 2
        spec = self.spec
        keys = [_zeros(spec, one.heads, one.key_dim) for one in spec.layers]
        values = [_zeros(spec, one.heads, one.value_dim) for one in spec.layers]

        def run(*spans: Span) -> Tensor:
            return self.forward(Batch(spans, keys, values)).float()

        try:
            found = [run(Span(tokens[:2], 0, [1])), run(Span(tokens[:half], 0, [0]))]
            found += [run(Span(tokens[half:last], half, [0]))]
            found += [run(Span(tokens[last:], last, [0]), Span(tokens[2:3], 2, [1]))]
        except (TypeError, ValueError) as error:
            raise _unsupported(self._model, f"it fails on a batch: {error}") from error
        wanted = expected[[1, half - 1, last - 1, last, 2]]
        deviation = (torch.cat(found) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        if not bool((deviation <= CHECK_TOLERANCE).all()):
            worst = deviation.max().item()
            raise _unsupported(self._model, f"its logits in a batch are off by {worst:.2g}")


def _zeros(spec: ModelSpec, heads: int, dim: int) -> Tensor:
    return torch.zeros(2, heads, BLOCK_TOKENS, dim, dtype=spec.dtype, device=spec.device)


def _learn_layers(
    model: PreTrainedModel, cache: DynamicCache
) -> tuple[list[int | None], tuple[LayerShape, ...], torch.dtype]:
    """Return each layer's sliding window and shape, and the dtype, from a filled cache."""
    windows: list[int | None] = []
    shapes = []
    dtypes = set()
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise _unsupported(model, f"it keeps a {type(layer).__name__}")
        windows.append(getattr(layer, "sliding_window", None))
        _, heads, _, key_dim = layer.keys.shape
        shapes.append(LayerShape(heads, key_dim, layer.values.shape[-1]))
        dtypes |= {layer.keys.dtype, layer.values.dtype}
    if len(dtypes) != 1:
        raise _unsupported(model, "its layers keep keys and values in several dtypes")
    return windows, tuple(shapes), dtypes.pop()


def _context_tokens(config: transformers.PreTrainedConfig) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        return int(rope["original_max_position_embeddings"])
    return int(config.max_position_embeddings)


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} is not supported: {reason}")
