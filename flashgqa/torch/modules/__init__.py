"""flash_attn.modules under flashgqa.torch: `mha`."""
