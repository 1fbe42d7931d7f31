"""The machines that plans without measurement know: what layers cost there, dense and sparse."""

import math
from dataclasses import dataclass

from sparseprop import backend

__all__ = ["INTEL", "ZEN4", "ZEN5", "Constants", "Machine", "this_machine"]

_ZEN5_FAMILY = 26


@dataclass(frozen=True)
class Constants:
    """What one family of layers costs; refit from the benchmarks when the kernels change.

    Attributes:
        dense_gflops: speed of the dense layer, forward and backward alike.
        dense_gbytes: GB/s at which a dense layer reads its weights, which bounds small batches.
        dense_moved_ns: time of the dense layer per activation element, whatever its weights.
        moved_ns: time to pack and store one activation element, forward and backward together.
        window_moved_ns: the same where the kernel is larger than one position.
        dense_call_us, sparse_call_us: fixed cost of one forward and backward.
        positions: columns of the contraction in a nominal batch, before any stride.
    """

    dense_gflops: float
    dense_gbytes: float
    dense_moved_ns: float
    moved_ns: float
    window_moved_ns: float
    dense_call_us: float
    sparse_call_us: float
    positions: int


@dataclass(frozen=True)
class Machine:
    """Two cores, float32, two threads.

    Attributes:
        families: by the class name of the dense layer.
        call_ns: per non-zero and call: reordering values and their gradients.
        few_call_ns: the same for few columns.
        weight_ns, weight_column_ns: per weight, zero or not, and per column of it, where bitmaps are used.
        tile_ns: per non-zero and tile of columns: index, value, dot product.
        lanes_ns: per non-zero and 16 columns.
        window_lanes_ns: the same of kernels larger than 1, whose halo counts as no column.
    """

    families: dict[str, Constants]
    call_ns: float
    few_call_ns: float
    weight_ns: float
    weight_column_ns: float
    tile_ns: float
    lanes_ns: float
    window_lanes_ns: float


_Seven = tuple[float, float, float, float, float, float, float]


def _families(linear: _Seven, conv: _Seven) -> dict[str, Constants]:
    return {
        "Linear": Constants(*linear, 256),
        "Conv1d": Constants(*conv, 16 * 256),
        "Conv2d": Constants(*conv, 16 * 14 * 14),
        "Conv3d": Constants(*conv, 4 * 8 * 14 * 14),
    }


# A 2.5 GHz Cascade Lake Xeon with AVX-512. Fitted to the logarithm of the speed-ups of the short benchmark,
# run three times, of four layers of 64 to 256 features, and of five strided 1x1 convolutions down to 10 %
# sparsity, which without them looked faster sparse at any.
INTEL = Machine(
    _families(
        (132.0, 27.9, 1.48, 2.16, 2.16, 146.0, 175.0),
        (127.0, 27.9, 1.67, 1.65, 2.07, 150.0, 191.0),
    ),
    call_ns=0.71,
    few_call_ns=0.71,  # never measured there, nor are the next two: plans keep to what was
    weight_ns=math.inf,
    weight_column_ns=0.0,
    tile_ns=0.65,
    lanes_ns=1.20,
    window_lanes_ns=1.20,
)
# An EPYC of Zen 4. Fitted to the full benchmark, run once (252 shapes from 30 to 99.9 % sparsity), and to 26
# smaller layers in two to six batches; lanes do so much of the work that tiles got no share of their own.
ZEN4 = Machine(
    _families(
        (145.0, 9.91, 1.61, 0.823, 0.823, 127.0, 128.0),
        (190.0, 4.75, 0.909, 0.669, 0.923, 156.0, 85.0),
    ),
    call_ns=0.940,
    few_call_ns=1.45,
    weight_ns=0.575,
    weight_column_ns=0.018,
    tile_ns=0.0,
    lanes_ns=0.667,
    window_lanes_ns=0.674,
)
# An EPYC of Zen 5. Fitted to the short benchmark, run once, and to twenty layers more: small ones, small
# batches, narrow convolutions, down to 10 % sparsity; those of few columns to ten of batch 1 to 32.
ZEN5 = Machine(
    _families(
        (156.0, 11.4, 1.59, 0.691, 0.691, 60.9, 78.1),
        (398.0, 6.73, 0.902, 0.545, 0.526, 241.0, 35.3),
    ),
    call_ns=1.62,
    few_call_ns=1.0,
    weight_ns=0.2,
    weight_column_ns=0.035,
    tile_ns=0.191,
    lanes_ns=0.416,
    window_lanes_ns=0.32,  # not fitted with the others: 3x3 layers at 50 %, since columns have no halo
)


def this_machine() -> Machine:
    """The one most like the CPU at hand.

    Dense torch tells them apart more than the kernels do: its matrix product uses AVX2 on CPUs by AMD, its
    convolutions AVX-512. Up to Zen 4 both compute as much in a cycle, from Zen 5 on AVX-512 twice as much.

    >>> this_machine() in (INTEL, ZEN4, ZEN5)
    True
    """
    family = backend.amd_family()
    if family == 0:
        return INTEL
    return ZEN5 if family >= _ZEN5_FAMILY else ZEN4
