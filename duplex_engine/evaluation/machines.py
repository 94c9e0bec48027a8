"""The GPUs of the prediction: published sizes, and rates fitted to published kernel timings.

Sizes are NVIDIA's data sheets'. Everything fitted comes from the timings that the package
aiconfigurator-core 0.12.0 carries, by `python -m bench.gpu_model.calibrate`, which also prints how
far the fits are off: microseconds = start + bytes / rate, for the fastest of TensorRT-LLM, vLLM and
SGLang. No number here was measured with this engine, but for those of TODAY.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["MACHINES", "TODAY", "AllReduce", "Fit", "Machine", "Today"]


class Fit(NamedTuple):
    """Microseconds of an operation of n bytes: start_us + n / bytes_per_s."""

    start_us: float
    bytes_per_s: float


class AllReduce(NamedTuple):
    """The faster of one exchange and of two, each a start and microseconds for each MB."""

    start_us: float
    us_per_mb: float
    start_two_us: float
    two_us_per_mb: float

    def us(self, n_bytes: float) -> float:
        """Of one all-reduce."""
        mb = n_bytes / 1e6
        one, two = (
            self.start_us + self.us_per_mb * mb,
            self.start_two_us + self.two_us_per_mb * mb,
        )
        return min(one, two)


@dataclass(frozen=True, slots=True)
class Machine:
    """One GPU, and what joins it to its neighbours.

    Published: memory, its rate, multiprocessors, dense tensor operations a second by format, NVLink
    bytes a second in one direction. Fitted: the rest. `experts` covers routing and
    both products; `small_us` is a product of less than 1 MB.
    """

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    n_multiprocessors: int
    peak_per_s: dict[str, float]
    nvlink_bytes_per_s: float
    products: dict[str, Fit]
    operations_per_s: dict[str, float]
    experts: dict[str, Fit]
    attention: Fit
    small_us: float
    all_reduce: dict[int, AllReduce]


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            "H100",
            memory_bytes=80e9,
            memory_bytes_per_s=3.35e12,
            n_multiprocessors=132,
            peak_per_s={"bfloat16": 989e12, "fp8": 1979e12},
            nvlink_bytes_per_s=450e9,
            products={"bfloat16": Fit(0.0, 2.80e12), "fp8": Fit(4.45, 2.67e12)},
            operations_per_s={"bfloat16": 810e12, "fp8": 1254e12},
            experts={"fp8": Fit(25.4, 2.96e12)},
            attention=Fit(9.54, 3.12e12),
            small_us=2.96,
            all_reduce={
                2: AllReduce(2.51, 7.31, 2.88, 2.96),
                4: AllReduce(2.72, 10.68, 5.36, 5.05),
                8: AllReduce(3.29, 22.15, 7.65, 5.58),
            },
        ),
        Machine(
            "H200",
            memory_bytes=141e9,
            memory_bytes_per_s=4.8e12,
            n_multiprocessors=132,
            peak_per_s={"bfloat16": 989e12, "fp8": 1979e12},
            nvlink_bytes_per_s=450e9,
            products={"bfloat16": Fit(4.15, 4.14e12), "fp8": Fit(7.61, 3.88e12)},
            operations_per_s={"bfloat16": 800e12, "fp8": 1319e12},
            experts={"fp8": Fit(23.5, 3.93e12)},
            attention=Fit(10.15, 4.27e12),
            small_us=2.92,
            all_reduce={
                2: AllReduce(2.44, 6.52, 2.71, 3.07),
                4: AllReduce(2.72, 10.64, 4.62, 4.96),
                8: AllReduce(3.32, 19.27, 8.6, 4.46),
            },
        ),
        Machine(
            "B200",
            memory_bytes=180e9,
            memory_bytes_per_s=8e12,
            n_multiprocessors=148,
            peak_per_s={"bfloat16": 2250e12, "fp8": 4500e12, "nvfp4": 9000e12},
            nvlink_bytes_per_s=900e9,
            products={
                "bfloat16": Fit(3.58, 6.42e12),
                "fp8": Fit(7.82, 5.90e12),
                "nvfp4": Fit(5.72, 5.21e12),
            },
            operations_per_s={"bfloat16": 1593e12, "fp8": 2397e12, "nvfp4": 4206e12},
            experts={"fp8": Fit(29.2, 6.69e12), "nvfp4": Fit(20.7, 6.69e12)},
            attention=Fit(6.52, 7.43e12),
            small_us=2.19,
            all_reduce={
                2: AllReduce(3.8, 15.33, 4.56, 1.6),
                4: AllReduce(4.36, 27.49, 4.85, 4.5),
                8: AllReduce(5.04, 10.05, 8.32, 5.32),
            },
        ),
        Machine(
            "GB300",
            memory_bytes=288e9,
            memory_bytes_per_s=8e12,
            n_multiprocessors=160,
            peak_per_s={"bfloat16": 2500e12, "fp8": 5000e12, "nvfp4": 15000e12},
            nvlink_bytes_per_s=900e9,
            products={
                "bfloat16": Fit(3.46, 6.47e12),
                "fp8": Fit(8.15, 6.09e12),
                "nvfp4": Fit(5.72, 5.54e12),
            },
            operations_per_s={"bfloat16": 1965e12, "fp8": 2884e12, "nvfp4": 4895e12},
            experts={"fp8": Fit(28.8, 6.80e12), "nvfp4": Fit(17.5, 7.09e12)},
            attention=Fit(8.64, 7.54e12),
            small_us=2.18,
            all_reduce={
                2: AllReduce(3.53, 6.17, 4.1, 1.76),
                4: AllReduce(3.75, 8.47, 4.18, 4.88),
                8: AllReduce(4.3, 6.4, 5.42, 2.13),
            },
        ),
    )
}


class Today(NamedTuple):
    """What our CUDA kernels took when measured, beyond bytes and arithmetic, in microseconds.

    Of a launch, one behind the other in a recorded pass; of a tile of 8 query vectors in all thread
    blocks of the attention that run at once; of 8 rows more in a product of 1024 inputs; of 10^9
    operations of a product of more than 64 rows; of a session in a turn, however many tokens it
    says, and of its sound.
    """

    launch_us: float
    tile_us: float
    row_step_us: float
    large_us: float
    session_us: float
    sound_us: float


# Fitted to measurements on an H200 of 2026-11-27: `python -m bench.gpu_model.today`.
TODAY = Today(1.49, 8.14, 0.83, 24.1, 80.7, 26.1)
