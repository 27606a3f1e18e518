"""PyTorch files (pytorch_model.bin, mm_projector.bin, ...): read in slices without running what they ask for, written.

Such a file is a zip archive: a pickle that describes the tensors, and their storages, uncompressed. torch reads the
description (weights_only=True: tensors and plain containers, no other code) with fake tensors, which know where in the
file their bytes lie (https://docs.pytorch.org/docs/stable/notes/serialization.html); the bytes are read from there as
those of a safetensors file are. This is the only file of vflax that imports torch, and only when such a file is opened.
"""

from __future__ import annotations

import importlib
import io
import re
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vflax.errors import UserError
from vflax.weights.safetensors_io import DTYPES, Index, and_more, read_part

_ZIP = b"PK\x03\x04"
# Both libraries give a dtype the same name.
_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class _Stored:
    """A tensor of a zip file; `start` counts bytes from the beginning of the file, strides count elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    contiguous: bool


class TorchFile:
    """One PyTorch file of named tensors. Each read opens the file anew, so threads may share it.

    Of a tensor that was saved as a transposed or otherwise strided view, a read holds all bytes between the first and
    the last element of the part that is asked for. A file in the form of torch before 1.6 (no zip) cannot be read in
    parts: it is loaded whole and held.
    """

    def __init__(self, path: Path) -> None:
        """Read the description; of a zip file no tensor is read.

        Raises:
            UserError: when torch is not installed, or the file is missing, truncated, not a PyTorch file, asks for
                code to be run, or holds something else than named tensors.
        """
        self.path = path
        self._held: dict[str, Any] = {}
        self._stored: dict[str, _Stored] = {}
        if not path.is_file():
            raise UserError(f"{path}: not there")
        torch = _torch(path)
        with path.open("rb") as f:
            is_zip = f.read(len(_ZIP)) == _ZIP
        if is_zip:
            self._stored = _describe(path, torch)
        else:
            self._held = _named_tensors(path, torch, _load(path, torch))

    def names(self) -> tuple[str, ...]:
        """Tensor names, in the file's order."""
        return tuple(self._stored or self._held)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._held[name].shape) if self._held else self._stored[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor.

        Raises:
            UserError: for a dtype that vflax does not read, such as an 8-bit float.
        """
        dtype = _dtype_name(self._held[name]) if self._held else self._stored[name].dtype
        if dtype not in _DTYPES:
            raise UserError(f"{self.path}: {name} has dtype {dtype}; vflax reads {', '.join(_DTYPES)}")
        return _DTYPES[dtype]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Read a tensor, or the part of it that `index` (slices of step 1, one per axis) names."""
        dtype = self.dtype(name)
        if self._held:
            return _to_numpy(self._held[name][index or ...], dtype)
        stored = self._stored[name]
        if stored.contiguous:
            return read_part(self.path, name, stored.start, stored.shape, dtype, index)
        slices = index or (slice(None),) * len(stored.shape)
        bounds = [s.indices(n)[:2] for s, n in zip(slices, stored.shape, strict=True)]
        shape = tuple(max(0, b - a) for a, b in bounds)
        first = sum(a * stride for (a, _), stride in zip(bounds, stored.strides, strict=True))
        start = stored.start + first * dtype.itemsize
        flat = read_part(self.path, name, start, (_span(shape, stored.strides),), dtype)
        strides = [stride * dtype.itemsize for stride in stored.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, shape, strides))


