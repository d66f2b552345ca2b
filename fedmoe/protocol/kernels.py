"""The wire formats in one pass over memory, by kernels.c: the same bits as torch gives in `fedmoe.protocol.formats`."""

import ctypes
import platform
from pathlib import Path

import torch

from fedmoe.util.compiled import load

SOURCE = Path(__file__).with_suffix(".c")
_WIDE = "x86-64-v3"
_POINTER = ctypes.c_void_p
_SIGNATURES = {
    "fedmoe_encode": (
        ctypes.c_double,
        (ctypes.c_int, _POINTER, _POINTER, ctypes.c_int64, _POINTER, _POINTER),
    ),
    "fedmoe_fold": (
        ctypes.c_double,
        (ctypes.c_int, _POINTER, _POINTER, ctypes.c_int64, _POINTER, ctypes.c_float, _POINTER),
    ),
}


class Kernels:
    """The compiled functions. They release the GIL, so that threads run beside each other.

    Raises:
        SettingsError: if they cannot be compiled or loaded here.
    """

    def __init__(self) -> None:
        # What torch uses, so that ATEN_CPU_CAPABILITY restricts both.
        wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        library = load(SOURCE, _WIDE if wide else "")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library = library

    def encode(
        self,
        bits: int,
        values: torch.Tensor,
        minus: torch.Tensor | None,
        scales: torch.Tensor,
        data: torch.Tensor,
    ) -> float:
        """Encode values (n,) fp32, or their difference to `minus` (n,), in the format of 8 or 4 bits.

        Returns the squared L2 norm of what is encoded, in fp64.
        The bytes are written to `scales` and `data`, uint8, whose lengths are those of the format.
        """
        other = None if minus is None else _address(minus, torch.float32)
        return float(
            self._library.fedmoe_encode(
                bits,
                _address(values, torch.float32),
                other,
                len(values),
                _address(scales, torch.uint8),
                _address(data, torch.uint8),
            )
        )

    def fold(
        self,
        bits: int,
        scales: torch.Tensor,
        data: torch.Tensor,
        now: torch.Tensor,
        factor: float,
        out: torch.Tensor,
    ) -> float:
        """Write `now` + factor × Δ to `out`, (n,) fp32 each and possibly the same; returns Δ's squared L2 norm in fp64.

        Δ is given by scales (of length 0 if the format has none) and data, uint8, in the format of this many bits.
        """
        return float(
            self._library.fedmoe_fold(
                bits,
                _address(scales, torch.uint8),
                _address(data, torch.uint8),
                len(out),
                _address(now, torch.float32),
                factor,
                _address(out, torch.float32),
            )
        )


def _address(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    assert tensor.is_contiguous()
    assert tensor.dtype == dtype  # else C would write beyond it
    return tensor.data_ptr()


# Compile them for each processor of this kind, as a container image does when it is built.
if __name__ == "__main__":
    for processor in ("", _WIDE) if platform.machine() == "x86_64" else ("",):
        load(SOURCE, processor)
