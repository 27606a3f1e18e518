"""The formats of an export: which tensors under which names, which files beside them, and how it is read back."""

from __future__ import annotations

import collections
import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vflax.conversation import stop_ids
from vflax.errors import UserError
from vflax.models.llava import LlavaConfig
from vflax.templates import Position, chat_template, check_position
from vflax.weights import adapter, hf_config, hf_images, hub, llava_config, names, verify
from vflax.weights.adapter import Adapter, MergedSource
from vflax.weights.hf_tokenizer import special_ids, write_tokenizer
from vflax.weights.kinds import HF, detect
from vflax.weights.load import check
from vflax.weights.open import HubFiles, Opened, open_checkpoint
from vflax.weights.source import FileSource, JoinedSource, TensorSource
from vflax.weights.views import CastSource, PaddedVocabularySource, RenamedSource
from vflax.workdir import ModelFiles

# Embedding rows come in multiples of this, for the sake of matrix units.
VOCABULARY_MULTIPLE = 64
PROJECTOR_BIN = "mm_projector.bin"


class Format(Protocol):
    """One way to write a model.

    stem: beginning of its weights' file names.
    wanted: what a reader of the export must compute with: all weights in the dtypes of the export.
    config: of the model as it is read back.
    tensors: what is written, under the names in the files.
    """

    @property
    def stem(self) -> str: ...

    @property
    def wanted(self) -> TensorSource: ...

    @property
    def config(self) -> LlavaConfig: ...

    @property
    def tensors(self) -> TensorSource: ...

    def write_files(self, folder: Path) -> None:
        """Write everything beside the weights."""
        ...

    def reload(self, folder: Path) -> tuple[TensorSource, LlavaConfig]:
        """Open what was written as whoever takes it would: a whole model under canonical names."""
        ...

    def check(self, folder: Path) -> dict[str, Any]:
        """Compare what is neither tensor nor logit; returns facts for the record."""
        ...

    def in_transformers(self, folder: Path) -> tuple[Path, Path | None] | None:
        """(model, adapter or None) that transformers computes what was written with; None where it cannot."""
        ...


def cast(source: TensorSource, wanted: list[str] | tuple[str, ...], dtype: np.dtype | None) -> CastSource:
    """Tensors in one dtype, or with None each in that which it first came in."""
    return CastSource(source, {name: dtype or source.source_dtype(name) for name in wanted})


class HuggingFace:
    """LlavaForConditionalGeneration's directory, with the names of transformers 4.x."""

    stem = "model"

    def __init__(self, opened: Opened, dtype: np.dtype | None) -> None:
        """
        Raises:
            UserError: when Hugging Face's classes cannot express the model, or nothing says how to talk to it.
        """
        self._files = opened.files
        config = opened.files.config
        hf_config.check_expressible(config)
        chat = _chat(opened)
        if chat is None:
            raise UserError(
                f"{opened.place}: no chat template (chat_template.jinja), and an export needs one: name the template "
                "that it was trained with, such as --template=vicuna_v1"
            )
        self._chat = chat
        rows = padded_vocabulary(config.decoder.vocab_size, special_ids(opened.files.tokenizer).rows)
        decoder = dataclasses.replace(config.decoder, vocab_size=rows)
        self.config = dataclasses.replace(config, decoder=decoder)
        # In the order of the key table: a stacked leaf is then read layer after layer.
        self.wanted = cast(opened.source, tuple(names.expected(config)), dtype)
        self.tensors = PaddedVocabularySource(self.wanted, rows)

    def write_files(self, folder: Path) -> None:
        files, config = self._files, self.config
        ids = write_tokenizer(files.tokenizer, folder, config.decoder.max_positions)
        tokens = _tokens(files) | {"pad_token_id": ids.pad}
        main = main_dtype(self.tensors)
        write_json(folder / "config.json", hf_config.to_llava(config, ids.image, tokens, main))
        write_json(folder / "generation_config.json", tokens)
        write_json(folder / "preprocessor_config.json", hf_images.to_preprocessor(files.rules))
        write_json(folder / "processor_config.json", hf_config.to_processor(config))
        (folder / "chat_template.jinja").write_text(self._chat, encoding="utf-8")

    def reload(self, folder: Path) -> tuple[TensorSource, LlavaConfig]:
        return FileSource(folder), hf_config.read_llava_config(folder)

    def check(self, folder: Path) -> dict[str, Any]:
        files = self._files
        verify.compare_pixels(folder, files.rules)
        conversations = 0
        if isinstance(files, ModelFiles):
            conversations = verify.compare_conversations(
                folder, files.tokenizer, files.template, _position(files), self.config.vision.num_tokens
            )
        template = files.template if isinstance(files, ModelFiles) else "as it came"
        return {
            "conversations": conversations, "template": template, "vocab_size": self.config.decoder.vocab_size
        }  # fmt: skip

    def in_transformers(self, folder: Path) -> tuple[Path, Path | None] | None:
        return folder, None


