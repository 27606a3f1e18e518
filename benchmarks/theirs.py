"""The peer of a comparison: transformers' LLaVA in torch, trained as LLaVA trains it, as fast as torch makes it.

What a batch of right-padded rows needs no attention mask for (a later token is never seen, and padding is not
supervised) is left out, so that scaled_dot_product_attention may take its flash kernel.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import draw
from benchmarks.content import Rows
from benchmarks.setting import Setting
from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.models.llava import LlavaConfig
from vflax.weights import names

# transformers compares image places with features by a number that it reads back from the device, which cuts the graph
# that torch.compile sees in two; this is its own switch for that.
os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"


class Theirs:
    """A model, its optimizer and its step.

    Args:
        model: its shapes.
        setting: precision, rematerialisation and optimizer.
        device: "cpu" or "cuda".
        compiled: with torch.compile.
    """

    def __init__(
        self, model: LlavaConfig, setting: Setting, device: str = "cpu", compiled: bool = False
    ) -> None:
        self._config, self._setting, self._device = model, setting, device
        masters = getattr(torch, setting.masters)
        with torch.device("meta"):
            net = transformers.LlavaForConditionalGeneration(_hf_config(model)).to(masters)
        net.to_empty(device=device)
        with torch.no_grad():
            _make_buffers(net, model, device)
            for name, parameter in net.named_parameters():
                known = names.canonical(name)
                assert known is not None
                draw.in_torch(known, parameter)
        tower = net.model.vision_tower.requires_grad_(False)
        tower.to(getattr(torch, setting.compute))
        net.train()
        tower.eval()
        if setting.remat == "full":
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.net = net
        self.learning = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.learning, lr=setting.lr, betas=(setting.b1, setting.b2), eps=setting.eps, weight_decay=0.0,
            fused=True,
        )  # fmt: skip
        self._forward = torch.compile(net) if compiled else net
        vision = model.vision
        self._mean = np.float32(vision.image_mean)
        self._std = np.float32(vision.image_std)

    def put(self, rows: Rows) -> dict[str, torch.Tensor]:
        """Rows of one sample each on the device, pictures normalised (which is not timed)."""
        image_id = self._config.decoder.vocab_size - 1
        ids = np.where(rows["ids"] == IMAGE_TOKEN_ID, image_id, rows["ids"]).astype(np.int64)
        pixels = rows["images"].reshape(-1, *rows["images"].shape[2:]).astype(np.float32) / np.float32(255)
        pixels = ((pixels - self._mean) / self._std).transpose(0, 3, 1, 2).copy()
        assert IGNORE_LABEL == -100
        return {
            "input_ids": torch.from_numpy(ids).to(self._device),
            "labels": torch.from_numpy(rows["labels"].astype(np.int64)).to(self._device),
            "pixel_values": torch.from_numpy(pixels).to(self._device, getattr(torch, self._setting.compute)),
        }

    def step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """One optimizer step; the loss, which is on the device and may not be there yet."""
        mixed = self._setting.compute != self._setting.masters
        compute = getattr(torch, self._setting.compute)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device, dtype=compute) if mixed else contextlib.nullcontext():
            loss = self._forward(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, self._setting.clip)
        self.optimizer.step()
        return loss.detach()


def _hf_config(model: LlavaConfig) -> Any:
    vision, decoder = model.vision, model.decoder
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=vision.width, intermediate_size=vision.mlp_dim, num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads, image_size=vision.image_size, patch_size=vision.patch_size,
            hidden_act=vision.hidden_act, layer_norm_eps=vision.norm_eps,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=decoder.vocab_size, hidden_size=decoder.width, intermediate_size=decoder.mlp_dim,
            num_hidden_layers=decoder.num_layers, num_attention_heads=decoder.num_heads,
            num_key_value_heads=decoder.num_kv_heads, head_dim=decoder.head_dim, rms_norm_eps=decoder.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
            max_position_embeddings=decoder.max_positions, tie_word_embeddings=False,
        ),
        image_token_id=decoder.vocab_size - 1, projector_hidden_act="gelu",
        vision_feature_layer=vision.feature_layer, vision_feature_select_strategy="default",
        image_seq_length=vision.num_tokens, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


def _make_buffers(net: Any, model: LlavaConfig, device: str) -> None:
    """What is computed, not learned, and so is not there after to_empty: positions and rotary frequencies."""
    for module in net.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "position_ids":
                buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
            elif name.endswith("inv_freq"):
                decoder = model.decoder
                exponents = torch.arange(0, decoder.head_dim, 2, dtype=torch.float32, device=device)
                frequencies = 1.0 / decoder.rope_theta ** (exponents / decoder.head_dim)
                setattr(module, name, frequencies)
            else:
                raise SystemExit(f"transformers has a buffer that is not known here: {name}")
