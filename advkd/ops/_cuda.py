"""Whether the C++ CUDA kernels are there, and for which devices."""

from __future__ import annotations

from advkd.ops import _backend


def cuda_missing() -> str | None:
    """Why no C++ CUDA kernel can run here, as a clause; None where they can."""
    extension = _backend.extension
    if extension is None:
        return _backend.extension_missing
    if not hasattr(extension, "cuda_unavailable"):
        return f"the extension was built without CUDA: {extension.cuda_left_out}"
    return extension.cuda_unavailable() or None


def cuda_code_missing(capability: tuple[int, int]) -> str | None:
    """Why a device of this capability cannot run the compiled code, as a clause; None where it can.

    Machine code runs on later devices of the same major number; PTX, which is compiled in for the
    newest architecture, on all later ones.
    """
    archs = [divmod(int(arch), 10) for arch in _backend.fused_extension().cuda_archs.split()]
    same = any(arch[0] == capability[0] and arch[1] <= capability[1] for arch in archs)
    if same or capability >= max(archs):
        return None
    built = ", ".join(f"{major}.{minor}" for major, minor in archs)
    return f"the CUDA part was built for {built}, not for {capability[0]}.{capability[1]}"