class OriginalLlava:
    """What LlavaLlamaForCausalLM of the original LLaVA code loads."""

    stem = "model"

    def __init__(self, opened: Opened, dtype: np.dtype | None, tower: str | None) -> None:
        """
        Args:
            tower: mm_vision_tower of the export; None: what the weights said, else OpenAI's name for its shape.

        Raises:
            UserError: when nothing says what the tower is called.
        """
        self._files = files = opened.files
        self.config = config = files.config
        self._chat = _chat(opened)
        said = files.tower if isinstance(files, HubFiles) else None
        self._tower = tower or said or llava_config.tower_name(config.vision)
        if self._tower is None:
            raise UserError(
                f"{opened.place}: its vision tower is none of OpenAI's by its shape, and the original LLaVA fetches a "
                "tower's config by name: give the hub id or path of a CLIP directory with --vision-tower"
            )
        self.wanted = cast(opened.source, tuple(names.expected(config)), dtype)
        named = {names.original(name, config.bridge.kind): name for name in self.wanted.names()}
        self.tensors = RenamedSource(self.wanted, named)

    def write_files(self, folder: Path) -> None:
        files, config = self._files, self.config
        files.tokenizer.save(folder)
        tokens = _tokens(files) | {"pad_token_id": files.tokenizer.pad_id}
        assert self._tower is not None
        raw = llava_config.to_original(config, files.rules, self._tower, tokens, main_dtype(self.tensors))
        write_json(folder / "config.json", raw)
        write_json(folder / "generation_config.json", tokens)
        write_json(folder / "preprocessor_config.json", hf_images.to_preprocessor(files.rules))
        if self._chat is not None:
            (folder / "chat_template.jinja").write_text(self._chat, encoding="utf-8")

    def reload(self, folder: Path) -> tuple[TensorSource, LlavaConfig]:
        opened = open_checkpoint(folder)
        if opened.files.rules != self._files.rules:
            raise UserError(f"the written image rules read back as {opened.files.rules}")
        return opened.source, opened.files.config

    def check(self, folder: Path) -> dict[str, Any]:
        return {"mm_vision_tower": self._tower, "vocab_size": self.config.decoder.vocab_size}

    def in_transformers(self, folder: Path) -> tuple[Path, Path | None] | None:
        return None


class Projector:
    """The bridge alone, as LLaVA's --pretrain_mm_mlp_adapter takes it (mm_projector.bin), and in safetensors."""

    stem = "mm_projector"

    def __init__(self, opened: Opened, dtype: np.dtype | None) -> None:
        self.config = config = opened.files.config
        bridge = [name for name in names.expected(config) if names.part_of(name) == "bridge"]
        self._rest = opened.source
        own = cast(opened.source, bridge, dtype)
        self.wanted = _replaced(opened.source, own)
        self.tensors = RenamedSource(own, {names.original(name, config.bridge.kind): name for name in bridge})

    def write_files(self, folder: Path) -> None:
        from vflax.weights import torch_files

        every = self.tensors.names()
        torch_files.save_torch(folder / PROJECTOR_BIN, ((name, self.tensors.read(name)) for name in every))

    def reload(self, folder: Path) -> tuple[TensorSource, LlavaConfig]:
        # The .bin, which others read; the safetensors are compared tensor by tensor.
        return _replaced(self._rest, FileSource.file(folder / PROJECTOR_BIN)), self.config

    def check(self, folder: Path) -> dict[str, Any]:
        return {"bridge": self.config.bridge.kind}

    def in_transformers(self, folder: Path) -> tuple[Path, Path | None] | None:
        return None


