"""Tiny random models and jobs run inside the test's own process."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit_server.jobs.context import Context
from lowbit_server.jobs.importing import import_model
from lowbit_server.jobs.quantizing import quantize_model
from lowbit_server.jobs.report import Reporter
from lowbit_server.jobs.spec import JOB_REPORT, ImportSpec, Progress, QuantizeSpec
from lowbit_server.models.transformers import place
from lowbit_server.quant.awq_packing import AwqLinear
from lowbit_server.quant.foreign import grouped_bits
from lowbit_server.quant.grids import grid, nearest
from lowbit_server.quant.packing import PackedLinear
from lowbit_server.store.manifest import MANIFEST_FILE, Manifest
from lowbit_server.store.sealing import check_files
from lowbit_server.store.tensors import TensorWriter
from lowbit_server.testing import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lowbit_server.jobs.spec import CalibrationSpec, EvaluationSpec
    from lowbit_server.models.grouped import GroupedWeight
    from lowbit_server.quant.schemes import FloatType, Scheme


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2-biases": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3-head-norms": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 32},
    "mistral-window": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 8},
    "smollm3-partly-rotary": {
        "model_type": "smollm3",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
}


def random_source(folder: Path, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """Write a Hugging Face folder with random weights and return it."""
    kind = config.pop("model_type")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | config)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros would hide a bias that got lost
            torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


class Store:
    """Folders of a store, and jobs that write into it."""

    def __init__(self, home: Path) -> None:
        self.models = home / "models"
        self.models.mkdir()
        self.progress: list[Progress] = []
        self.cache_bytes = 1 << 28

    def imported(self, path: Path, name: str = "base", kind: FloatType | None = None) -> Path:
        spec = ImportSpec(model=name, path=str(path), type=kind)
        import_model(spec, self._context(name, path.parent))
        return self._sealed(name)

    def quantized(
        self,
        scheme: Scheme,
        name: str = "small",
        evaluation: EvaluationSpec | None = None,
        calibration: CalibrationSpec | None = None,
    ) -> Path:
        spec = QuantizeSpec(
            model=name,
            source="base",
            scheme=scheme,
            device="cpu",
            calibration=calibration,
            evaluation=evaluation,
        )
        quantize_model(spec, self._context(name, self.models))
        return self._sealed(name)

    def manifest(self, name: str) -> Manifest:
        return Manifest.model_validate_json((self.models / name / MANIFEST_FILE).read_bytes())

    def _context(self, name: str, root: Path) -> Context:
        self._stream = io.StringIO()
        # Jobs stage beside the models here; publishing is the front's part.
        return Context(
            staging=self.models / name,
            checkpoint=self.models.parent / "checkpoints" / name,
            models=self.models,
            roots=(root,),
            scripted=False,
            reporter=Reporter(self._stream),
            cache=self.models.parent / "cache",
            cache_bytes=self.cache_bytes,
        )

    def _sealed(self, name: str) -> Path:
        reports = [JOB_REPORT.validate_json(line) for line in self._stream.getvalue().splitlines()]
        self.progress = [report for report in reports if isinstance(report, Progress)]
        check_files(self.models / name, self.manifest(name), digests=True)
        return self.models / name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Return whether two sets of tensors agree in names, types, shapes and every bit."""
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def config(folder: Path) -> dict[str, Any]:
    """Return config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def grouped_checkpoint(
    source: Path,
    folder: Path,
    quantization: dict[str, Any],
    quantize: Callable[[str, torch.Tensor], GroupedWeight],
) -> tuple[Path, Any]:
    """Quantize the linear layers of a folder; return the result and its model in bf16."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tensors = weights(source)
    folder.mkdir()
    with TensorWriter(folder, 4 * len(tensors)) as writer:
        for name, tensor in tensors.items():
            if not name.endswith("_proj.weight"):
                writer.write(name, tensor)
                continue
            layer = quantize(name.removesuffix(".weight"), tensor)
            model.get_parameter(name).data = layer.dequantized(tensor.dtype)
            for key, part in layer.tensors(name.removesuffix(".weight")).items():
                writer.write(key, part)
    text = json.dumps(config(source) | {"quantization_config": quantization})
    (folder / "config.json").write_text(text)
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    return folder, model


def rounded(weight: torch.Tensor, bits: int, size: int, *, sym: bool) -> tuple[torch.Tensor, ...]:
    """Return codes (in, out), zero points and scales (groups, out)."""
    size = weight.shape[1] if size == -1 else size
    groups = weight.float().T.reshape(-1, size, len(weight))
    scales, zeros = grid(groups, bits, sym=sym)
    return nearest(groups, scales, zeros, bits).flatten(0, 1), zeros, scales


def dense(base: Path, folder: Path, dtype: torch.dtype) -> Any:
    """Return a quantized copy's model with plain weights: what its codes stand for."""
    said = config(folder)["quantization_config"]
    if said["quant_method"] == "bitsandbytes":
        return place(folder, "cpu")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    tensors = weights(folder)
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        packed: GroupedWeight
        if said["quant_method"] == "awq":
            packed = AwqLinear(*(tensors.pop(f"{name}.{key}") for key in AwqLinear.keys))
        else:
            parts = (tensors.pop(f"{name}.{key}") for key in PackedLinear.keys)
            packed = PackedLinear(grouped_bits(said, name), *parts)
        tensors[f"{name}.weight"] = packed.dequantized(dtype)
    left = model.load_state_dict(tensors, strict=False)
    assert left.unexpected_keys == []
    assert set(left.missing_keys) <= {"lm_head.weight"}  # tied
    return model
