"""Reading .pt files of strangers: tensors, plain containers and torchvision's transforms, nothing else.

A .pt file is a pickle, and a pickle can call any function. torch's own restricted unpickler does the work,
with a fixed list of classes on top; its bypass CVE-2025-32434 was mended in torch 2.6, so older ones are refused.
"""
from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

import torch
import torchvision.transforms as transforms
from torch import Tensor

from data.errors import InputError, expect

OLDEST_TORCH = (2, 6)
# Never extended by what a file asks for. `Lambda` is left out: it holds a function.
ALLOWED = (
    transforms.InterpolationMode, transforms.Compose, transforms.ToTensor, transforms.PILToTensor,
    transforms.ConvertImageDtype, transforms.ToPILImage, transforms.Normalize, transforms.Resize,
    transforms.CenterCrop, transforms.Pad, transforms.Grayscale, transforms.RandomGrayscale,
    transforms.RandomCrop, transforms.RandomResizedCrop, transforms.RandomHorizontalFlip,
    transforms.RandomVerticalFlip, transforms.RandomRotation, transforms.RandomAffine,
    transforms.RandomErasing, transforms.ColorJitter, transforms.GaussianBlur,
)
ALLOWED_TEXT = "only tensors and torchvision transforms"


def load_untrusted(path: Path | str) -> object:
    """What `torch.save` wrote to `path`, on the CPU. Nothing in the file is run.

    Raises InputError: the file is missing, not a whole torch file, unpacks to more than it holds, or asks for a
    class or function outside the list, which is then named.
    """
    path = Path(path)
    expect(torch_release() >= OLDEST_TORCH, "torch",
           f">= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} to read files from strangers", torch.__version__)
    expect(path.is_file(), path, "a file written by torch.save", "no such file")
    _check_archive(path)
    with torch.serialization.safe_globals(list(ALLOWED)):
        refused = _reading(path, torch.serialization.get_unsafe_globals_in_checkpoint, path)
        expect(not refused, path, ALLOWED_TEXT, ", ".join(sorted(refused)))
        return _reading(path, torch.load, path, map_location="cpu", weights_only=True)


def load_state(path: Path | str) -> dict[str, Tensor]:
    """The state dict in `path`: names to dense CPU tensors, finite, each fully stored in the file."""
    state = load_untrusted(path)
    entries = f" of {len(state)}" if hasattr(state, "__len__") else ""
    expect(isinstance(state, dict) and state, path, "a state dict with entries", type(state).__name__ + entries)
    for key, tensor in state.items():
        where = f"{path} {key!r}"
        expect(isinstance(key, str), where, "a name", type(key).__name__)
        expect(isinstance(tensor, Tensor), where, "a tensor", type(tensor).__name__)
        expect(tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized,
               where, "a dense tensor", f"{tensor.layout} on {tensor.device.type}, {tensor.dtype}")
        stored = tensor.untyped_storage().nbytes()  # strides of 0 declare any shape over one number
        expect(tensor.numel() * tensor.element_size() <= stored, where, f"at most the {stored} bytes stored",
               f"shape {tuple(tensor.shape)}")
        expect(torch.isfinite(tensor).all(), where, "finite numbers", "NaN or infinity")
    return dict(state)


def torch_release() -> tuple[int, int]:
    """(major, minor) of the torch that runs."""
    major, minor = str(torch.__version__).split(".")[:2]
    return int(major), int(minor)


def _check_archive(path: Path) -> None:
    """A whole zip file that does not unpack to more bytes than it has."""
    if not zipfile.is_zipfile(path):
        called = _called_by_pickle(path.read_bytes())
        expect(not called, path, ALLOWED_TEXT, called)
        raise InputError(f"{path}: expected a whole file written by torch.save, found a truncated or other file")
    with _reading(path, zipfile.ZipFile, path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    expect(not packed, path, "an uncompressed archive, as torch.save writes", f"compressed {packed[:1]}")


def _called_by_pickle(content: bytes) -> str:
    """Name of the first class or function that a bare pickle asks for; empty where there is none."""
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "GLOBAL":
                return argument.replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    except ValueError:  # not a pickle
        pass
    return ""


def _reading(path: Path, read, *args, **options):
    """Call torch's reader; whatever a broken or hostile file makes it raise becomes one line."""
    try:
        return read(*args, **options)
    except Exception as error:  # a hostile pickle can make the unpickler fail in any way
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"{path}: expected a whole file written by torch.save, "
                         f"found {type(error).__name__}: {reason}") from None