class LoraAdapter:
    """A PEFT adapter for the Hugging Face model: adapter_config.json and adapter_model.safetensors.

    Module names are those of transformers 5.x; PEFT finds them in 4.52 and later. With `names_4x` they are those of
    transformers before 4.52. A bridge that learned as a whole is written as a whole, its own adapters merged: PEFT
    gives a module in modules_to_save no LoRA.
    """

    stem = "adapter_model"

    def __init__(self, opened: Opened, dtype: np.dtype | None, names_4x: bool, base_name: str | None) -> None:
        """
        Args:
            names_4x: write module names of transformers before 4.52.
            base_name: base_model_name_or_path: a hub id, or the folder of a Hugging Face LLaVA; None: what the run
                started from, or the adapter's base.

        Raises:
            UserError: when the model is no base with an adapter, weights were trained that an adapter cannot hold, or
                PEFT cannot use the base.
        """
        if opened.lora is None:
            raise UserError(
                f"{opened.place} is {opened.kind} without an adapter: --format=lora is for runs with config.lora.rank "
                "> 0 and for PEFT adapters; the whole model goes out with --format=hf"
            )
        self._lora = lora = opened.lora
        self._names_4x = names_4x
        self.config = config = opened.files.config
        every = set(lora.tensors.names())
        whole = {name for name in every if not adapter.split_lora(name)}
        # PEFT saves a head with an adapter whole, too.
        halves = {found[0] for name in every if (found := adapter.split_lora(name))}
        head = halves & whole & {names.LM_HEAD}
        other = sorted(name for name in whole - head if names.part_of(name) != "bridge")
        if other:
            raise UserError(
                f"{opened.place}: it changes {', '.join(other[:3])}{' ...' if len(other) > 3 else ''} as a whole, "
                "which vflax writes into no LoRA adapter: export the merged model with --format=hf"
            )
        self._bridge = any(names.part_of(name) == "bridge" for name in whole)
        bridge = [n for n in names.expected(config) if self._bridge and names.part_of(n) == "bridge"]
        rest = [n for n in lora.tensors.names() if not bridge or names.part_of(n) != "bridge"]
        ranks = {lora.tensors.shape(name)[0] for name in rest if name.endswith(".lora_A.weight")}
        if not ranks:
            raise UserError(
                f"{opened.place}: its adapters are of the bridge alone, which learned as a whole, too, and goes out "
                "with --format=projector; the whole model with --format=hf"
            )
        if len(ranks) > 1:
            raise UserError(
                f"{opened.place}: its adapters have the ranks {sorted(ranks)}, and vflax writes adapters of one rank: "
                "export the merged model with --format=hf"
            )
        (self._rank,) = ranks
        self._base_name, folder = _peft_base(opened, base_name)
        self._base, self._folder = lora.base, lora.folder if lora.base_kind == HF else None
        if folder is not None:  # the export is then verified with the base that it names
            self._base, self._folder = FileSource(folder), folder
            self.config = hf_config.read_llava_config(folder)
            check(self._base, self.config)
        kept = RenamedSource(lora.tensors, {name: name for name in rest})
        merged = RenamedSource(opened.source, {name: name for name in bridge})
        own = cast(JoinedSource([kept, merged]), [*rest, *bridge], dtype)
        self.wanted = MergedSource(lora.base, own, lora.alpha, lora.rslora)
        MergedSource(self._base, own, lora.alpha, lora.rslora)  # refuses a base that it does not fit
        self.tensors = RenamedSource(own, {peft_name(n, names_4x, n in head): n for n in own.names()})
        self._targets = sorted({t for name in rest if (t := _target(name))})

    def write_files(self, folder: Path) -> None:
        lora = self._lora
        alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
        hub_id = None if Path(self._base_name).is_absolute() else hub.parse_hub_id(self._base_name)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": hub_id.repo if hub_id else self._base_name,
            "revision": hub_id.revision if hub_id else None,
            "inference_mode": True,
            "r": self._rank,
            "lora_alpha": alpha,
            "lora_dropout": lora.dropout,
            "use_rslora": lora.rslora,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_dora": False,
            # CLIP's layers have projections of the same names: the expression keeps to the parts that were trained.
            "target_modules": "|".join(self._targets),
            "modules_to_save": ["multi_modal_projector"] if self._bridge else None,
        }
        write_json(folder / adapter.CONFIG, config)

    def reload(self, folder: Path) -> tuple[TensorSource, LlavaConfig]:
        found = Adapter(folder)
        return MergedSource(self._base, found.source, found.alpha, found.rslora), self.config

    def check(self, folder: Path) -> dict[str, Any]:
        return {"base": self._base_name, "rank": self._rank, "alpha": self._lora.alpha}

    def in_transformers(self, folder: Path) -> tuple[Path, Path | None] | None:
        return None if self._names_4x or self._folder is None else (self._folder, folder)


