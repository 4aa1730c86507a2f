"""What an evaluation measured. A plain record that crosses process boundaries."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Quality(BaseModel):
    """Quality on held-out text, size and speed, beside those of another model.

    KL divergences are in nats, sizes in bytes.
    """

    # Figures of a broken model may be infinite or no numbers; JSON's null would lose that.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    text_digest: str
    tokens: int
    perplexity: float
    base_perplexity: float
    mean_kl: float | None = None
    median_kl: float | None = None
    p99_kl: float | None = None
    max_kl: float | None = None
    top1_agreement: float | None = None
    base: str = ""
    """Name of the model that it was compared with."""
    base_revision: str = ""
    device: str = ""
    disk_bytes: int = 0
    base_disk_bytes: int = 0
    live_bytes: int = 0
    """Bytes live once loaded, without the KV cache."""
    base_live_bytes: int = 0
    prefill_tokens_per_second: float = 0
    base_prefill_tokens_per_second: float = 0
    decode_tokens_per_second: float = 0
    """Of one stream."""
    base_decode_tokens_per_second: float = 0
    peak_memory_bytes: int = 0
    """Of the process that measured."""
