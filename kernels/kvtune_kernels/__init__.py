"""The public ops of the runtime: packing, group
quantisation and attention over [B, H, T, D] tensors."""

from kvtune_kernels.reference import attend, dequantize, pack, packed_width, quantize, unpack

__all__ = ["attend", "dequantize", "pack", "packed_width", "quantize", "unpack"]