def _peft_base(opened: Opened, said: str | None) -> tuple[str, Path | None]:
    """What an adapter's base is called, a hub id or an absolute path; and its folder, if it is `said` and lies here.

    Raises:
        UserError: when PEFT cannot use it; it says how to write one that it can.
    """
    lora = opened.lora
    assert lora is not None
    place = shlex.quote(hub.origin(opened.place) or str(opened.place))
    command = f"python -m vflax.weights.export --model={place}"
    if opened.step is not None:
        command += f" --step={opened.step}"
    elif lora.folder is not None:
        command += f" --base={shlex.quote(str(lora.folder))}"
    template = " --template=NAME" if _chat(opened) is None else ""
    remedy = (
        "PEFT loads an adapter on a Hugging Face LLaVA. Write the base as one, and name that:\n"
        f"  {command} --format=hf --without-adapters{template} --out=BASE\n"
        f"  {command} --format=lora --base-name=BASE --out=ADAPTER"
    )
    if said is None:
        if lora.base_kind == HF or (not lora.base_kind and hub.meant_id(lora.base_name)):
            return lora.base_name, None
        kind = lora.base_kind or "nowhere to be found"
        raise UserError(
            f"{opened.place}: its base {lora.base_name or '(without a name)'} is {kind}. {remedy}"
        )
    hub_id = hub.meant_id(said)
    if hub_id is not None:
        return str(hub_id), None
    folder = Path(said).expanduser()
    if folder.exists() or not folder.is_absolute():  # an absolute path may be that of another machine
        kind = detect(folder)
        if kind != HF:
            raise UserError(f"--base-name={said} is {kind}. {remedy}")
    return str(folder.absolute()), folder if folder.exists() else None


def peft_name(name: str, names_4x: bool, base_layer: bool = False) -> str:
    """A canonical name as PEFT writes it for LlavaForConditionalGeneration of transformers 5.x, or of 4.x.

    Args:
        name: the canonical name.
        names_4x: for transformers before 4.52.
        base_layer: a whole weight beside its own adapter.
    """
    if base_layer:
        name = name.removesuffix("weight") + "base_layer.weight"
    if not names_4x:
        name = name.replace("language_model.model.", "model.language_model.", 1)
        name = name.replace("language_model.lm_head.", "lm_head.", 1)
        name = name.replace("vision_tower.vision_model.", "model.vision_tower.", 1)
        name = name.replace("multi_modal_projector.", "model.multi_modal_projector.", 1)
    return f"base_model.model.{name}"


_PEFT_PARTS = {"decoder": "language_model", "vision": "vision_tower", "bridge": "multi_modal_projector"}


def _target(name: str) -> str | None:
    """The expression for a module with an adapter that fits its names in all versions of transformers."""
    found = adapter.split_lora(name)
    if found is None:
        return None
    if found[0] == names.LM_HEAD:
        return r"(?:.*\.)?lm_head"
    part, module = _PEFT_PARTS[names.part_of(found[0])], found[0].split(".")[-2]
    return rf".*{part}.*\.{module}"


def padded_vocabulary(rows: int, needed: int) -> int:
    """Rows of the exported embedding: as they are if they suffice, else the next multiple of VOCABULARY_MULTIPLE."""
    return rows if rows >= needed else -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def main_dtype(source: TensorSource) -> str:
    """The dtype of most of the bytes: what config.json names."""
    count: collections.Counter[str] = collections.Counter()
    for name in source.names():
        count[source.dtype(name).name] += int(np.prod(source.shape(name))) * source.dtype(name).itemsize
    return count.most_common(1)[0][0]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as Hugging Face does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replaced(base: TensorSource, own: TensorSource) -> TensorSource:
    """`base` with the tensors of `own` in place of its own."""
    kept = {name: name for name in base.names() if name not in set(own.names())}
    return JoinedSource([RenamedSource(base, kept), own])


def _chat(opened: Opened) -> str | None:
    """The model's chat template as Jinja; None where nothing says what it is."""
    files = opened.files
    return chat_template(files.template, _position(files)) if isinstance(files, ModelFiles) else files.chat


def _tokens(files: ModelFiles | HubFiles) -> dict[str, Any]:
    tokenizer = files.tokenizer
    if isinstance(files, HubFiles):
        stops = list(files.stops)
    else:
        stops = list(stop_ids(files.template, tokenizer))
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops}


def _position(files: ModelFiles) -> Position:
    check_position(files.position)
    return files.position
