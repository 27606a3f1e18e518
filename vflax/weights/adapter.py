"""LoRA adapters (Hu et al., arXiv 2106.09685): PEFT's files read, and a base seen with its adapter merged.

PEFT's directory has adapter_config.json and adapter_model.safetensors (or .bin); LLaVA's own LoRA runs add
non_lora_trainables.bin, which holds the projector, and the config.json of the whole model.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from vflax.errors import UserError
from vflax.small_files import Problems, read_json
from vflax.values import COUNT, FLAG, POSITIVE, SHARE, TEXT, Kind
from vflax.weights import hub, names
from vflax.weights.file_source import FileSource, TensorSource
from vflax.weights.names import Index
from vflax.weights.safetensors_io import and_more
from vflax.weights.source import JoinedSource

CONFIG, STEM, NON_LORA = "adapter_config.json", "adapter_model", "non_lora_trainables.bin"
_LORA = re.compile(r"(.+)\.lora_([AB])\.weight")
# Variants of LoRA that compute something else; each must be off.
_OFF: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    # The others change the base as they begin, and the files hold the difference to that.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
} | {
    key: (False, None)
    for key in (
        "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens",
        "arrow_config", "kasa_config", "monteclora_config",
    )
}  # fmt: skip
_MERGE_IT = "merge it with PEFT (merge_and_unload) and take the model that this saves"


_MODULES = Kind("text, or a list of it", lambda value: TEXT.holds(value) or TEXT.listed().holds(value))
# What the keys of adapter_config.json must be, where it has them.
_KINDS: dict[str, Kind] = {
    "r": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE.or_null(),
    "use_rslora": FLAG.or_null(),
    "target_modules": _MODULES.or_null(),
    "base_model_name_or_path": TEXT.or_null(),
    "revision": TEXT.or_null(),
}


class Adapter:
    """An adapter directory: what it changes, and of which base."""

    def __init__(self, folder: Path) -> None:
        """Read adapter_config.json and the headers of the weights.

        Raises:
            UserError: for files that are missing or damaged, and every setting that vflax does not merge, by name.
        """
        path = folder / CONFIG
        raw = read_json(path)
        problems = Problems(path)
        for key, allowed in _OFF.items():
            problems.expect(key, raw.get(key, allowed[0]), allowed, _MERGE_IT)
        problems.check({"lora_alpha": None, **raw}, _KINDS)
        problems.stop()
        self.folder, self.raw = folder, raw
        self.alpha, self.rslora = float(raw["lora_alpha"]), bool(raw.get("use_rslora"))
        base, revision = raw.get("base_model_name_or_path") or "", raw.get("revision")
        self.base: str = f"{base}@{revision}" if revision and hub.meant_id(base) else base
        parts = [FileSource(folder, RULES, STEM)]
        if (folder / NON_LORA).is_file():
            parts.append(FileSource.file(folder / NON_LORA, RULES))
        self.source: TensorSource = JoinedSource(parts)
        flat = [
            f"{name} {list(shape)}"
            for name in self.source.names()
            if split_lora(name) and (len(shape := self.source.shape(name)) < 2 or 0 in shape)
        ]
        if flat:
            raise UserError(
                f"{folder}: halves of adapters that are no matrices; fetch these weights again:\n  "
                + "\n  ".join(flat[:10] + and_more(flat, 10))
            )
        if unknown := sorted(name for name in self.source.names() if not _is_known(name)):
            raise UserError(
                f"{folder}: vflax merges LoRA of linear layers and whole replaced weights; it does not know "
                f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}; {_MERGE_IT}"
            )


def scaling(alpha: float, rank: int, rslora: bool = False) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) (rank-stabilised, Kalajdzievski, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _peft_rules() -> names.Rules:
    """PEFT wraps names: base_model.model.NAME, MODULE.modules_to_save.default.weight, MODULE.lora_A.default.weight,
    and MODULE.base_layer.weight of an embedding that it saves whole beside its adapter."""

    def unwrapped(match: re.Match[str]) -> str:
        name = re.sub(r"\.(?:modules_to_save|default|base_layer)(?=\.)", "", match[1])
        return names.canonical(name) or name

    return ((r"^(?:base_model\.model\.)?(.*)$", unwrapped),)


RULES = _peft_rules()


def split_lora(name: str) -> tuple[str, str] | None:
    """(name of the weight that it changes, "A" or "B") of an adapter's tensor; None for another tensor."""
    match = _LORA.fullmatch(name)
    return (f"{match[1]}.weight", match[2]) if match else None


