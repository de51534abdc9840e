"""The table of kinds: kind → its flight, which is how a job of it runs."""

from __future__ import annotations

from worker.flights import AnyFlight
from worker.kinds.encode import EncodeFlight
from worker.kinds.generate import GenerateFlight
from worker.kinds.interpolate import InterpolateFlight
from worker.kinds.likelihood import LikelihoodFlight
from worker.kinds.noise import NoiseFlight
from worker.kinds.reconstruct import ReconstructFlight
from worker.kinds.restore import RestoreFlight

FLIGHTS: dict[str, type[AnyFlight]] = {
    "generate": GenerateFlight,
    "noise": NoiseFlight,
    "reconstruct": ReconstructFlight,
    "restore": RestoreFlight,
    "encode": EncodeFlight,
    "interpolate": InterpolateFlight,
    "likelihood": LikelihoodFlight,
}
