"""What locc costs and saves, measured: `make bench`."""