def _is_known(name: str) -> bool:
    """Whether it is one half of a linear's adapter, or a whole weight of the model."""
    changed = split_lora(name)
    return names.part_of(changed[0] if changed else name) != "" and (
        changed is not None or ".lora_" not in name
    )


class MergedSource:
    """A base with W + scaling * B A in place of each W that an adapter changes; the sum is float32, as it is read."""

    def __init__(self, base: TensorSource, adapter: TensorSource, alpha: float, rslora: bool = False) -> None:
        """Compare the two; nothing is read.

        Args:
            base: the weights.
            adapter: NAME.lora_A.weight [r, in] and NAME.lora_B.weight [out, r] under canonical names; every other
                tensor replaces the base's. It may be the base itself, when this holds both.
            alpha, rslora: see `scaling`.

        Raises:
            UserError: when the adapter does not fit the base: all of it at once, with the files.
        """
        self._base, self._adapter, self._alpha, self._rslora = base, adapter, alpha, rslora
        self._merged: dict[str, tuple[str, str]] = {}
        self._replaced: set[str] = set()
        there, problems = set(base.names()), []
        pairs: dict[str, dict[str, str]] = {}
        for name in adapter.names():
            changed = split_lora(name)
            if changed:
                pairs.setdefault(changed[0], {})[changed[1]] = name
            elif adapter is not base:
                self._replaced.add(name)
                if name in there and adapter.shape(name) != base.shape(name):
                    problems.append(
                        f"{name} is {list(adapter.shape(name))} in {adapter.where(name)}, "
                        f"{list(base.shape(name))} in {base.where(name)}"
                    )
        for name, pair in pairs.items():
            if len(pair) != 2:
                problems.append(
                    f"{name}: only lora_{'/'.join(pair)} is there, in {adapter.where(next(iter(pair.values())))}"
                )
                continue
            shape_a, shape_b = adapter.shape(pair["A"]), adapter.shape(pair["B"])
            if name not in there:
                problems.append(f"{name} is not in the base; {adapter.where(pair['A'])} changes it")
            elif (*shape_b, *shape_a) != (base.shape(name)[0], shape_a[0], shape_a[0], base.shape(name)[-1]):
                problems.append(
                    f"{name} is {list(base.shape(name))} in {base.where(name)}, but lora_A is {list(shape_a)} and "
                    f"lora_B {list(shape_b)} in {adapter.where(pair['A'])}"
                )
            self._merged[name] = (pair["A"], pair["B"])
        if problems:
            raise UserError(
                "the adapter belongs to another base; name the one that it was trained on:\n  "
                + "\n  ".join(problems[:20] + and_more(problems, 20))
            )
        own = [name for name in base.names() if not split_lora(name)]
        self._names = (*own, *(name for name in adapter.names() if name in self._replaced - there))

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32) if name in self._merged else self._of(name).dtype(name)

    def source_dtype(self, name: str) -> np.dtype:
        return self._of(name).source_dtype(name)

    def where(self, name: str) -> str:
        return self._of(name).where(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        tensor = self._of(name).read(name, index)
        if name not in self._merged:
            return tensor
        rows, columns = index or tuple(slice(0, n) for n in self.shape(name))
        a, b = self._merged[name]
        rank = self._adapter.shape(a)[0]
        every = slice(0, rank)
        # [out, r] x [r, in] -> [out, in]
        down = self._adapter.read(a, (every, columns)).astype(np.float32)
        up = self._adapter.read(b, (rows, every)).astype(np.float32)
        return tensor.astype(np.float32) + np.float32(scaling(self._alpha, rank, self._rslora)) * (up @ down)

    def _of(self, name: str) -> TensorSource:
        return self._adapter if name in self._replaced else self._base
