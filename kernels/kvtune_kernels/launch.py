"""Where an op runs: Triton kernels where they can, plain torch everywhere else."""

import functools
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from kvtune_kernels import reference
from kvtune_kernels.formats import PAGE, Exact, Format, Packed, Window

try:
    import triton

    from kvtune_kernels import appending, packing, paged
except ImportError:  # there is no Triton for this machine
    triton = None

DTYPES = (torch.bfloat16, torch.float16)
_LINES = re.compile(r".*elementwise_inline_asm.*\n")  # of a kernel's text
COLUMNS = 32  # query heads times queries of one program, at most
_choice: ContextVar[str] = ContextVar("implementation", default="auto")


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Makes ops run as "triton" (under Triton's interpreter on a CPU), "reference" or "auto"."""
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def interpreted() -> bool:
    """Whether Triton's interpreter is on, so that kernels run on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(
    head_dim: int, dtype: torch.dtype, device: torch.device, *formats: Format | None
) -> str | None:
    """Says why kernels cannot serve such a cache, or None when they can; formats of keys, then of
    values, None for one that does not matter."""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" and not interpreted():
        return f"kernels do not run on {device.type}"
    if head_dim % 16 or head_dim > 256:
        return f"head_dim {head_dim} is not a multiple of 16 up to 256"
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not a 16-bit dtype"
    for side, format in enumerate(formats):
        if format is None:
            continue
        if reason := _unreadable(format, head_dim, side == 0):
            return reason
        if format.bits == 3 and head_dim % 32:
            return f"3 bits need a head_dim that is a multiple of 32, not {head_dim}"
        whole = format.per_token and format.group == head_dim
        if not whole and format.group & (format.group - 1):
            return f"group {format.group} is no power of two"
    return None


def _unreadable(format: Format, head_dim: int, keys: bool) -> str | None:
    """The same of planes and of symmetric codes."""
    if format.channels:
        if not keys:
            return "planes are read of keys alone"
        if format.bits != 2 or format.symmetric or format.per_token:
            return "planes have affine codes of 2 bits per channel"
        if format.channels % 16 or format.channels > 4 * head_dim:
            most = f"a multiple of 16 up to {4 * head_dim}"
            return f"{format.channels} channels of planes are not {most}"
    if format.symmetric and (not format.per_token or format.bits == 8):
        return "symmetric codes are 2, 3 or 4 bits per token"
    if format.symmetric and keys and head_dim not in (64, 128, 256):
        return f"keys in symmetric codes need a head_dim of 64, 128 or 256, not {head_dim}"
    return None


def runs_triton(
    head_dim: int, dtype: torch.dtype, device: torch.device, *formats: Format | None
) -> bool:
    """Decides between kernel and reference, and says once why a GPU gets the slow one."""
    choice = _choice.get()
    if choice == "reference" or (choice == "auto" and device.type != "cuda"):
        return False
    reason = unsupported(head_dim, dtype, device, *formats)
    if reason is not None:
        say_once(f"kvtune runs in plain torch: {reason}.")
    return reason is None


@functools.cache
def say_once(text: str) -> None:
    """Warns of something slow, the first time only."""
    warnings.warn(text, stacklevel=4)


def encode_into(packed: Packed, x: Tensor, first: int, keys: bool, row: int | None = None) -> None:
    """Encodes x [B, H, T, D] to the tokens from `first` on of `packed`, of all rows or of one.

    T and `first` are multiples of the format's block; x may be strided, but for its last axis.
    """
    if x.shape[2] == 0:
        return
    format, planes = packed.format, packed.planes
    if not runs_triton(x.shape[-1], x.dtype, x.device, *((format,) if keys else (None, format))):
        return reference.store(packed, *reference.encode(x, format, keys, planes), first, row)
    bits, group, per_token, channels, symmetric = format
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows = slice(None) if row is None else slice(row, row + 1)
    codes, meta = packed.codes[rows].view(torch.uint16), words(packed)[rows]
    batch, heads, tokens, dim = x.shape
    wide = triton.next_power_of_2(dim)
    # groups of tokens stand alone, and so do neighbouring lanes: small programs hide their waiting
    apart = keys and not per_token and (dim == wide > 32 or channels > 0)
    block = group if apart else format.block
    parts = 2 if apart and bits != 3 and group * dim >= 1 << 14 else 1
    parts = plane_parts(format) or parts
    packing.encode[(tokens // block * parts, batch * heads)](
        x, x if planes is None else planes, codes, meta, *x.stride()[:3], *codes.stride()[:2],
        *meta.stride()[:2], first // block, first, 1, heads, KEYS=keys, BITS=bits, GROUP=group,
        PER_TOKEN=per_token, C=channels, SYMMETRIC=symmetric, BLOCK=block, D=dim, D2=wide,
        PARTS=parts, RING=False, ASM=not portable(),
        num_warps=2 if group * dim // parts <= 1 << 12 else 4,
    )  # fmt: skip
    return None


def words(packed: Packed) -> Tensor:
    """Metadata as kernels load it: scale and zero together as uint32, or scales as uint16."""
    return packed.meta.view(torch.uint16 if packed.format.symmetric else torch.uint32)


def plane_parts(format: Format) -> int:
    """Into how many parts the lanes of planes are cut to encode them; 0 without planes."""
    wide = triton.next_power_of_2(format.channels) if format.channels else 0
    return min(wide // 16, max(1, format.group * wide >> 13))


class Workspace:
    """What decoding needs beside the cache, allocated once and shared by all layers of a model."""

    def __init__(self) -> None:
        self._partial: Tensor | None = None
        self._lanes: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (self._partial, self._lanes)
        return sum(x.untyped_storage().nbytes() for x in held if x is not None)

    def partial(self, count: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Float32 [count, dim] and [count], without values."""
        size = count * (dim + 1)
        if self._partial is None or self._partial.numel() < size or self._partial.device != device:
            self._partial = torch.empty(size, dtype=torch.float32, device=device)
        return self._partial[: count * dim], self._partial[count * dim : size]

    def lanes(self, device: torch.device) -> Tensor:
        """0 to 255 as bytes."""
        if self._lanes is None or self._lanes.device != device:
            self._lanes = torch.arange(256, device=device).to(torch.uint8)
        return self._lanes


def append(
    key: Tensor, value: Tensor, exact: Exact, keys: Packed, values: Packed, state: Tensor,
    next_state: Tensor, window: Window,
) -> None:  # fmt: skip
    """Puts one token, key and value [B, H, 1, D], into the ring; closes what has left the window.

    Reads `state` [3, B] and writes `next_state`; `attend_packed` reads that one, and with
    `advance` copies it back. Allocates nothing, so steps can be captured in a CUDA graph.
    """
    batch, heads, _, dim = key.shape
    if not runs_triton(dim, key.dtype, key.device, keys.format, values.format):
        next_state.copy_(state)
        return reference.append(key, value, exact, keys, values, next_state, window)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    sides = (
        keys.codes.view(torch.uint16), words(keys), values.codes.view(torch.uint16), words(values),
    )  # fmt: skip
    strided = (key, value, exact.keys, exact.values, *sides)
    appending.append[(2, batch * heads)](
        *strided, state if keys.planes is None else keys.planes, state, next_state,
        *(step for x in strided for step in x.stride()[:2]),
        *turned(exact, window), batch, heads, *keys.format, plane_parts(keys.format) or 1,
        *values.format[:3], values.format.symmetric, *window, D=dim,
        D2=triton.next_power_of_2(dim), ASM=not portable(), num_warps=4, **waiting(key.device),
    )  # fmt: skip
    return None


def attend_packed(
    query: Tensor, keys: Packed, values: Packed, exact: Exact, state: Tensor, window: Window,
    scale: float | None = None, softcap: float | None = None, longest: int = 0,
    workspace: Workspace | None = None, advance: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Answers query [B, Hq, M, D] over sinks, pages and ring; see `reference.attend_packed`.

    One query reads all pages that `state` counts, so none may have closed that it should not see:
    `append` leaves it so. `longest`: the most paged tokens of a row, which the launch is shaped for
    (all capacity when 0).
    `advance`: a state that takes over `state` when all is read. `bias` is for softcaps.
    """
    batch, query_heads, count, dim = query.shape
    if not runs_triton(dim, query.dtype, query.device, keys.format, values.format):
        given = (query, keys, values, exact, state, window, scale, softcap, bias)
        out = reference.attend_packed(*given)
        if advance is not None:
            advance.copy_(state)
        return out
    workspace = workspace or Workspace()
    query = query if query.stride(-1) == 1 else query.contiguous()
    heads, share = keys.codes.shape[1], query_heads // keys.codes.shape[1]
    columns = min(COLUMNS, max(8, triton.next_power_of_2(share * count)))
    blocks = -(-share * count // columns)
    tiles = (longest or keys.codes.shape[2] * PAGE) // PAGE
    work, room = batch * heads * blocks, slots(query.device, dim, columns)
    splits = split_count(work, max(1, tiles), room)
    # the exact tokens get programs of their own while there is room for them beside the pages
    own = min(16, -(-exact.keys.shape[2] // 16))
    first, parts = (splits, splits + own) if work * (splits + own) <= room else (0, splits)
    out, lse = workspace.partial(batch * query_heads * count * parts, dim, query.device)
    wide = triton.next_power_of_2(dim)
    strided = (
        keys.codes, words(keys), values.codes, words(values), exact.keys, exact.values,
    )  # fmt: skip
    launch = functools.partial(
        paged.attend_split[(parts, batch * heads, blocks)],
        query, *strided, state if keys.planes is None else keys.planes,
        state if bias is None else bias.contiguous(), state,
        workspace.lanes(query.device), out, lse, dim**-0.5 if scale is None else scale,
        *query.stride()[:3], *(step for x in strided for step in x.stride()[:2]),
        *turned(exact, window), batch, heads, share, count, splits, first,
        N=columns, MASKED=count > 1, D=dim, D2=wide,
        K_BITS=keys.format.bits, K_GROUP=keys.format.group, K_PER_TOKEN=keys.format.per_token,
        CHANNELS=keys.format.channels, K_SYMMETRIC=keys.format.symmetric,
        V_BITS=values.format.bits, V_GROUP=values.format.group,
        V_PER_TOKEN=values.format.per_token, V_SYMMETRIC=values.format.symmetric,
        SINKS=window.sinks, RECENT=window.recent, BLOCK=window.block, CAP=softcap or 0.0,
        BIASED=bias is not None,
        STAGES=stages(keys.format, values.format), EARLY=early(query.device),
        num_warps=warps(wide, columns),  # not early itself: then programs would crowd on some units
    )  # fmt: skip
    if portable() or not in_order(launch(ASM=True)):
        launch(ASM=False)
    result = torch.empty(batch, count, query_heads, dim, dtype=query.dtype, device=query.device)
    result = result.transpose(1, 2)  # what follows wants [B, M, Hq, D]
    many = triton.next_power_of_2(parts)
    paged.merge[(batch * query_heads * count,)](
        out, lse, result, lse, state if advance is None else advance, state, *result.stride()[:3],
        batch, heads, share, count, parts, ADVANCE=advance is not None, TELL=False, D=dim, D2=wide,
        PARTS=many, FEW=min(many, 8192 // wide), num_warps=4, **waiting(query.device),
    )  # fmt: skip
    return result


def turned(exact: Exact, window: Window) -> tuple[int, int]:
    """The ring's slots, and its shift below zero: a kernel's remainder has the sign of a token."""
    ring = exact.keys.shape[2] - window.sinks
    return ring, exact.shift % ring - ring


def portable() -> bool:
    """Whether kernels must do without inline PTX: in the interpreter, and on other GPUs."""
    return interpreted() or torch.version.cuda is None


@functools.cache
def in_order(kernel: object) -> bool:
    """Whether a compiled kernel holds neighbouring lanes together, as inline PTX takes them.

    The operands of warp-level products do (of two lines at a time, four lanes each); those of a
    warp group's, which Triton might choose on its own some day, do not, nor do tensors that it
    turns to numbers in the order in which they were loaded.
    """
    text = getattr(kernel, "asm", {}).get("ttgir", "")
    products = re.findall(r"nvidia_mma<\{versionMajor = (\d)", text)
    codes = re.findall(r"xi8, (#[\w.]+(?:<\{[^}]*\}>)?)", "".join(_LINES.findall(text)))
    lanes = [re.fullmatch(r"#ttg.dot_op<\{opIdx = 0, .*kWidth = 4\}>", layout) for layout in codes]
    sound = set(products) == {"2"} and all(lanes)
    if not sound:
        say_once("kvtune's kernels run without inline PTX: this Triton lays out products anew.")
    return sound


@functools.cache
def early(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one it waits for has ended."""
    if portable() or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return hasattr(getattr(triton.language.extra, "cuda", None), "gdc_wait")


def waiting(device: torch.device) -> dict[str, bool]:
    """The options of a kernel that waits by itself for what was launched before it."""
    return {"EARLY": True, "launch_pdl": True} if early(device) else {"EARLY": False}


def warps(dim: int, columns: int) -> int:
    """Warps of a program, so that its sums stay in registers.

    Never four: then Triton would take warp-group products, whose operands lie in registers in
    another order than the four neighbouring lanes that `codes` makes numbers of at once.
    """
    return 2 if dim > 128 or columns > 16 else 1


def stages(keys: Format, values: Format) -> int:
    """Pages that are on their way while one is worked on, plus one: more of them when small."""
    return 3 if keys.bits + values.bits < 8 else 2


@functools.cache
def slots(device: torch.device, dim: int, columns: int) -> int:
    """Programs that run on the device at one time: registers allow 8 warps a multiprocessor."""
    if device.type != "cuda":
        return 8
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return units * max(1, (12 if dim <= 64 and columns <= 16 else 8) // warps(dim, columns))


@functools.lru_cache(1024)
def split_count(work: int, tiles: int, room: int) -> int:
    """Into how many stretches a context of `tiles` pages is cut, for `work` programs each.

    Programs run in waves of `room`; a wave costs the pages of its longest stretch, plus about two
    for starting, and merging costs a little for each stretch.
    """
    most = max(1, min(tiles, 4 * room // work + 1, 256))

    def cost(splits: int) -> float:
        waves = math.ceil(work * splits / room)
        return waves * (math.ceil(tiles / splits) + 2) + splits * work / room / 4 + splits / 32

    return min(range(1, most + 1), key=cost)
