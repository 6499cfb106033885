"""Tables about latent students on toy tasks, with seeds, controls and intervals."""
