"""The dashboard: its generator, and a plotter for where there is no Grafana."""
