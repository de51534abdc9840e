"""Going up again and down again within a chain: the resampling of RePaint, as rows of a table.

After a jump t → s, noise s → t, x ← √(ᾱ_t/ᾱ_s) x + √(1 − ᾱ_t/ᾱ_s) z. Both noises are independent
Gaussians, so down and up is one row. Lugmayr et al. 2022, algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from diffusion.checks import check_whole
from diffusion.noise import Purpose
from diffusion.schedule import Schedule
from diffusion.table import COLUMNS, SamplerError, SamplerTable, first_order

MOST_TRAVEL = 100
_A, _B, _C, _E = (COLUMNS.index(name) for name in "abce")


def with_travel(table: SamplerTable, schedule: Schedule, *, times: int) -> SamplerTable:
    """Every jump but the last walked `times` times: (R − 1)·times + 1 rows of R.

    A row that reads x̂_0 of the row before becomes first order: x has moved since that was found.
    Raises SamplerError for fewer than one time, for Langevin steps, which jump nowhere, and for a
    learned variance, which scales all of a row's noise.
    """
    check_whole("travel", times, least=1, most=MOST_TRAVEL, error=SamplerError)
    if times == 1:
        return table
    if table.learned_variance:
        raise SamplerError("travel: not with variance = 'learned'")
    if np.isin(table.purpose, (Purpose.CORRECTOR, Purpose.BRANCH)).any():
        raise SamplerError(f"travel = {times}: not with Langevin steps: ask for travel = 1")
    last = len(table) - 1
    row = np.append(np.repeat(np.arange(last), times), last)
    number = np.append(np.tile(np.arange(times)[::-1], last), 0)  # 0 goes down for good
    rows = first_order(table.coefficients)[row]
    for i in np.flatnonzero(number):
        t, s = (float(table.time[row[i] + k]) for k in (0, 1))
        up = schedule.alpha_bar(t) / schedule.alpha_bar(s)
        rows[i, [_A, _B, _E]] *= math.sqrt(up)
        rows[i, _C] = math.sqrt(up * rows[i, _C] ** 2 + schedule.jump(t, s).beta)
    return replace(
        table,
        t=table.t[row],
        coefficients=rows,
        purpose=np.where(number > 0, Purpose.TRAVEL, table.purpose[row]),
        spread=table.spread[row],
        noise=table.noise[row] + schedule.T * number,
        memory=table.memory[row],
        time=table.time[row],
    )
