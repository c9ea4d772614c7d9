"""Checkpoints: load, open, save, and the safetensors library's own functions replaced."""

from gpunvme.models.opening import SafeSlice, safe_open
from gpunvme.models.patch import Patch, patch_safetensors
from gpunvme.models.safetensors import load_file
from gpunvme.models.saving import save_file

__all__ = ["Patch", "SafeSlice", "load_file", "patch_safetensors", "safe_open", "save_file"]
