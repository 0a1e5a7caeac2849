"""A causal language model whose matrices are packed for decoding: in memory, and as a folder (docs/packed.md).

All its tensors lie in one buffer on huge pages, from which the modules hold views: a decoded token reads nearly all of it, and with
pages of 4 KiB looking them up takes as long as reading.
"""

import contextlib
import logging
import mmap
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast
from uuid import uuid4

import torch
from torch import Tensor, nn

from raysparse.config import ConfigError
from raysparse.kernels import decode, library
from raysparse.models.build import ModelConfig, build
from raysparse.models.export import check_target
from raysparse.models.layout import to_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "packed.safetensors"
METADATA, VERSION = "raysparse.packed", 1
"""Key of the file's metadata, whose value is version and dtype: ``1 int8``. One key alone: equal models make equal files."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""What matrices may be packed to. All else is bfloat16 with bfloat16, and float32 otherwise."""

_PARTS = ("values", "starts", "bits", "columns", "scale")
_HUGE_PAGE = 2 << 20
_ALIGNED = 64  # bytes, of each tensor in the buffer
_log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """`nn.Linear` over a packed weight, for inference on the CPU."""

    def __init__(self, weight: decode.Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return decode.linear(self.weight, x, self.bias)


def pack(model: "PreTrainedModel", dtype: str) -> "PreTrainedModel":
    """Pack the matrices of a model in place, those that gain by it, and move all its tensors into one buffer; returns the model.

    Args:
        model: as `build` gives it. It can only be used for inference afterwards.
        dtype: of `DTYPES`.

    Raises:
        ConfigError: int8 for a matrix that is not finite.
    """
    return _attach(model, encode(model, dtype), dtype)


def encode(model: "PreTrainedModel", dtype: str) -> dict[str, Tensor]:
    """The tensors of a packed model by name, as they are stored.

    A matrix becomes ``<name>.values`` and what goes with it (`decode.Packed`); a matrix of floats that stays dense keeps its name.
    With int8 an output matrix that is also the embedding is stored twice: as int8, and in float32 to look up tokens.
    """
    kind = DTYPES[dtype]
    other = torch.bfloat16 if kind == torch.bfloat16 else torch.float32
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tensors: dict[str, Tensor] = {}
    dropped = set()
    for name, linear in _linears(model).items():
        weight = linear.weight.detach()
        if kind == torch.int8 and not bool(weight.isfinite().all()):
            raise ConfigError(f"Expected finite weights for int8. Got inf or NaN in {name}.weight. Pack to float32 or bfloat16.")
        chosen = decode.choose(weight, kind)
        if chosen == "dense" and (kind != torch.int8 or weight.shape[1] > decode.MOST_COLS):
            continue
        packed = decode.pack(weight, kind, chosen)
        tensors |= {f"{name}.weight.{part}": tensor for part in _PARTS if (tensor := getattr(packed, part)) is not None}
        dropped |= {id(linear.weight)} - tables
    for name, parameter in model.named_parameters():
        if id(parameter) not in dropped:
            tensors[name] = parameter.detach().to(other).contiguous()
    return tensors


def write(source: Path, target: Path, dtype: str) -> dict[str, Any]:
    """Pack an exported model into a folder of its own, all or nothing; returns what was written.

    Args:
        source: a folder in Hugging Face format with its tokenizer.
        target: must not exist, or be empty. It appears by a rename, complete.
        dtype: of `DTYPES`.
    """
    from safetensors.torch import save_file

    check_target(target)
    tensors = encode(build(ModelConfig(path=str(source)), 0), dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    partial.mkdir()
    try:
        save_file(tensors, str(partial / FILE), {METADATA: f"{VERSION} {dtype}"})
        for file in source.iterdir():
            if file.suffix in (".json", ".txt", ".model", ".jinja") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, partial / file.name)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return {"dtype": dtype, "packed": sum(name.endswith(".values") for name in tensors), "bytes": num_bytes}


def is_packed(folder: str | Path) -> bool:
    return (Path(folder) / FILE).is_file()


def load(folder: str | Path) -> "PreTrainedModel":
    """The model in a folder that `write` made, in evaluation mode, ready for ``generate``.

    The file is mapped and checked whole: sizes, types and every index, for native code trusts them.

    Raises:
        ConfigError: a file that `write` did not make, or that is damaged, or of another version.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import GenerationConfig

    folder = Path(folder)
    model = _empty(folder)
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            stated = (file.metadata() or {}).get(METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        _refuse(folder, str(error))
    dtype = {f"{VERSION} {dtype}": dtype for dtype in DTYPES}.get(stated or "")
    if dtype is None:
        _refuse(folder, f"{stated!r} for {METADATA} in its metadata, not version {VERSION} and one of {', '.join(DTYPES)}")
    _check(folder, model, tensors, dtype)
    model = _attach(model, tensors, dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def reading(model: nn.Module) -> dict[str, Any]:
    """How the matrices of a model are kept: ``kinds`` (how many of each), and ``bytes`` of them and their biases: read for each token."""
    kinds: Counter[str] = Counter()
    num_bytes = 0
    for module in model.modules():
        if isinstance(module, PackedLinear | nn.Linear):
            kinds["torch" if isinstance(module, nn.Linear) else module.weight.kind] += 1
            num_bytes += module.weight.nbytes + (0 if module.bias is None else module.bias.nbytes)
    return {"kinds": dict(kinds), "bytes": num_bytes}


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _canonical(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> the one that a tied parameter is stored under."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {alias: names[id(parameter)] for alias, parameter in model.named_parameters(remove_duplicate=False)}


def _attach(model: "PreTrainedModel", tensors: Mapping[str, Tensor], dtype: str) -> "PreTrainedModel":
    """Give a model (perhaps on the meta device) the tensors of `encode`, checked, in one buffer."""
    if missing := library.why_not():
        _log.warning("weights are unpacked and multiplied as dense ones, for there are no native kernels: %s", missing)
    tensors = in_one_buffer(tensors)
    linears, canonical = _linears(model), _canonical(model)
    for alias, name in canonical.items():
        if name in tensors:
            parent, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(tensors[name], requires_grad=False))
    for name, linear in linears.items():
        weight = _packed(tensors, name, canonical[f"{name}.weight"], linear)
        parent, _, leaf = name.rpartition(".")
        if missing:
            linear.weight = nn.Parameter(decode.unpack(weight), requires_grad=False)
        else:
            setattr(model.get_submodule(parent), leaf, PackedLinear(weight, linear.bias))
    model.config.use_cache = True
    model.config.dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    return model.eval()


def _packed(tensors: Mapping[str, Tensor], name: str, dense: str, linear: nn.Linear) -> decode.Packed:
    """The weight of the linear layer `name`: packed, or the dense tensor `dense`."""
    parts = {part: tensors.get(f"{name}.weight.{part}") for part in _PARTS}
    values = parts.pop("values")
    return decode.Packed(linear.out_features, linear.in_features, tensors[dense] if values is None else values, **parts)


def in_one_buffer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors, side by side on huge pages."""
    sizes = {name: -(-tensor.nbytes // _ALIGNED) * _ALIGNED for name, tensor in tensors.items()}
    memory = mmap.mmap(-1, sum(sizes.values()) + _HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # advice: a kernel without huge pages does without
            memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    place, placed = -buffer.data_ptr() % _HUGE_PAGE, {}
    for name, tensor in tensors.items():
        placed[name] = buffer[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        place += sizes[name]
    return placed


def _empty(folder: Path) -> "PreTrainedModel":
    """The model of a folder's config: parameters on the meta device, buffers as they are computed."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        _refuse(folder, f"a config that transformers cannot read: {error}")
    with no_init_weights():  # memory that nobody writes to is none
        model = cast("PreTrainedModel", AutoModelForCausalLM.from_config(hf_config))
    model.tie_weights()
    ghosts: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            ghost = ghosts.setdefault(id(parameter), nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
            setattr(module, name, ghost)
    return to_linear(model)


def _check(folder: Path, model: nn.Module, tensors: Mapping[str, Tensor], dtype: str) -> None:
    """A `ConfigError` unless these are the tensors of `encode` for this model, fit for native code."""
    floats = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    elements = torch.uint8 if dtype == "int8" else floats
    kept, packed = dict(model.named_parameters()), set()
    canonical = _canonical(model)
    tables = {canonical[f"{name}.weight"] for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for name, linear in _linears(model).items():
        dense = canonical[f"{name}.weight"]
        parts = {f"{name}.weight.{part}" for part in _PARTS} & tensors.keys()
        packed |= parts
        if not parts:
            continue
        if f"{name}.weight.values" not in parts:
            _refuse(folder, f"{min(parts)} without values")
        if (got := tensors[f"{name}.weight.values"].dtype) != elements:
            _refuse(folder, f"{name}.weight.values of {got}, not {elements}")
        if found := decode.problem(_packed(tensors, name, dense, linear)):
            _refuse(folder, f"{name}.weight with {found}")
        if dense not in tables:
            kept.pop(dense, None)
    for name, parameter in kept.items():
        tensor = tensors.get(name)
        if tensor is None or (tensor.dtype, tensor.shape) != (floats, parameter.shape):
            got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            _refuse(folder, f"{got} for {name}, not {floats} {list(parameter.shape)}")
    if unknown := tensors.keys() - kept.keys() - packed:
        _refuse(folder, f"tensors that the model has no place for: {', '.join(sorted(unknown)[:4])}")


def _refuse(folder: Path, got: str) -> NoReturn:
    raise ConfigError(f"Expected a packed model of this version of raysparse in {folder / FILE}. Got {got}. Pack the model again.")
