"""What a replayed step depends on besides config, data and secret: devices, versions, flags and our own code."""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform

import cv2
import jax

import maskdp
from maskdp.errors import UserError

PACKAGES = ("maskdp", "jax", "jaxlib", "flax", "optax", "numpy", "dp-accounting")


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def describe(devices: int) -> dict[str, str]:
    """Name → value of everything that must be equal for a replayed step to be bit-identical.

    Args:
        devices: size of the mesh.
    """
    return {
        "devices": f"{devices} × {jax.devices()[0].device_kind} in {jax.process_count()} processes",
        "platform": f"{jax.devices()[0].platform} on {platform.machine()}",
        "processor": _processor(),
        "opencv": cv2.__version__,
        "python": platform.python_version(),
        **versions(),
        "code": code_digest(),
        "XLA_FLAGS": _flags(jax.devices()[0].platform),
        "jax_disable_most_optimizations": str(jax.config.values.get("jax_disable_most_optimizations")),
        "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "jax_enable_x64": str(jax.config.jax_enable_x64),
        "jax_default_matmul_precision": str(jax.config.jax_default_matmul_precision),
    }


def _flags(platform: str) -> str:
    """`XLA_FLAGS`, sorted, without those for GPUs where there is none."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(sorted(flag for flag in flags if platform in GPUS or not flag.startswith("--xla_gpu")))


def _processor() -> str:
    """Model of the CPU; JAX calls all of them `cpu`, but compiles for the vector units of each."""
    about = pathlib.Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


GPUS = ("gpu", "cuda", "rocm")
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_FIXED_KERNELS = "--xla_gpu_autotune_level=0"  # measured choices differ from one start to the next


def ask_for_determinism() -> None:
    """Adds the XLA flags under which a GPU repeats a step bit for bit, where `XLA_FLAGS` does not name them.

    Call it before JAX looks for devices.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    for flag in (_DETERMINISTIC, _FIXED_KERNELS):
        if not any(given.startswith(flag.partition("=")[0]) for given in flags):
            flags.append(flag)
    os.environ["XLA_FLAGS"] = " ".join(flags)


def refuse_nondeterminism(platform: str, flags: str) -> None:
    """Raises UserError on a GPU without `ask_for_determinism`'s flags.

    A step that is replayed with the same noise and a slightly other sum is a second release, and the difference of the
    two holds no noise.
    """
    if platform in GPUS and not {_DETERMINISTIC, _FIXED_KERNELS} <= set(flags.split()):
        raise UserError(f"XLA_FLAGS: a private run on a GPU needs {_DETERMINISTIC} {_FIXED_KERNELS}, got {flags!r}")


@functools.cache
def code_digest() -> str:
    """SHA-256 of the Python files of `maskdp` and `maskdp_jax`, hex, 16 digits."""
    total = hashlib.sha256()
    for package in (pathlib.Path(maskdp.__file__).parent, pathlib.Path(__file__).parent):
        for file in sorted(package.rglob("*.py")):
            total.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]
