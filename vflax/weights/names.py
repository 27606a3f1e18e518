"""The key tables: which parameter is which tensor of a checkpoint, and how the one becomes the other.

CANONICAL tensor names are those of Hugging Face's LLaVA files on the hub (transformers 4.x):

    vision_tower.vision_model.*      multi_modal_projector.linear_i.*      language_model.model.*
    language_model.lm_head.weight

Every other naming is brought to the canonical one by a list of (pattern, replacement) rules, so a new format
is one more list. From canonical names to parameters there is one table, and both directions come from the
same entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vflax.models import lora as adapters
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.models.lora import LoraConfig

Index = tuple[slice, ...]

_SAME_1, _SAME_2 = (0,), (0, 1)
# HF keeps a linear's weight [out, in], we keep [in, out].
_TRANSPOSE = (1, 0)
# HF keeps a convolution OIHW, we keep HWIO.
_CONV = (2, 3, 1, 0)


@dataclass(frozen=True)
class Entry:
    """One parameter and its tensor, or with `layers` one stacked parameter and a tensor per layer.

    path: parameter path, for example decoder/layers/attention/q/kernel.
    pattern: canonical tensor name, "{layer}" standing for the layer's number.
    axes: axis i of the parameter (behind the layer axis) is axis axes[i] of the tensor.
    shape: the parameter's shape without the layer axis.
    layers: length of the leading layer axis; None when the parameter is not stacked.
    """

    path: str
    pattern: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    layers: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical tensor names, in the order of the layer axis."""
        if self.layers is None:
            return (self.pattern,)
        return tuple(self.pattern.format(layer=i) for i in range(self.layers))

    @property
    def param_shape(self) -> tuple[int, ...]:
        """Shape of the parameter, the layer axis included."""
        return self.shape if self.layers is None else (self.layers, *self.shape)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of (each of) the tensor(s)."""
        return tuple(self.shape[self.axes.index(axis)] for axis in range(len(self.axes)))

    @property
    def row_axes(self) -> tuple[int, ...]:
        """Axes of the parameter along which the rows of its tensors lie: the layer axis, and the tensor's first."""
        return (self.axes.index(0),) if self.layers is None else (0, self.axes.index(0) + 1)

    def to_param(self, tensor: np.ndarray) -> np.ndarray:
        """Tensor, or a part of it, to (one layer of) the parameter; a view."""
        return tensor.transpose(self.axes)

    def to_tensor(self, param: np.ndarray) -> np.ndarray:
        """(One layer of) the parameter to the tensor; the inverse of to_param, a view."""
        return param.transpose([self.axes.index(axis) for axis in range(len(self.axes))])

    def tensor_index(self, index: Index) -> Index:
        """Where a part of (one layer of) the parameter lies in the tensor."""
        return tuple(index[self.axes.index(axis)] for axis in range(len(self.axes)))

    def param_index(self, index: Index) -> Index:
        """Where a part of the tensor lies in (one layer of) the parameter."""
        return tuple(index[axis] for axis in self.axes)


def table(config: LlavaConfig, lora: LoraConfig | None = None) -> dict[str, Entry]:
    """The key table of a model: {parameter path: Entry}, for every parameter of the tree.

    The scales of an int8 kernel are not in it: they come from the kernel's tensors (`weight_of`).
    """
    entries = [*_vision(config.vision), *_bridge(config.bridge), *_decoder(config.decoder)]
    if lora is not None:
        entries += _adapters(entries, lora)
    return {entry.path: entry for entry in entries}


def weight_of(path: str) -> str:
    """The path in `table` whose tensors a parameter comes from: its own, but for the scales of an int8 kernel."""
    return path.replace(f"/{adapters.SCALE}", "/kernel")


