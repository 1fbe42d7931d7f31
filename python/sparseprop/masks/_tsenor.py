"""Transposable masks by entropic optimal transport, in plain torch (TSENOR, arXiv 2505.23949)."""

import math

import torch
from torch import Tensor

_CHUNK = 8192
_SHARPNESS = 100.0  # on scores divided by their tile's maximum
_STEPS = 300


def tsenor_tiles(tiles: Tensor, n: int, *, sharpness: float = _SHARPNESS, steps: int = _STEPS) -> Tensor:
    """(tiles, m, m) scores to masks with exactly n per row and column, close to the best."""
    parts = []
    for chunk in torch.split(tiles, _CHUNK):
        keep = round_tiles(_transport(chunk, n, sharpness, steps), n)
        parts.append(fill_tiles(keep, chunk, n))
    return torch.cat(parts)


def _transport(tiles: Tensor, n: int, sharpness: float, steps: int) -> Tensor:
    """Log of the fractional plan: Dykstra's projections on rows, columns and the unit box in turn."""
    log_n = math.log(n)
    largest = tiles.amax((1, 2), keepdim=True)
    plan = sharpness * (tiles / torch.where(largest > 0, largest, 1.0))
    dual = torch.zeros_like(plan)
    for _ in range(steps):
        plan = plan - plan.logsumexp(2, keepdim=True) + log_n
        plan = plan - plan.logsumexp(1, keepdim=True) + log_n
        raised = plan + dual
        plan = raised.clamp_max(0.0)
        dual = raised - plan
    return plan


def round_tiles(weights: Tensor, n: int) -> Tensor:
    """Heaviest first, kept while row and column have room; ties go to the lowest flat index."""
    count, rows, cols = weights.shape
    order = weights.flatten(1).sort(dim=1, descending=True, stable=True).indices
    keep = torch.zeros(count, rows * cols, dtype=torch.bool, device=weights.device)
    used_rows = torch.zeros(count, rows, dtype=torch.int32, device=weights.device)
    used_cols = torch.zeros(count, cols, dtype=torch.int32, device=weights.device)
    for cell in order.unbind(1):
        cell = cell.unsqueeze(1)
        row, col = cell // cols, cell % cols
        fits = (used_rows.gather(1, row) < n) & (used_cols.gather(1, col) < n)
        keep.scatter_(1, cell, fits)
        used_rows.scatter_add_(1, row, fits.int())
        used_cols.scatter_add_(1, col, fits.int())
    return keep.view(weights.shape)


def fill_tiles(keep: Tensor, scores: Tensor, n: int) -> Tensor:
    """Complete masks to exactly n per row and column: add the best entry that fits, else exchange one."""
    keep, scores = keep.clone(), scores.double()
    while True:
        open_tiles = (keep.sum(2) < n).any(1).nonzero().squeeze(1)
        if open_tiles.numel() == 0:
            return keep
        keep[open_tiles] = _fill_one(keep[open_tiles], scores[open_tiles], n)


def _fill_one(keep: Tensor, scores: Tensor, n: int) -> Tensor:
    count, _, cols = keep.shape
    tile = torch.arange(count, device=keep.device)
    open_rows, open_cols = keep.sum(2) < n, keep.sum(1) < n
    addable = open_rows.unsqueeze(2) & open_cols.unsqueeze(1) & ~keep
    best = scores.masked_fill(~addable, -math.inf).flatten(1).argmax(1)
    add = addable.flatten(1).any(1)
    keep.view(count, -1)[tile[add], best[add]] = True

    row, col = open_rows.int().argmax(1), open_cols.int().argmax(1)
    gain = scores[tile, row].unsqueeze(1) + scores[tile, :, col].unsqueeze(2) - scores
    movable = keep & ~keep[tile, row].unsqueeze(1) & ~keep[tile, :, col].unsqueeze(2)
    move = gain.masked_fill(~movable, -math.inf).flatten(1).argmax(1)
    t, p, q = tile[~add], (move // cols)[~add], (move % cols)[~add]
    keep[t, p, q] = False
    keep[t, row[~add], q] = True
    keep[t, p, col[~add]] = True
    return keep
