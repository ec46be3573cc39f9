"""The reference network: what every pass is tested against."""
