"""Case tables shared by tests: right ones, and beside them wrong ones with what the message must say."""

import torch

SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129)  # around every vector width

# convolution options: (dims, in_channels, out_channels, kernel_size, input size, options)
CONVS = {
    "pointwise": (2, 8, 12, 1, (7, 7), {}),
    "pointwise stride 2, two columns": (2, 8, 12, 1, (5, 2), {"stride": 2}),
    "3x3 stride 2, two columns": (2, 5, 6, 3, (4, 2), {"padding": 1, "stride": 2}),
    "pointwise stride 2": (2, 8, 12, 1, (7, 8), {"stride": 2}),
    "3x3": (2, 5, 6, 3, (9, 8), {"padding": 1}),
    "3x3, shifted copies in blocks": (2, 20, 160, 3, (9, 15), {"padding": 1}),
    "5x3 stride 2 dilated, shifted copies": (2, 4, 128, (5, 3), (17, 19), {"stride": 2, "dilation": (2, 3)}),
    "3-D groups, shifted copies": (3, 4, 256, (2, 3, 3), (3, 5, 6), {"groups": 2, "padding": 1}),
    "3x3, columns without halo": (2, 160, 160, 3, (5, 5), {"padding": 1}),
    "5x2 dilated, one side padded, columns without halo": (
        2,
        96,
        96,
        (5, 2),
        (7, 3),
        {"padding": (4, 0), "dilation": (2, 1)},
    ),
    "3-D groups, columns without halo": (3, 120, 120, 3, (3, 2, 4), {"groups": 2, "padding": 1}),
    "1-D, columns far apart": (1, 64, 64, 2, (1001,), {"dilation": 999}),
    "3x3 stride 2": (2, 5, 6, 3, (9, 8), {"padding": 1, "stride": 2}),
    "3x3 no padding": (2, 3, 4, 3, (17, 33), {}),
    "5x5 wider padding than half": (2, 2, 3, 5, (6, 5), {"padding": (4, 3)}),
    "rectangular": (2, 4, 6, (3, 2), (8, 9), {"stride": (1, 3), "padding": (0, 2), "dilation": (2, 1)}),
    "same, even kernel": (2, 3, 4, (2, 4), (6, 7), {"padding": "same"}),
    "same, dilated": (2, 3, 4, (3, 2), (9, 7), {"padding": "same", "dilation": (2, 3)}),
    "valid": (2, 3, 4, 2, (6, 7), {"padding": "valid"}),
    "groups": (2, 6, 9, 3, (6, 7), {"groups": 3, "padding": 1}),
    "depthwise": (2, 6, 12, 3, (6, 7), {"groups": 6, "padding": 1, "stride": 2}),
    "reflect": (2, 3, 4, 3, (6, 7), {"padding": (1, 2), "padding_mode": "reflect"}),
    "replicate": (2, 3, 4, 3, (6, 7), {"padding": (1, 2), "padding_mode": "replicate", "stride": 2}),
    "circular": (2, 3, 4, 3, (6, 7), {"padding": "same", "padding_mode": "circular"}),
    "3 channels, 7x7 stride 2": (2, 3, 8, 7, (20, 21), {"stride": 2, "padding": 3}),
    "one pixel": (2, 16, 17, 1, (1, 1), {}),
    "1-D": (1, 5, 7, 4, (19,), {"stride": 2, "padding": 3, "dilation": 2}),
    "1-D same reflect": (1, 4, 6, 4, (11,), {"padding": "same", "padding_mode": "reflect", "groups": 2}),
    "3-D": (3, 3, 5, (2, 3, 1), (5, 6, 4), {"stride": (1, 2, 1), "padding": (1, 0, 2)}),
    "3-D circular groups": (3, 4, 6, 3, (4, 5, 3), {"padding": 1, "padding_mode": "circular", "groups": 2}),
}

