"""Models on disk, entropy-coded: one `.onnxc` file in place of an ONNX file."""

from onnxcomp.codec.files import open_session, pack, packed_bytes, stream, unpack, unpack_to
from onnxcomp.codec.planning import Profile

__all__ = ["Profile", "open_session", "pack", "packed_bytes", "stream", "unpack", "unpack_to"]