def carried(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that belong to the checkpoint but are never computed: {canonical name: shape}.

    They are the tower's layers behind the feature layer, and its last norm. They are kept as they came and
    written back at export, because Hugging Face's classes want them.
    """
    return _carried(config.vision)


def _carried(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {}
    for entry in _vision_layers(vision, vision.num_layers):
        result |= {name: entry.tensor_shape for name in entry.names[vision.num_computed_layers :]}
    for kind in ("weight", "bias"):
        result[f"{_TOWER}.post_layernorm.{kind}"] = (vision.width,)
    return result


def expected(config: LlavaConfig, lora: LoraConfig | None = None) -> dict[str, tuple[int, ...]]:
    """All tensors of a checkpoint, carried ones included: {canonical name: shape}."""
    result = {name: entry.tensor_shape for entry in table(config, lora).values() for name in entry.names}
    return result | carried(config)


def expected_part(part: VisionConfig | BridgeConfig | DecoderConfig) -> dict[str, tuple[int, ...]]:
    """All tensors of one part of a checkpoint: {canonical name: shape}."""
    if isinstance(part, VisionConfig):
        entries = _vision(part)
    elif isinstance(part, BridgeConfig):
        entries = _bridge(part)
    else:
        entries = _decoder(part)
    result = {name: entry.tensor_shape for entry in entries for name in entry.names}
    return result | _carried(part) if isinstance(part, VisionConfig) else result


def spare(decoder: DecoderConfig) -> tuple[str, ...]:
    """Tensors that may be there and are not read: of tied weights Hugging Face, too, takes the embedding."""
    return (LM_HEAD,) if decoder.tie_word_embeddings else ()


_TOWER = "vision_tower.vision_model"
BRIDGE = "multi_modal_projector"
_DECODER = "language_model.model"
LM_HEAD = "language_model.lm_head.weight"
EMBEDDING = f"{_DECODER}.embed_tokens.weight"


def _vision(vision: VisionConfig) -> list[Entry]:
    width, patch = vision.width, vision.patch_size
    embeddings = f"{_TOWER}.embeddings"
    top = [
        Entry("vision/class_embedding", f"{embeddings}.class_embedding", _SAME_1, (width,)),
        Entry(
            "vision/patch_embedding/kernel",
            f"{embeddings}.patch_embedding.weight",
            _CONV,
            (patch, patch, 3, width),
        ),
        Entry(
            "vision/position_embedding",
            f"{embeddings}.position_embedding.weight",
            _SAME_2,
            (vision.num_patches + 1, width),
        ),
        # "layrnorm" is how OpenAI's checkpoint, and so everyone's, spells it.
        Entry("vision/pre_norm/scale", f"{_TOWER}.pre_layrnorm.weight", _SAME_1, (width,)),
        Entry("vision/pre_norm/bias", f"{_TOWER}.pre_layrnorm.bias", _SAME_1, (width,)),
    ]
    return top + (_vision_layers(vision, vision.num_computed_layers) if vision.num_computed_layers else [])


def _vision_layers(vision: VisionConfig, layers: int) -> list[Entry]:
    width, mlp = vision.width, vision.mlp_dim
    ours, theirs = "vision/layers", f"{_TOWER}.encoder.layers.{{layer}}"
    entries = []
    for norm, hf in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
        entries.append(Entry(f"{ours}/{norm}/scale", f"{theirs}.{hf}.weight", _SAME_1, (width,), layers))
        entries.append(Entry(f"{ours}/{norm}/bias", f"{theirs}.{hf}.bias", _SAME_1, (width,), layers))
    linears = [(f"attention/{x}", f"self_attn.{x}_proj", width, width) for x in ("q", "k", "v", "out")]
    linears += [("mlp/fc1", "mlp.fc1", width, mlp), ("mlp/fc2", "mlp.fc2", mlp, width)]
    for name, hf, fan_in, fan_out in linears:
        entries.append(
            Entry(f"{ours}/{name}/kernel", f"{theirs}.{hf}.weight", _TRANSPOSE, (fan_in, fan_out), layers)
        )
        entries.append(Entry(f"{ours}/{name}/bias", f"{theirs}.{hf}.bias", _SAME_1, (fan_out,), layers))
    return entries


def _bridge(bridge: BridgeConfig) -> list[Entry]:
    entries = []
    for i in range(bridge.num_linears):
        shape = (bridge.in_width if i == 0 else bridge.out_width, bridge.out_width)
        ours, theirs = f"bridge/layers_{i}", f"{BRIDGE}.linear_{i + 1}"
        entries.append(Entry(f"{ours}/kernel", f"{theirs}.weight", _TRANSPOSE, shape))
        entries.append(Entry(f"{ours}/bias", f"{theirs}.bias", _SAME_1, shape[1:]))
    return entries


def _decoder(decoder: DecoderConfig) -> list[Entry]:
    width, layers = decoder.width, decoder.num_layers
    heads, kv_heads = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    ours, theirs = "decoder/layers", f"{_DECODER}.layers.{{layer}}"
    vocabulary = (decoder.vocab_size, width)
    entries = [Entry("decoder/embed_tokens/embedding", EMBEDDING, _SAME_2, vocabulary)]
    for norm, hf in (("input_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm")):
        entries.append(Entry(f"{ours}/{norm}/scale", f"{theirs}.{hf}.weight", _SAME_1, (width,), layers))
    linears = [
        ("attention/q", "self_attn.q_proj", width, heads),
        ("attention/k", "self_attn.k_proj", width, kv_heads),
        ("attention/v", "self_attn.v_proj", width, kv_heads),
        ("attention/o", "self_attn.o_proj", heads, width),
        ("mlp/gate", "mlp.gate_proj", width, decoder.mlp_dim),
        ("mlp/up", "mlp.up_proj", width, decoder.mlp_dim),
        ("mlp/down", "mlp.down_proj", decoder.mlp_dim, width),
    ]
    for name, hf, fan_in, fan_out in linears:
        entries.append(
            Entry(f"{ours}/{name}/kernel", f"{theirs}.{hf}.weight", _TRANSPOSE, (fan_in, fan_out), layers)
        )
    entries.append(Entry("decoder/norm/scale", f"{_DECODER}.norm.weight", _SAME_1, (width,)))
    if not decoder.tie_word_embeddings:
        entries.append(Entry("decoder/lm_head/kernel", LM_HEAD, _TRANSPOSE, vocabulary[::-1]))
    return entries


def _adapters(entries: Sequence[Entry], lora: LoraConfig) -> list[Entry]:
    """The adapters beside the kernels that `lora` names; lora_A is [rank, in] and lora_B [out, rank], as in PEFT."""
    result = []
    for entry in entries:
        linear, _, leaf = entry.path.rpartition("/")
        if leaf != "kernel" or not lora.is_target(linear):
            continue
        theirs, (fan_in, fan_out) = entry.pattern.removesuffix(".weight"), entry.shape
        for ours, hf, shape in (
            (adapters.A, "lora_A", (fan_in, lora.rank)),
            (adapters.B, "lora_B", (lora.rank, fan_out)),
        ):
            pattern = f"{theirs}.{hf}.weight"
            result.append(Entry(f"{linear}/{ours}", pattern, _TRANSPOSE, shape, entry.layers))
    return result


# --- other namings ------------------------------------------------------------------------------------------

# (pattern for the beginning or the whole of a name, replacement; None: not a weight of the model, left
# aside).
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str] | None]]

# Buffers that old files carry; both are computed from the config.
_BUFFERS: Rules = (
    (r".*\.position_ids$", None),
    (r"^position_ids$", None),
    (r".*\.rotary_emb\.inv_freq$", None),
)

# One list for every format: no two of them mean different weights by one name.
RULES: Rules = (
    *_BUFFERS,
    # What a CLIPModel holds beside its tower.
    (r"^(?:text_model\.|text_projection\.|visual_projection\.|logit_scale$)", None),
    # Hugging Face LLaVA from 4.52 on, a bare LLaMA, and the original LLaVA, which is a LLaMA with more in it.
    (r"^model\.language_model\.", f"{_DECODER}."),
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", f"{_DECODER}."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^(?:model\.)?multi_modal_projector\.", f"{BRIDGE}."),
    # The original projector: linears and activations are numbered together (0, 2, 4, ...), a single linear has no
    # number.
    (r"^(?:.*\.)?mm_projector\.(\d+)\.", lambda match: f"{BRIDGE}.linear_{int(match[1]) // 2 + 1}."),
    (r"^(?:.*\.)?mm_projector\.(?=weight$|bias$)", f"{BRIDGE}.linear_1."),
    # The tower in the original LLaVA, in Hugging Face's 4.x, and in 5.x, which has no "vision_model".
    (r"^(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?", f"{_TOWER}."),
    # OpenAI-CLIP as CLIPModel, CLIPVisionModel of 4.x, or CLIPVisionModel of 5.x (no prefix).
    (r"^(?:vision_model\.)?(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.)", f"{_TOWER}."),
)


def canonical(name: str, rules: Rules = RULES) -> str | None:
    """Bring a tensor's name to the canonical form; None: left aside. A name that no rule knows stays as it is."""
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return None if replacement is None else re.sub(pattern, replacement, name, count=1)
    return name


def original(name: str, bridge: str) -> str:
    """A canonical name as the original LLaVA code has it (llava/model/language_model/llava_llama.py).

    Args:
        name: a canonical tensor name.
        bridge: the bridge's kind: a "linear" projector's tensors have no number.
    """
    name = name.replace("language_model.", "", 1) if name.startswith("language_model.") else name
    name = re.sub(rf"^{re.escape(_TOWER)}\.", "model.vision_tower.vision_tower.vision_model.", name)
    match = re.match(rf"{BRIDGE}\.linear_(\d+)\.", name)
    if match:
        number = "" if bridge == "linear" else f"{2 * (int(match[1]) - 1)}."
        name = f"model.mm_projector.{number}{name[match.end() :]}"
    return name


def part_of(name: str) -> str:
    """Which part of the model a canonical name belongs to: "vision", "bridge", "decoder", or "" for none."""
    parts = {f"{_TOWER}.": "vision", f"{BRIDGE}.": "bridge", f"{_DECODER}.": "decoder", LM_HEAD: "decoder"}
    return next((part for prefix, part in parts.items() if name.startswith(prefix)), "")


def hf_naming(raw: Iterable[str]) -> str | None:
    """Which of Hugging Face's namings of a LLaVA the names in a file are; None where they are none, or several."""
    found = set()
    for name in raw:
        for naming, (tower, words) in _HF_NAMINGS.items():
            if re.match(words, name):
                found.add((naming, "words"))
            if re.match(tower, name):
                found.add((naming, "tower"))
    matching = [n for n in _HF_NAMINGS if {(n, "words"), (n, "tower")} <= found]
    return matching[0] if len(matching) == 1 else None


# (beginning of the tower's names, beginning of the decoder's).
_HF_NAMINGS = {
    "4.x hub": (r"vision_tower\.vision_model\.", r"language_model\.model\."),
    "4.52 module": (r"model\.vision_tower\.vision_model\.", r"model\.language_model\."),
    "5.x module": (r"model\.vision_tower\.(?!vision_)", r"model\.language_model\."),
    "5.x saved": (r"vision_tower\.(?!vision_)", r"language_model\.model\."),
}
