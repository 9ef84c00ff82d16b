"""Connections to model libraries; each is optional and none knows another."""
