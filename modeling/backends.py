"""Which device and which optional kernels this machine has; the only place that probes them.

python -m modeling.backends                     print the table
python -m modeling.backends --require unsloth   exit 2, saying what is missing, unless it works
"""

import importlib.util
import os
import sys

import torch

GPU_PACKAGES = {
    "unsloth": "faster fine-tuning; needs an environment of its own (pip install unsloth)",
    "flash_attn": "attention kernels (pip install flash-attn --no-build-isolation)",
    "vllm": "answers in bulk; needs an environment of its own (pip install 'vllm>=0.10')",
    "mamba_ssm": "selective-scan kernels (pip install mamba-ssm --no-build-isolation)",
}


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type that a device multiplies matrices in at its full speed.

    bfloat16 where there are units for it, else float32: a CPU without AMX, AVX512-BF16 or ARM's
    BF16 takes 4 to 50 times as long in bfloat16. A matter of features, never of a timing, so that a
    machine computes the same today and tomorrow.
    """
    if device.type == "cuda":
        has_units = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        features = torch.cpu.get_capabilities()
        has_units = any(there for name, there in features.items() if name.endswith("bf16"))
    return torch.bfloat16 if has_units else torch.float32


def be_deterministic(device: torch.device) -> None:
    """Have torch take, on a GPU, the kernels that give the same bits again, where there are such.

    Sums by atomic additions come in an order of their own each time; where torch knows no other
    way it warns. On a CPU nothing has to be chosen. Call it before anything is computed there.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def what_is_missing(package: str) -> list[str]:
    """What keeps an optional GPU package from being used here; empty when nothing does."""
    if package not in GPU_PACKAGES:
        raise ValueError(f"unknown package '{package}'; known: {', '.join(GPU_PACKAGES)}")
    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA GPU (torch.cuda.is_available() is False)")
    if importlib.util.find_spec(package) is None:
        missing.append(f"the package {package}: {GPU_PACKAGES[package]}")
    return missing


def require(package: str, what_for: str) -> None:
    """Raise ValueError, naming what is missing, unless an optional package can be used here."""
    if missing := what_is_missing(package):
        raise ValueError(f"{what_for} needs {package}; missing here: {'; '.join(missing)}")


def main(arguments: list[str]) -> int:
    """Print the table, or check one requirement."""
    if arguments[:1] == ["--require"] and len(arguments) == 2:
        missing = what_is_missing(arguments[1])
        if missing:
            print(f"{arguments[1]} cannot be used here; missing: {'; '.join(missing)}")
        return 2 if missing else 0
    print(
        f"device: {default_device()}, computing in {compute_dtype(default_device())}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads"
    )
    for package in GPU_PACKAGES:
        print(f"{package}: {'; '.join(what_is_missing(package)) or 'usable'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
