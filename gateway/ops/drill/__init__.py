"""The gateway's promises, tested beside an installation with fake backends and gateways of the drill's own."""
