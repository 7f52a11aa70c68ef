"""flash_attn.layers under flashgqa.torch: `rotary`."""
