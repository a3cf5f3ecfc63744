"""The promises, tried beside an installation: played backends, a gateway of its own, one table of what held."""
