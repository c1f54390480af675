"""Attention kernels of rcm_megatron. Depends on torch (and triton) alone.

Each op has a plain PyTorch reference beside it.
"""
