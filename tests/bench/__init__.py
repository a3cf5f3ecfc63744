"""How fast: this gateway, governed, against plain passthroughs and nginx, on this machine, in one run. `make bench`."""
