"""What a folder of images is like before one trains on it: `maxmap check`. Nothing in here needs JAX."""
