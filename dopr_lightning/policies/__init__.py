"""Policies: objectives and samplers as pure functions, networks, normaliser, EMA, and the LightningModule."""
