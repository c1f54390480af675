"""What the program runs on: the device and its backend, and Megatron-Core, whose version is checked and which is patched on the CPU."""
