"""The operations of a layer, one file each: formula, torch reference, Triton kernel, launcher."""