def save_torch(path: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write {name: tensor} as torch.save does; all tensors are held at once.

    Raises:
        UserError: when torch is not installed.
    """
    torch = _torch(path)
    # By way of memory: of a full disk torch says something, Python says which.
    written = io.BytesIO()
    torch.save({name: _from_numpy(torch, array) for name, array in tensors}, written)
    path.write_bytes(written.getbuffer())


def check_installed(what: str, with_peft: bool) -> None:
    """Refuse `what` where the libraries that it computes with are not there.

    Raises:
        UserError: saying how to install them.
    """
    needed = {"torch": "'vflax[torch]'"} | ({"peft": "peft"} if with_peft else {})
    for name, extra in needed.items():
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"{what} needs {name}: pip install {extra}") from None


def transformers_logits(
    model: Path, adapter: Path | None, ids: np.ndarray, pixels: np.ndarray, image_id: int
) -> np.ndarray:
    """Logits of LlavaForConditionalGeneration in float32.

    Args:
        model: a Hugging Face directory.
        adapter: a PEFT adapter for it, or None.
        ids: int32 [1, T], images as `image_id`.
        pixels: float32 [S, 3, H, W], normalised.

    Returns:
        float32 [1, T, V].

    Raises:
        UserError: when torch is not installed.
    """
    torch = _torch(model)
    from transformers import LlavaForConditionalGeneration

    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is not None:
        import peft

        loaded = peft.PeftModel.from_pretrained(loaded, adapter)
    tokens = np.where(ids == image_id, loaded.config.image_token_id, ids).astype(np.int64)
    with torch.no_grad():
        out = loaded.eval()(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            pixel_values=torch.from_numpy(np.ascontiguousarray(pixels)),
        )
    return out.logits.float().numpy()


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: PyTorch files need torch: pip install 'vflax[torch]'") from None
    if not hasattr(torch.UntypedStorage, "_checkpoint_offset"):
        raise UserError(f"{path}: torch {torch.__version__} is too old: pip install 'vflax[torch]'")
    return torch


def _load(path: Path, torch: Any) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can end in any exception.
    except Exception as error:
        # torch's own message, which this one replaces, recommends to load the file with all the code in it.
        reason = str(error.__context__ or error) or repr(error)
        asked = re.search(r"GLOBAL (\S+)", reason)
        if asked:
            raise UserError(
                f"{path}: refused: it asks Python for {asked[1]}, and a file of weights holds tensors alone. "
                "Nothing of it was run; take these weights as safetensors"
            ) from None
        raise UserError(
            f"{path}: not a PyTorch file of tensors, or cut off or damaged ({reason.splitlines()[0][:200]}); fetch it "
            "again, or take these weights as safetensors"
        ) from None


def _named_tensors(path: Path, torch: Any, content: Any) -> dict[str, Any]:
    # Training loops like to save the weights beside other things.
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict of named tensors")
    problems = [
        f"{key} is a {type(value).__name__}"
        for key, value in content.items()
        if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    problems += [
        f"{key} is a tensor of layout {value.layout}"
        for key, value in content.items()
        if isinstance(value, torch.Tensor) and value.layout != torch.strided
    ]
    if problems:
        raise UserError(
            f"{path}: expected names and plain tensors; save them alone, with torch.save(model.state_dict(), PATH):\n  "
            + "\n  ".join(problems[:10] + and_more(problems, 10))
        )
    return content


def _describe(path: Path, torch: Any) -> dict[str, _Stored]:
    """Where the tensors of a zip file lie."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    records = _records(path)
    with FakeTensorMode():
        tensors = _named_tensors(path, torch, _load(path, torch))
    described = {}
    problems = []
    for name, tensor in tensors.items():
        place = tensor.untyped_storage()._checkpoint_offset
        first = tensor.storage_offset() * tensor.element_size()
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        # torch computes where a storage lies from the order in which it writes, which another zip writer need not keep.
        if place not in records or first + _span(shape, strides) * tensor.element_size() > records[place]:
            problems.append(name)
            continue
        described[name] = _Stored(_dtype_name(tensor), shape, strides, place + first, tensor.is_contiguous())
    if problems:
        raise UserError(
            f"{path}: these tensors do not lie where torch.save puts them; fetch the file again, or take these weights "
            "as safetensors:\n  " + "\n  ".join(problems[:10] + and_more(problems, 10))
        )
    return described


def _records(path: Path) -> dict[int, int]:
    """{first byte: length} of the uncompressed records of a zip file."""
    records = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as f:
            for record in archive.infolist():
                if record.filename.endswith("/byteorder") and archive.read(record) == b"big":
                    raise UserError(f"{path}: holds big-endian numbers; take these weights as safetensors")
                # https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7: the lengths of name and extra
                # field stand at byte 26 of the 30 that come before them and the data.
                f.seek(record.header_offset + 26)
                name, extra = struct.unpack("<HH", f.read(4))
                if record.compress_type == zipfile.ZIP_STORED:
                    records[record.header_offset + 30 + name + extra] = record.file_size
    except (zipfile.BadZipFile, struct.error) as error:
        raise UserError(f"{path}: cut off or damaged ({error}); fetch it again") from None
    return records


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first of a strided tensor to the last, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _to_numpy(tensor: Any, dtype: np.dtype) -> np.ndarray:
    """Copy a tensor; by way of bytes, since torch gives numpy no bfloat16."""
    import torch

    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().view(dtype).reshape(tuple(tensor.shape))


def _from_numpy(torch: Any, array: np.ndarray) -> Any:
    """View an array, or a copy where torch could not write to it, as a tensor."""
    flat = np.require(array, requirements=["C", "W"]).reshape(-1)
    return torch.from_numpy(flat.view(np.uint8)).view(getattr(torch, array.dtype.name)).reshape(array.shape)