# wrong convolution options and a part of the message
WRONG_CONVS = {
    "channels by groups": (
        (2, 5, 6, 3),
        {"groups": 2},
        "in_channels must be divisible by groups, got 5 and 2",
    ),
    "outputs by groups": (
        (2, 4, 5, 3),
        {"groups": 2},
        "out_channels must be divisible by groups, got 5 and 2",
    ),
    "kernel of three": ((2, 4, 4, (3, 3, 3)), {}, "kernel_size must be a number or 2 numbers"),
    "zero kernel": ((2, 4, 4, 0), {}, "kernel_size must be an integer of at least 1, got 0"),
    "zero stride": ((2, 4, 4, 3), {"stride": 0}, "stride must be an integer of at least 1, got 0"),
    "zero dilation": ((2, 4, 4, 3), {"dilation": (1, 0)}, "dilation must be an integer of at least 1"),
    "negative padding": ((2, 4, 4, 3), {"padding": -1}, "padding must be an integer of at least 0, got -1"),
    "padding word": ((2, 4, 4, 3), {"padding": "full"}, "padding must be 'same', 'valid' or numbers"),
    "padding mode": ((2, 4, 4, 3), {"padding_mode": "wrap"}, "padding_mode must be one of"),
    "same with stride": ((2, 4, 4, 3), {"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
    "no channels": ((2, 0, 4, 3), {}, "in_channels must be an integer of at least 1, got 0"),
    "fractional stride": ((2, 4, 4, 3), {"stride": (1.5, 1)}, "stride must be an integer"),
}

# wrong inputs of SparseLinear(5 in, 4 out) in float32
WRONG_LINEAR_INPUTS = {
    "features": (torch.zeros(2, 4), "expected (..., 5) inputs, got shape (2, 4)"),
    "scalar": (torch.zeros(()), "expected (..., 5) inputs, got shape ()"),
    "double": (torch.zeros(2, 5, dtype=torch.float64), "same dtype, got torch.float64 and torch.float32"),
    "half": (torch.zeros(2, 5, dtype=torch.float16), "same dtype, got torch.float16 and torch.float32"),
    "bfloat16": (torch.zeros(2, 5, dtype=torch.bfloat16), "torch.autocast"),
    "integers": (torch.zeros(2, 5, dtype=torch.int64), "same dtype, got torch.int64 and torch.float32"),
    "device": (torch.zeros(2, 5, device="meta"), "run on the CPU, got input on meta"),
}

# wrong inputs of SparseConv2d(3, 4, 3) in float32
WRONG_CONV_INPUTS = {
    "channels": (torch.zeros(2, 4, 5, 5), "expected (batch, 3, ...) inputs, got shape (2, 4, 5, 5)"),
    "unbatched channels": (torch.zeros(4, 5, 5), "expected (batch, 3, ...) inputs"),
    "dimensions": (torch.zeros(3, 5), "expected 3-D (unbatched) or 4-D input, got shape (3, 5)"),
    "too many dimensions": (torch.zeros(1, 1, 3, 5, 5), "expected 3-D (unbatched) or 4-D input"),
    "smaller than the kernel": (
        torch.zeros(2, 3, 2, 5),
        "at least as large as the kernel: padded size 2 of (2, 5)",
    ),
    "double": (torch.zeros(2, 3, 5, 5, dtype=torch.float64), "same dtype"),
}


def _ints(*numbers: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)


# wrong CSR arrays for a 2 x 4 weight: row_ptr, col_idx, message
WRONG_PATTERNS = {
    "out of range": (_ints(0, 1, 2), _ints(0, 4, dtype=torch.int32), "col_idx is out of range"),
    "negative": (_ints(0, 1, 2), _ints(0, -1, dtype=torch.int32), "col_idx is out of range"),
    "unsorted": (_ints(0, 2, 3), _ints(2, 1, 3, dtype=torch.int32), "unsorted columns"),
    "duplicate": (_ints(0, 2, 3), _ints(1, 1, 3, dtype=torch.int32), "a duplicate column"),
    "wide columns": (
        _ints(0, 1, 2),
        _ints(0, 1),
        "col_idx must be a 1-D torch.int32 tensor, got torch.int64",
    ),
    "float columns": (_ints(0, 1, 2), torch.tensor([0.0, 1.0]), "col_idx must be a 1-D torch.int32 tensor"),
    "narrow pointers": (
        _ints(0, 1, 2, dtype=torch.int32),
        _ints(0, 1, dtype=torch.int32),
        "row_ptr must be a 1-D",
    ),
    "2-D": (_ints(0, 1, 2), torch.zeros(1, 2, dtype=torch.int32), "col_idx must be a 1-D"),
    "rows": (
        _ints(0, 1, 2, 2),
        _ints(0, 1, dtype=torch.int32),
        "row_ptr must have rows + 1 = 3 entries, got 4",
    ),
    "start": (_ints(1, 1, 2), _ints(0, 1, dtype=torch.int32), "row_ptr must rise from 0 to nnz = 2"),
    "end": (_ints(0, 1, 3), _ints(0, 1, dtype=torch.int32), "row_ptr must rise from 0 to nnz = 2"),
    "falling": (_ints(0, 3, 2), _ints(0, 1, dtype=torch.int32), "row_ptr must rise from 0 to nnz = 2"),
}
