"""Find input files, pair images with masks, decode and check them."""
