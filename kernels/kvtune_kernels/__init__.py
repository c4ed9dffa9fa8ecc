"""The public ops of the runtime: packing, group quantisation
and attention over [B, H, T, D] tensors; Triton or plain torch."""

from kvtune_kernels.formats import PAGE, Exact, Format, Packed, Window, plane_table
from kvtune_kernels.launch import (
    Workspace,
    append,
    attend_packed,
    encode_into,
    implementation,
    runs_triton,
    say_once,
    unsupported,
)
from kvtune_kernels.maps import Map, turn
from kvtune_kernels.reference import attend, cut, decode, encode

__all__ = [
    "PAGE",
    "Exact",
    "Format",
    "Map",
    "Packed",
    "Window",
    "Workspace",
    "append",
    "attend",
    "attend_packed",
    "cut",
    "decode",
    "encode",
    "encode_into",
    "implementation",
    "plane_table",
    "runs_triton",
    "say_once",
    "turn",
    "unsupported",
]
