"""The speed of the gateway with limits and audit, compared with plain proxies and nginx on this machine. `make bench`."""
