"""The model card of an export (README.md): recipe, data, figures, and what was verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etils import epath
from huggingface_hub import ModelCardData

import vflax
from vflax.metrics import read_metrics
from vflax.mirror import remote
from vflax.weights import hub
from vflax.weights.kinds import WORKDIR
from vflax.weights.open import Opened

# The keys of a run's config that make its recipe.
_RECIPE = (
    "stage", "variant", "epochs", "steps", "seed", "template", "batch.samples", "batch.accumulation", "optimizer.lr",
    "optimizer.bridge_lr", "optimizer.schedule", "optimizer.warmup", "optimizer.decay", "optimizer.clip",
    "data.max_length", "data.packing", "image.mode", "image.position", "dtype", "lora.rank", "lora.alpha",
    "lora.dropout", "lora.base", "init.checkpoint", "init.vision", "init.decoder", "init.bridge",
)  # fmt: skip
_LIBRARIES = {"hf": "transformers", "lora": "peft", "llava": "llava", "projector": "llava"}
_USE = {
    "hf": "`transformers.LlavaForConditionalGeneration.from_pretrained(DIR)`; `AutoProcessor` renders chats as in "
    "training.",
    "lora": "`peft.PeftModel.from_pretrained(BASE_MODEL, DIR)` on the Hugging Face LLaVA that it was trained from.",
    "llava": "`llava.model.builder.load_pretrained_model(DIR, None, NAME)` of the original LLaVA code.",
    "projector": "`--pretrain_mm_mlp_adapter DIR/mm_projector.bin` of the original LLaVA code.",
}


def write(opened: Opened, record: dict[str, Any]) -> str:
    """The text of the card.

    Args:
        opened: the model that was exported.
        record: what export.json will say; see export.py.
    """
    kind = record["format"]
    base = hub.meant_id(record["base"]) if kind == "lora" else None
    header = ModelCardData(
        library_name=_LIBRARIES[kind],
        pipeline_tag="image-text-to-text",
        tags=["llava", "vision-language", "vflax"],
        # A path on this machine names nothing on the hub.
        base_model=base.repo if base else None,
    )
    decoder, vision = opened.files.config.decoder, opened.files.config.vision
    lines = [
        "---", header.to_yaml(), "---", "",
        f"# {'LoRA adapter' if kind == 'lora' else 'Projector' if kind == 'projector' else 'LLaVA model'}", "",
        f"Written by vflax {vflax.__version__} from {opened.kind}"
        + (f", step {record['step']}" if record["step"] is not None else "")
        + (", without its adapters" if record.get("without_adapters") else "") + ".", "",
        f"- tower: ViT of {vision.num_layers} layers, width {vision.width}, {vision.image_size} px, "
        f"{vision.num_tokens} tokens per image",
        f"- bridge: {opened.files.config.bridge.kind}",
        f"- decoder: {decoder.num_layers} layers, width {decoder.width}, {decoder.vocab_size} tokens", "",
        "## Use", "", _USE[kind], "",
    ]  # fmt: skip
    if opened.kind == WORKDIR:
        lines += _recipe(opened.place, record["step"])
    lines += [
        "## Verified", "",
        f"{record['tensors']} tensors were read back and compared bit for bit; the largest difference of a logit on a "
        f"fixed batch is {record['max_abs_logit_diff']:g}."
        + (f" In transformers: {record['torch']['outcome']}." if "torch" in record else "")
        + " The rest stands in export.json.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _recipe(workdir: Path, step: int | None) -> list[str]:
    """What a run says of itself: its config, its data, its figures."""
    config = _read(workdir / "config.json")
    lines: list[str] = []
    if config:
        rows = [(key, value) for key in _RECIPE if (value := _get(config, key)) not in (None, "")]
        lines += ["## Recipe", "", "| key | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows), ""]
        learns = [f"`{pattern}`: {verdict}" for pattern, verdict in config.get("freeze", [])]
        lines += ["What learns, first match first: " + ", ".join(learns) + ".", ""]
    record = _read(remote(workdir / "checkpoints") / str(step) / "record" / "metadata")
    data = dict(record.get("data", {}))
    sources = [str(_get(source, "path")) for source in (config.get("data") or {}).get("sources", [])]
    if data or sources:
        lines += ["## Data", ""]
        lines += [f"- source: {path}" for path in sources]
        lines += [f"- {key}: {value}" for key, value in data.items() if isinstance(value, str | int)]
        lines += [""]
    records = read_metrics(workdir / "metrics.jsonl")
    figures = {k: v for r in records if r["step"] == step for k, v in r.items() if k.startswith("eval/")}
    if figures:
        lines += ["## Figures on held-out samples", "", "| figure | value |", "|---|---|"]
        lines += [f"| {key} | {value:.4g} |" for key, value in figures.items()]
        lines += [""]
    return lines


def _read(path: Path | epath.Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _get(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
