"""The constants of the model, each with its source.

Sources:

* *data sheet*: the vendor's data sheet or white paper of the GPU.
* *guide*: the CUDA C++ programming guide, "Technical specifications per compute capability" and "Multiprocessor level".
* *CDNA*: AMD's CDNA 3 white paper and instruction set manual.
* *gpu-benches*: published measurements of other people's GPUs, github.com/te42kyfo/gpu-benches, by the file's name.
* *assumption*: of this project.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The share of the data sheet's bandwidth that a copy of a large buffer reaches. Assumption: 3.0 of 3.35 TB/s. In
#: gpu-benches a copy reaches 0.84 (A100, gpu-small-kernels/a100_80.txt) to 0.88 (L40, l40.txt).
COPY_SHARE = 0.9

#: Clock cycles between two instructions of one warp that depend on each other. Guide: 4 for most arithmetic; CDNA: an
#: instruction of a wavefront of 64 takes a SIMD of 16 lanes 4 cycles.
DEPENDENT_CYCLES = 4


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor (AMD: a compute unit) holds at a time."""

    warps: int
    programs: int
    #: Bytes of shared memory.
    shared: int
    #: Bytes of shared memory that a program has besides its own.
    reserved: int = 1024
    #: Registers of each of the four schedulers' parts, for all of its lanes, and the unit in which a warp gets them.
    registers: int = 16384
    unit: int = 256
    threads: int = 32

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """The programs that fit, by registers of a thread, bytes of shared memory, and warps of a program."""
        of_warp = -(-registers * self.threads // self.unit) * self.unit
        held = min(self.warps, 4 * (self.registers // max(of_warp, 1)))
        fitting = [self.programs, held // warps]
        if shared + self.reserved:
            fitting.append(self.shared // (shared + self.reserved))
        return min(fitting)


#: By compilation target. Guide: warps, programs and shared memory; 64 K registers, in units of 256. CDNA: 8 wavefronts
#: of each of 4 SIMDs, 512 registers of 64 lanes in units of 8, 64 KiB of LDS.
LIMITS = {
    "sm_80": Limits(warps=64, programs=32, shared=164 << 10),
    "sm_89": Limits(warps=48, programs=24, shared=100 << 10),
    "sm_90": Limits(warps=64, programs=32, shared=228 << 10),
    "sm_100": Limits(warps=64, programs=32, shared=228 << 10),
    "gfx942": Limits(warps=32, programs=32, shared=64 << 10, reserved=0, registers=512 * 64, unit=8 * 64, threads=64),
}


@dataclass(frozen=True)
class Gpu:
    """The constants of one GPU. Times are in seconds, sizes in bytes, bandwidths in bytes per second."""

    name: str
    #: The compilation target, and the architecture family of the launch table.
    target: str
    family: str
    multiprocessors: int
    clock: float
    #: Memory, by the data sheet; a copy reaches COPY_SHARE of it.
    peak_bandwidth: float
    #: The last-level cache: bytes that stay in it, and its bandwidth for kernels that read and write.
    cache: float
    cache_bandwidth: float
    #: From a load to its number, from the cache and from memory, without other traffic.
    cache_latency: float
    memory_latency: float
    #: From the start of an empty kernel to the start of the next one in a stream, on the GPU.
    launch: float
    #: Instructions of warps that a multiprocessor begins in a clock cycle.
    issue: int = 4
    warp: int = 32

    @property
    def bandwidth(self) -> float:
        return COPY_SHARE * self.peak_bandwidth

    @property
    def limits(self) -> Limits:
        return LIMITS[self.target]


#: By the names of the option --gpu. ``launch`` is the time of a copy of 64 KiB in gpu-benches, gpu-small-kernels, less
#: one latency of the cache.
GPUS = {
    "h100": Gpu(
        name="NVIDIA H100 SXM",
        target="sm_90",
        family="sm90",
        multiprocessors=132,  # data sheet
        clock=1.755e9,  # gpu-latency/h100_pcie.txt; the boost clock is higher
        peak_bandwidth=3.35e12,  # data sheet
        cache=44e6,  # gpu-l2-cache/h200.txt: the bandwidth falls beyond 44 of its 50 MB
        cache_bandwidth=4.3e12,  # gpu-small-kernels/h200.txt
        cache_latency=151e-9,  # gpu-latency/h100_pcie.txt: 265 cycles
        memory_latency=370e-9,  # gpu-latency/h100_pcie.txt: 650 cycles
        launch=2.3e-6,  # gpu-small-kernels/h200.txt
    ),
    "a100": Gpu(
        name="NVIDIA A100 SXM 80 GB",
        target="sm_80",
        family="sm80",
        multiprocessors=108,  # data sheet
        clock=1.41e9,  # data sheet
        peak_bandwidth=2.039e12,  # data sheet
        cache=28e6,  # gpu-l2-cache/a100_80.txt: the bandwidth falls beyond 28 of its 40 MB
        cache_bandwidth=2.6e12,  # gpu-small-kernels/a100_80.txt
        cache_latency=150e-9,  # cuda-latency/a100_80.txt: 211 cycles
        memory_latency=405e-9,  # cuda-latency/a100_80.txt: 571 cycles
        launch=2.5e-6,  # gpu-small-kernels/a100_80.txt
    ),
    "rtx4090": Gpu(
        name="NVIDIA GeForce RTX 4090",
        target="sm_89",
        family="sm80",
        multiprocessors=128,  # data sheet
        clock=2.52e9,  # data sheet
        peak_bandwidth=1.008e12,  # data sheet
        cache=72e6,  # data sheet; the L40, of the same generation, keeps its whole cache: gpu-l2-cache/l40.txt
        cache_bandwidth=4.3e12,  # of the L40: gpu-small-kernels/l40.txt
        cache_latency=111e-9,  # of the L40: gpu-latency/l40.txt, 277 cycles
        memory_latency=254e-9,  # of the L40: gpu-latency/l40.txt, 632 cycles
        launch=1.5e-6,  # of the L40: gpu-small-kernels/l40.txt
    ),
    "mi300x": Gpu(
        name="AMD Instinct MI300X",
        target="gfx942",
        family="gfx9",
        multiprocessors=304,  # data sheet
        clock=2.1e9,  # data sheet
        peak_bandwidth=5.3e12,  # data sheet
        cache=256e6,  # data sheet: the Infinity Cache
        cache_bandwidth=17.2e12,  # data sheet, a peak
        cache_latency=141e-9,  # of the MI210's L2: gpu-latency/mi210.txt, 240 cycles
        memory_latency=385e-9,  # of the MI210: gpu-latency/mi210.txt, 655 cycles
        launch=2.4e-6,  # of the MI210: gpu-small-kernels/mi210.txt
        issue=1,  # CDNA: each of 4 SIMDs begins an instruction in 4 cycles
        warp=64,
    ),
}
